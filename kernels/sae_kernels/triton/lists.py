"""Sums over each latent's rows on a GPU: gradients of the weights without atomics, in a fixed order.

Slots are sorted by latent once per call. What a latent needs is then a list of (row, value, gradient
of its pre-activation), and one program adds the rows of one list, columns by columns: a warp reads 256
columns of several rows at once and adds them within its threads. A list of more than PIECE rows would be
the tail on which everything waits, so it is cut into pieces of that length; other programs sum those to
float32 rows in scratch memory, and the latent's program adds these rows. How many pieces there are
depends on the codes, and the host does not wait to hear it: there is room for the most that M slots can
give, and what is not needed is neither written nor read.

`adam` continues from these sums to the next weights without writing them.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae_kernels.latents import Counters, DeadGrads, Weight
from sae_kernels.slots import row_of_slot, slots_by_latent
from sae_kernels.triton.formats import PLAIN, SPLIT, STORED_TYPES, load_master, master_of
from sae_kernels.triton.launch import Case, Shape
from sae_kernels.triton.tiles import NUM_STAGES, PIECE, ROW_TYPES, Tile, case, column_tile

LIST_BLOCK = 512
SCAN_BLOCK = 128


@dataclass
class Lists:
    """The slots that are not empty, in the order of their latents; latent f has starts[f] to starts[f + 1].

    Attributes:
        starts: [F + 1] int64.
        rows: [M] int32. z, dz: [M] float32 (dz only where gradients are wanted); all three are undefined
            from starts[F] on.
        first_piece: [F] int64, the number of the first piece of a latent whose list is cut.
        owner: [number of pieces at most] int64, the latent whose piece it is, F for none.
        row_used: [N] int8, 1 for a row with a slot that is not empty.
        broken: [SAEs] int32, not 0 once something that goes into a gradient has been found not to be finite.

    Of several SAEs, the first F / SAEs latents and the first N / SAEs rows are those of the first.
    """

    starts: Tensor
    rows: Tensor
    z: Tensor
    dz: Tensor | None
    first_piece: Tensor
    owner: Tensor
    row_used: Tensor
    broken: Tensor

    @property
    def num_latents(self) -> int:
        return len(self.starts) - 1


def list_slots(
    values: Tensor,
    indices: Tensor,
    n: int,
    d_sae: int,
    offsets: Tensor | None,
    dots: Tensor | None,
    scale: float,
    many: int = 1,
) -> Lists:
    """Sorts the slots; dz = scale * dots. n, d_sae: rows and latents of all SAEs, which are `many`."""
    order, starts = slots_by_latent(values, indices, d_sae)
    m, device = values.numel(), values.device
    lengths = starts.diff()
    pieces = torch.where(lengths > PIECE, (lengths + (PIECE - 1)) // PIECE, 0)
    past = pieces.cumsum(0)
    # A list of c > PIECE rows has at most 2c / (PIECE + 1) pieces.
    numbers = torch.arange(2 * m // (PIECE + 1), device=device)
    room = 16 * triton.cdiv(4 * many, 16)  # of `broken` in bytes; kernels are compiled for aligned pointers
    flags = torch.zeros(room + n, dtype=torch.int8, device=device)
    lists = Lists(
        starts=starts,
        rows=torch.empty(m, dtype=torch.int32, device=device),
        z=torch.empty(m, dtype=torch.float32, device=device),
        dz=None if dots is None else torch.empty(m, dtype=torch.float32, device=device),
        first_piece=past - pieces,
        owner=torch.searchsorted(past, numbers, right=True),
        row_used=flags[room:],
        broken=flags[: 4 * many].view(torch.int32),
    )
    if m:
        dots = None if dots is None else dots.float().contiguous()
        of_slot = None if offsets is None else row_of_slot(indices, offsets)
        _list_slots[(triton.cdiv(m, LIST_BLOCK),)](
            *(order, values.float().contiguous(), dots, of_slot, starts),
            *(lists.rows, lists.z, lists.dz, lists.row_used, lists.broken, float(scale), d_sae),
            *(1 if offsets is not None else indices.shape[1], n // many),
            BLOCK=LIST_BLOCK,
            num_warps=4,
            num_stages=NUM_STAGES,
        )
    return lists


def sum_pieces(lists: Lists, a: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Sums of z * a and dz * b over each piece of the lists that are cut: [pieces, D] float32 each."""
    d, tile = a.shape[1], column_tile(a.shape[1])
    part_a = torch.empty(len(lists.owner), d, dtype=torch.float32, device=a.device)
    part_b = None if b is None else torch.empty_like(part_a)
    if part_a.numel():
        _sum_pieces[(len(lists.owner), triton.cdiv(d, tile.columns))](
            *(a, b, lists.rows, lists.z, lists.dz, lists.starts, lists.first_piece, lists.owner),
            *(part_a, part_b, lists.num_latents, d),
            PIECE=PIECE,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            num_warps=tile.warps,
            num_stages=NUM_STAGES,
        )
    return part_a, part_b


def scan(lists: Lists, counters: Counters | None = None) -> tuple[Tensor, Tensor]:
    """Sums over each latent's list of dz, which is d_b_enc, and of z * dz; updates counters, if any.

    The sum of z * dz is <d_w_dec, w_dec>, because dz = scale * <g, w_dec>: the part that stretches w_dec.
    """
    f, many = lists.num_latents, len(lists.broken)
    d_b_enc = torch.empty(f, dtype=torch.float32, device=lists.starts.device)
    along = torch.empty_like(d_b_enc)
    statistics: tuple[Any, ...] = (None, None, None, None, 0)
    if counters is not None:
        statistics = (counters.counts, counters.sums, counters.maxima, counters.last_fired, counters.tokens)
    _scan[(f // many, many)](
        *(lists.z, lists.dz, lists.starts, d_b_enc, along, lists.broken),
        *statistics,
        BLOCK=SCAN_BLOCK,
        num_warps=1,
        num_stages=NUM_STAGES,
    )
    return d_b_enc, along


def add_dead(
    dead: DeadGrads, w_dec: Weight, lists: Lists, d_b_enc: Tensor, along: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Adds the other loss to d_b_enc and along; latent -> row of `dead` or -1 [F], and rows for the rest."""
    d = w_dec.value.shape[-1]
    tile, d_sae = column_tile(d), lists.num_latents // len(lists.broken)
    lookup = torch.full((lists.num_latents,), -1, dtype=torch.int32, device=d_b_enc.device)
    rows_dec, rows_enc, b_enc = (t.float().contiguous() for t in (dead.w_dec, dead.w_enc, dead.b_enc))
    if len(dead.latents):
        value, remainder, form = master_of(w_dec)
        _add_dead_rows[(len(dead.latents),)](
            *(dead.latents.contiguous(), rows_dec, rows_enc, b_enc, value, remainder),
            *(lookup, d_b_enc, along, lists.broken, d_sae, d),
            DEC=form,
            COLUMNS=tile.columns,
            num_warps=tile.warps,
            num_stages=NUM_STAGES,
        )
    return lookup, rows_dec, rows_enc


@triton.jit
def _list_slots(
    order, values, dots, row_of_slot, starts, rows, z, dz, row_used, broken, scale, d_sae, k, n,
    BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    listed = at < tl.load(starts + d_sae)
    slot = tl.load(order + at, mask=listed, other=0)
    row = slot // k  # k is 1 with row_of_slot
    if row_of_slot is not None:
        row = tl.load(row_of_slot + row, mask=listed, other=0)
    value = tl.load(values + slot, mask=listed, other=0).to(tl.float32)
    tl.store(rows + at, row.to(tl.int32), mask=listed)
    tl.store(z + at, value, mask=listed)
    # Programs may store to one row or flag at once, but all store the same.
    tl.store(row_used + row, (at * 0 + 1).to(tl.int8), mask=listed)
    finite = tl.abs(value) < float("inf")
    if dots is not None:
        gradient = scale * tl.load(dots + slot, mask=listed, other=0).to(tl.float32)
        tl.store(dz + at, gradient, mask=listed)
        finite = finite & (tl.abs(gradient) < float("inf"))
    flag(broken + row.to(tl.int32) // n, finite | ~listed)


@triton.jit
def flag(broken, fine):
    """Stores 1 to `broken` if a lane of `fine` is false; lanes do not wait for each other."""
    tl.store(broken + fine.to(tl.int32) * 0, 1, mask=~fine)


@triton.jit
def sum_list(a, b, rows, z, dz, begin, end, total_a, total_b, columns, d, ROWS: tl.constexpr):
    """total_a + sum of z * a, total_b + sum of dz * b, over some slots of a list, in their order."""
    for start in range(begin, end, ROWS):
        at = start + tl.arange(0, ROWS)
        listed = at < end
        place = tl.load(rows + at, mask=listed, other=0).to(tl.int64)[:, None] * d + columns[None, :]
        mask = listed[:, None] & (columns < d)[None, :]
        weight = tl.load(z + at, mask=listed, other=0)
        total_a += tl.sum(weight[:, None] * tl.load(a + place, mask=mask, other=0).to(tl.float32), axis=0)
        if b is not None:
            weight = tl.load(dz + at, mask=listed, other=0)
            total_b += tl.sum(weight[:, None] * tl.load(b + place, mask=mask, other=0).to(tl.float32), axis=0)
    return total_a, total_b


@triton.jit
def sum_latent(
    a,
    b,
    rows,
    z,
    dz,
    begin,
    end,
    piece,
    part_a,
    part_b,
    columns,
    d,
    PIECE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sums over a latent's list, of its rows or of its pieces' sums: z * a and dz * b, [COLUMNS] each."""
    total_a = tl.zeros([COLUMNS], tl.float32)
    total_b = tl.zeros([COLUMNS], tl.float32)
    length = end - begin
    cut = length > PIECE
    total_a, total_b = sum_list(
        a, b, rows, z, dz, begin, tl.where(cut, begin, end), total_a, total_b, columns, d, ROWS
    )
    last = piece + tl.where(cut, (length + PIECE - 1) // PIECE, 0)
    for start in range(piece, last, ROWS):
        at = start + tl.arange(0, ROWS)
        place = at[:, None] * d + columns[None, :]
        mask = (at < last)[:, None] & (columns < d)[None, :]
        total_a += tl.sum(tl.load(part_a + place, mask=mask, other=0), axis=0)
        if b is not None:
            total_b += tl.sum(tl.load(part_b + place, mask=mask, other=0), axis=0)
    return total_a, total_b


@triton.jit
def _sum_pieces(
    a,
    b,
    rows,
    z,
    dz,
    starts,
    first_piece,
    owner,
    part_a,
    part_b,
    d_sae,
    d,
    PIECE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    piece = tl.program_id(0).to(tl.int64)
    latent = tl.load(owner + piece)
    if latent < d_sae:
        columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        begin = tl.load(starts + latent) + (piece - tl.load(first_piece + latent)) * PIECE
        end = tl.minimum(begin + PIECE, tl.load(starts + latent + 1))
        none = tl.zeros([COLUMNS], tl.float32)
        total_a, total_b = sum_list(a, b, rows, z, dz, begin, end, none, none, columns, d, ROWS)
        place = piece * d + columns
        tl.store(part_a + place, total_a, mask=columns < d)
        if b is not None:
            tl.store(part_b + place, total_b, mask=columns < d)


@triton.jit(do_not_specialize=["tokens"])
def _scan(
    z, dz, starts, d_b_enc, along, broken, counts, sums, maxima, last_fired, tokens, BLOCK: tl.constexpr
):
    sae = tl.program_id(1)
    latent = sae.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    begin, end = tl.load(starts + latent), tl.load(starts + latent + 1)
    bias, product = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    fired, units = tl.zeros([BLOCK], tl.int64), tl.zeros([BLOCK], tl.int64)
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(z + at, mask=at < end, other=0)
        gradient = tl.load(dz + at, mask=at < end, other=0)
        bias += gradient
        product += value * gradient
        if counts is not None:
            value = tl.where(tl.abs(value) < float("inf"), value, 0.0)
            fired += (value != 0).to(tl.int64)
            units += fixed_point(value)
            largest = tl.maximum(largest, tl.where(at < end, value, float("-inf")))
    tl.store(d_b_enc + latent, tl.sum(bias))
    tl.store(along + latent, tl.sum(product))
    flag(broken + sae, (tl.abs(bias) < float("inf")) & (tl.abs(product) < float("inf")))
    if counts is not None:
        times = tl.sum(fired)
        tl.store(counts + latent, tl.load(counts + latent) + times)
        tl.store(sums + latent, tl.load(sums + latent) + tl.sum(units))
        tl.store(maxima + latent, tl.maximum(tl.load(maxima + latent), tl.max(largest)))
        tl.store(last_fired + latent, tl.zeros([], tl.int64) + tokens, mask=times > 0)


@triton.jit
def fixed_point(value):
    """value in units of 2^-20, rounded to the nearest, ties to even; the product is exact in float32."""
    magnitude = tl.abs(value) * 1048576.0
    # From 2^23 on float32 has no fractions; adding it to less rounds them away.
    whole = tl.where(magnitude < 8388608.0, (magnitude + 8388608.0) - 8388608.0, magnitude).to(tl.int64)
    return tl.where(value < 0, -whole, whole)


@triton.jit
def _add_dead_rows(
    latents, rows_dec, rows_enc, b_enc, value, extra, lookup, d_b_enc, along, broken, d_sae, d,
    DEC: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0).to(tl.int64)
    latent = tl.load(latents + number)
    broken += latent // d_sae
    product = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, d, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        mask = columns < d
        dec = tl.load(rows_dec + number * d + columns, mask=mask, other=0).to(tl.float32)
        enc = tl.load(rows_enc + number * d + columns, mask=mask, other=0).to(tl.float32)
        product += dec * load_master(value, extra, latent * d + columns, mask, DEC)
        flag(broken, (tl.abs(dec) < float("inf")) & (tl.abs(enc) < float("inf")))
    bias = tl.load(d_b_enc + latent) + tl.load(b_enc + number).to(tl.float32)
    tl.store(d_b_enc + latent, bias)
    tl.store(along + latent, tl.load(along + latent) + tl.sum(product))
    tl.store(lookup + latent, number.to(tl.int32))
    flag(broken, tl.abs(bias) < float("inf"))


def cases(shape: Shape) -> list[Case]:
    tile, flat = column_tile(shape.d), Tile(1, 1, 4)
    block, scan_block = {"BLOCK": LIST_BLOCK}, {"BLOCK": SCAN_BLOCK}
    found = []
    for dots in ({}, {"dots": None, "dz": None}):
        found += [
            case(_list_slots, flat, block, row_of_slot=None, **dots),
            case(_list_slots, flat, block | {"k": 1}, **dots),
        ]
    alone = dict.fromkeys(("b", "part_b", "dz"))
    for rows in ROW_TYPES:
        found += [
            case(_sum_pieces, tile, {}, a=rows, b=rows),
            case(_sum_pieces, tile, {}, a=rows, **alone),
        ]
    found += [
        case(_sum_pieces, column_tile(1), {}, a="*fp32", **alone),
        case(_scan, Tile(1, 1, 1), scan_block, tokens="i32"),
        case(_scan, Tile(1, 1, 1), scan_block, tokens="i64"),
        case(
            _scan,
            Tile(1, 1, 1),
            scan_block,
            counts=None,
            sums=None,
            maxima=None,
            last_fired=None,
            tokens="i32",
        ),
    ]
    for form in (PLAIN, SPLIT):
        value, extra = STORED_TYPES[form]
        found.append(case(_add_dead_rows, tile, {"DEC": form}, value=value, extra=extra))
    return found
