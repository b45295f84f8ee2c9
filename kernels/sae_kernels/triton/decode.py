"""Decoding on a GPU: gathered weight rows summed, or multiplied with a row, or both in one reading.

All three kernels are bound by the weight rows they gather, N * K * D elements, of which a multiprocessor
must have some 30 KB under way at all times to keep an H200's memory busy (4.8 TB/s for 0.8 us, over 132).

`sparse_decode`: one warp sums 256 columns of one row, slot after slot, each column within one thread.
Nothing is exchanged, 32 such programs fit a multiprocessor, and each has 4 KB of loads under way.

`decode_residual` and `gather_dot`: one program per row walks over chunks of columns with a tile
[slots, columns] spread over 8 warps. A residual's tile is kept until its columns are summed, and then has
its products with the residual taken: weights are read once, where a second loop over a row's weights (64
times 8 KB at D 4096) would find few of them left in L2 with hundreds of such programs about. Only a row
of more slots than the tile has, which compressed codes may contain, is read twice. Threads meet several
times per chunk, so the next chunks are copied to shared memory meanwhile.

Two runs give the same bits: each sum belongs to one program, in a fixed order. `sparse_decode` and
`gather_dot` are laid out so that on NVIDIA weights in bfloat16, and the same numbers in float32, do too.
"""

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae_kernels.slots import num_rows
from sae_kernels.triton.launch import INTERPRETING, Case, Shape, limited
from sae_kernels.triton.tiles import ROW_TYPES

_INTERPRETING = tl.constexpr(INTERPRETING)
# Two chunks under way while a third is used: 2 programs of 118 to 128 registers a thread on a
# multiprocessor have 64 KB under way in 75 KB of shared memory. Without it (1 stage) they have at most
# 32 KB, and none while they add; a fourth stage takes half as much shared memory again for no need.
STAGES = 3
_STAGES = tl.constexpr(STAGES)


class Tile(NamedTuple):
    """What a program holds at a time: [slots, columns], and the warps that share it."""

    slots: int
    columns: int
    warps: int


# The reach of a warp is 256 columns in 16-byte loads of bfloat16 (of float32, twice 128), so all slots of a
# column are in one thread whatever the dtype. 8 loads a thread under way take 58 to 64 registers.
DECODE = Tile(slots=8, columns=256, warps=1)

# 32 elements a thread. With 64 the compiler, which keeps the tile in float32, takes 147 to 220 registers
# for `decode_residual`: one program on a multiprocessor instead of two.
_ELEMENTS_PER_WARP = 1024


def tile_for(num_slots: int, max_slots: int) -> Tile:
    """A tile of all slots of a row (a power of two of them), and of as many columns as 8 warps can share.

    But at least 64 columns: of bfloat16 these are 128 bytes, a cache line."""
    slots = min(max(16, triton.next_power_of_2(num_slots)), max_slots)
    columns = min(256, max(64, 8 * _ELEMENTS_PER_WARP // slots))
    # At 256 slots 64 elements a thread: 16 warps would be 1024 threads on AMD, of too few registers each.
    return Tile(slots, columns, min(8, slots * columns // _ELEMENTS_PER_WARP))


def residual_tile(num_slots: int, compressed: bool) -> Tile:
    """Compressed rows differ in length, and those longer than the tile are read twice: room for half more."""
    return tile_for(num_slots + num_slots // 2 if compressed else num_slots, max_slots=256)


def residual_registers(tile: Tile) -> int | None:
    """128, so that two programs share a multiprocessor, unless a thread holds 64 elements."""
    return 128 if tile.slots * tile.columns <= _ELEMENTS_PER_WARP * tile.warps else None


def gather_tile(num_slots: int) -> Tile:
    """Rows of more than 64 slots take several tiles: nothing is gained from having all slots at once."""
    return tile_for(num_slots, max_slots=64)


def sparse_decode(values: Tensor, indices: Tensor, weight: Tensor, offsets: Tensor | None = None) -> Tensor:
    values, indices, weight = values.float().contiguous(), indices.contiguous(), _rows(weight)
    offsets = _whole(offsets)
    n, d = num_rows(indices, offsets), weight.shape[1]
    out = torch.empty(n, d, dtype=weight.dtype, device=weight.device)
    grid = (n * triton.cdiv(d, DECODE.columns),)
    with torch.cuda.device_of(weight):
        _sparse_decode[grid](
            *(out, values, indices, offsets, weight, _slots(indices), d, weight.stride(0)),
            SLOTS=DECODE.slots,
            COLUMNS=DECODE.columns,
            num_warps=DECODE.warps,
            num_stages=STAGES,
        )
    return out


def decode_residual(
    values: Tensor,
    indices: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    values, indices, weight = values.float().contiguous(), indices.contiguous(), _rows(weight)
    offsets = _whole(offsets)
    bias, target = bias.float().contiguous(), _rows(target)
    n, d = target.shape
    residual = torch.empty(n, d, dtype=target.dtype, device=target.device)
    loss = torch.empty(n, dtype=torch.float32, device=target.device)
    dots = torch.empty(indices.shape, dtype=torch.float32, device=target.device)
    tile = residual_tile(_mean_slots(indices, n), offsets is not None)
    with torch.cuda.device_of(target):
        _decode_residual[(n,)](
            *(residual, loss, dots, values, indices, offsets, weight, bias, target),
            *(_slots(indices), d, weight.stride(0), target.stride(0)),
            SLOTS=tile.slots,
            COLUMNS=tile.columns,
            WHOLE=offsets is None and _slots(indices) <= tile.slots,
            num_warps=tile.warps,
            num_stages=STAGES,
            **limited(residual_registers(tile)),
        )
    return residual, loss, dots


def gather_dot(rows: Tensor, indices: Tensor, weight: Tensor, offsets: Tensor | None = None) -> Tensor:
    rows, indices, weight = _rows(rows), indices.contiguous(), _rows(weight)
    offsets = _whole(offsets)
    n, d = rows.shape
    out = torch.empty(indices.shape, dtype=torch.float32, device=rows.device)
    tile = gather_tile(_mean_slots(indices, n))
    with torch.cuda.device_of(rows):
        _gather_dot[(n,)](
            *(out, rows, indices, offsets, weight, _slots(indices), d, rows.stride(0), weight.stride(0)),
            SLOTS=tile.slots,
            COLUMNS=tile.columns,
            num_warps=tile.warps,
            num_stages=STAGES,
        )
    return out


def _whole(offsets: Tensor | None) -> Tensor | None:
    return None if offsets is None else offsets.contiguous()


def _rows(matrix: Tensor) -> Tensor:
    """Rows may be apart, but not their elements."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _slots(indices: Tensor) -> int:
    """K; the kernels do not look at it where there are offsets."""
    return indices.shape[1] if indices.dim() == 2 else 0


def _mean_slots(indices: Tensor, n: int) -> int:
    return triton.cdiv(indices.numel(), max(1, n))


@triton.jit
def _sparse_decode(
    out, values, indices, offsets, weight, k, d, weight_stride, SLOTS: tl.constexpr, COLUMNS: tl.constexpr
):
    num_chunks = tl.cdiv(d, COLUMNS)
    row = (tl.program_id(0) // num_chunks).to(tl.int64)
    start, count = _slots_of_row(offsets, row, k)
    columns = (tl.program_id(0) % num_chunks) * COLUMNS + tl.arange(0, COLUMNS)
    total = _decode_columns(values, indices, weight, start, count, columns, d, weight_stride, SLOTS, COLUMNS)
    tl.store(out + row * d + columns, _rounded(total, out.dtype.element_ty), mask=columns < d)


@triton.jit
def _decode_residual(
    residual, loss, dots, values, indices, offsets, weight, bias, target,
    k, d, weight_stride, target_stride,
    SLOTS: tl.constexpr, COLUMNS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    start, count = _slots_of_row(offsets, row, k)
    residual += row * d
    target += row * target_stride
    if WHOLE:
        squares = _residual_of_one_tile(
            residual, dots, values, indices, weight, bias, target,
            start, count, d, weight_stride, SLOTS, COLUMNS,
        )  # fmt: skip
    else:
        if count <= SLOTS:
            squares = _residual_of_one_tile(
                residual, dots, values, indices, weight, bias, target,
                start, count, d, weight_stride, SLOTS, COLUMNS,
            )  # fmt: skip
        else:
            squares = tl.zeros([COLUMNS], tl.float32)
            for first in range(0, d, COLUMNS):
                columns = first + tl.arange(0, COLUMNS)
                total = _decode_columns(
                    values, indices, weight, start, count, columns, d, weight_stride, SLOTS, COLUMNS
                )
                _, squares = _subtract(residual, bias, target, total, squares, columns, d)
            tl.debug_barrier()  # below, threads read what others have stored
            _dot_row(dots, residual, indices, weight, start, count, d, weight_stride, SLOTS, COLUMNS)
    tl.store(loss + row, tl.sum(squares, axis=0))


@triton.jit
def _gather_dot(
    out, rows, indices, offsets, weight, k, d, rows_stride, weight_stride,
    SLOTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    start, count = _slots_of_row(offsets, row, k)
    rows += row * rows_stride
    _dot_row(out, rows, indices, weight, start, count, d, weight_stride, SLOTS, COLUMNS)


@triton.jit
def _slots_of_row(offsets, row, k):
    """The first slot of a row, int64, and the number of them."""
    if offsets is None:
        start = row * k
        count = k
    else:
        start = tl.load(offsets + row)
        count = (tl.load(offsets + row + 1) - start).to(tl.int32)
    return start, count


@triton.jit
def _decode_columns(
    values, indices, weight, start, count, columns, d, weight_stride,
    SLOTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Some columns of a row's reconstruction, float32."""
    total = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, count, SLOTS):
        slots = first + tl.arange(0, SLOTS)
        value = tl.load(values + start + slots, mask=slots < count, other=0.0).to(tl.float32)
        latents = tl.load(indices + start + slots, mask=slots < count, other=0).to(tl.int64)
        places = weight + latents[:, None] * weight_stride + columns[None, :]
        used = (value != 0)[:, None] & (columns < d)[None, :]  # rows of empty slots are not fetched
        tile = tl.load(places, mask=used, other=0.0).to(tl.float32)
        total += tl.sum(value[:, None] * tile, axis=0)
    return total


@triton.jit
def _residual_of_one_tile(
    residual, dots, values, indices, weight, bias, target, start, count, d, weight_stride,
    SLOTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Residual and products of a row whose slots fit one tile; returns its squares by column of a chunk."""
    slots = tl.arange(0, SLOTS)
    value = tl.load(values + start + slots, mask=slots < count, other=0.0).to(tl.float32)
    latents = tl.load(indices + start + slots, mask=slots < count, other=0).to(tl.int64)
    rows = weight + latents * weight_stride
    squares = tl.zeros([COLUMNS], tl.float32)
    products = tl.zeros([SLOTS, COLUMNS // 4], tl.float32)
    for first in tl.range(0, d, COLUMNS, num_stages=_STAGES):
        columns = first + tl.arange(0, COLUMNS)
        mask = (slots < count)[:, None] & (columns < d)[None, :]
        tile = tl.load(rows[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        total = tl.sum(value[:, None] * tile, axis=0)
        stored, squares = _subtract(residual, bias, target, total, squares, columns, d)
        products += _sum_fours(tile * stored[None, :], SLOTS, COLUMNS)
    tl.store(dots + start + slots, _sum_columns(products, SLOTS, COLUMNS // 4), mask=slots < count)
    return squares


@triton.jit
def _subtract(residual, bias, target, total, squares, columns, d):
    """Store some columns of the residual; returns them as stored, and squares of what was not yet rounded."""
    mask = columns < d
    wanted = tl.load(target + columns, mask=mask, other=0.0).to(tl.float32)
    exact = wanted - (total + tl.load(bias + columns, mask=mask, other=0.0).to(tl.float32))
    rounded = _rounded(exact, residual.dtype.element_ty)
    tl.store(residual + columns, rounded, mask=mask)
    return rounded.to(tl.float32), squares + exact * exact


@triton.jit
def _dot_row(
    out, row, indices, weight, start, count, d, weight_stride, SLOTS: tl.constexpr, COLUMNS: tl.constexpr
):
    """out[start + j] = <row, weight[indices[start + j]]> for the slots of one row."""
    for first_slot in range(0, count, SLOTS):
        slots = first_slot + tl.arange(0, SLOTS)
        latents = tl.load(indices + start + slots, mask=slots < count, other=0).to(tl.int64)
        rows = weight + latents * weight_stride
        products = tl.zeros([SLOTS, COLUMNS // 4], tl.float32)
        for first in tl.range(0, d, COLUMNS, num_stages=_STAGES):
            columns = first + tl.arange(0, COLUMNS)
            mask = (slots < count)[:, None] & (columns < d)[None, :]
            tile = tl.load(rows[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
            part = tl.load(row + columns, mask=columns < d, other=0.0).to(tl.float32)
            products += _sum_fours(tile * part[None, :], SLOTS, COLUMNS)
        tl.store(out + start + slots, _sum_columns(products, SLOTS, COLUMNS // 4), mask=slots < count)


@triton.jit
def _sum_fours(tile, SLOTS: tl.constexpr, COLUMNS: tl.constexpr):
    """[slots, columns] -> [slots, columns / 4]: sums of neighbours, which are in one thread."""
    even, odd = tl.split(tl.reshape(tile, [SLOTS, COLUMNS // 4, 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return (first + second) + (third + fourth)


@triton.jit
def _sum_columns(tile, SLOTS: tl.constexpr, COLUMNS: tl.constexpr):
    """[slots, columns] -> [slots], halves added to halves: tl.sum's order would depend on the layout."""
    if COLUMNS == 1:
        return tl.reshape(tile, [SLOTS])
    else:
        first, second = tl.split(tl.permute(tl.reshape(tile, [SLOTS, 2, COLUMNS // 2]), [0, 2, 1]))
        return _sum_columns(first + second, SLOTS, COLUMNS // 2)


@triton.jit
def _rounded(x, DTYPE: tl.constexpr):
    """float32 to DTYPE, ties to even; the interpreter would cut bfloat16 off."""
    if _INTERPRETING and tl.bfloat16 == DTYPE:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(DTYPE)


def cases(shape: Shape) -> list[Case]:
    """Weights and rows of either width, dense codes and compressed ones, any number of slots."""
    found = []
    for weight, compressed in product(ROW_TYPES, (False, True)):
        found.append(_case(_sparse_decode, weight, DECODE, compressed, {"out": weight, "values": "*fp32"}))
        for rows, tile in product(ROW_TYPES, _tiles(gather_tile)):
            types = {"out": "*fp32", "rows": rows, "rows_stride": "i32"}
            found.append(_case(_gather_dot, weight, tile, compressed, types))
        residual_tiles = _tiles(partial(residual_tile, compressed=compressed))
        for rows, tile in product(ROW_TYPES, residual_tiles):
            types = dict.fromkeys(("loss", "dots", "values", "bias"), "*fp32")
            types |= {"residual": rows, "target": rows, "target_stride": "i32"}
            found.append(_case(_decode_residual, weight, tile, compressed, types, WHOLE=not compressed))
            if not compressed and tile == residual_tiles[-1]:  # rows of more slots than fit
                found.append(_case(_decode_residual, weight, tile, compressed, types, WHOLE=False))
    return found


def _tiles(of: Callable[[int], Tile]) -> list[Tile]:
    """Every tile there is, that of the most slots last."""
    return sorted({of(num_slots) for num_slots in range(1, 1025)})


def _case(
    kernel: Any, weight: str, tile: Tile, compressed: bool, types: dict[str, str], **whole: bool
) -> Case:
    types = types | {"indices": "*i32", "weight": weight, "k": "i32", "d": "i32", "weight_stride": "i32"}
    constants: dict[str, Any] = {"SLOTS": tile.slots, "COLUMNS": tile.columns, **whole}
    if compressed:
        types["offsets"] = "*i64"
    else:
        constants["offsets"] = None
    return Case(
        kernel,
        types,
        constants,
        num_warps=tile.warps,
        num_stages=STAGES,
        vector_loads=True,
        register_limit=residual_registers(tile) if kernel is _decode_residual else None,
    )
