"""The fallback of the encoders: rows whose candidates do not hold their k largest are encoded again.

It is exact for any scores and waits for nothing: how many rows failed is known to the device alone, so a
fixed number of programs shares whatever work there is. Groups of 16 rows are cut into segments of the
latents while there are few of them, so that one row still occupies the whole device.

The interpreter takes larger blocks and fewer programs: it runs them one after another, at a cost per step.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae_kernels.triton.keys import LOWEST, lower_bound, merge_launch, pack, store_largest
from sae_kernels.triton.launch import INTERPRETING, Case, Shape, limited
from sae_kernels.triton.tiles import ROW_TYPES

MAX_K = 512  # above it a row's short list is so long that sorting it by counting, k^2, takes over

GROUP = tl.constexpr(16)  # rows that are encoded together: the least that a matrix instruction takes
BLOCK_F = tl.constexpr(256 if INTERPRETING else 64)  # latents per step
DEPTH = 64  # of the product, per step
# Programs, and pieces of work there are while rows are few.
PROGRAMS = 4 if INTERPRETING else 512
MIN_PROGRAMS = 2 if INTERPRETING else 64  # of each of many SAEs
MAX_SEGMENTS = 128  # pieces of one group of rows
MERGED_KEYS = 4096  # of all segments of a row: one program of `_recover_merge` holds them in registers


def recover(x: Tensor, w: Tensor, b: Tensor, k: int, failed: Tensor, values: Tensor, indices: Tensor) -> None:
    """Write the exact codes of the rows that failed, whose number only the device knows.

    Products are exact for bfloat16 and float16 operands, IEEE float32 for float32 ones, and are summed in
    float32 over D in steps of DEPTH. So these rows may differ from what E1 gives the others: in the last
    bits, by the order in which a library sums; by TF32's rounding of float32 operands (2^-11), if torch may
    use it (`allow_tf32`, `set_float32_matmul_precision`); on AMD, where the library's product of narrow
    operands is rounded to their dtype, by that rounding.

    Args:
        x: [N, D], w: [F, D], of one dtype, contiguous. b: [F] float32.
        k: slots, at most MAX_K.
        failed: [N] int32.
        values, indices: [N, k], contiguous; written in the rows that failed.

    Or all with M before their shape, of M SAEs, each with programs of its own."""
    (n, d), f = x.shape[-2:], w.shape[-2]
    if n == 0:
        return
    launch, many = recover_launch(k), x.shape[:-2].numel()
    programs = max(MIN_PROGRAMS, PROGRAMS // many)
    pieces = max(programs, triton.cdiv(n, GROUP.value))
    rows, number = failed.new_empty(many * n), failed.new_empty(many)
    found = torch.empty(many * pieces * GROUP.value * k, dtype=torch.int64, device=x.device)
    room = many * programs * GROUP.value * launch["BUFFER"]
    buffers = torch.empty(room, dtype=torch.int64, device=x.device)
    _list_failed[(many,)](failed, rows, number, _counter(x.device), n, BLOCK=1024, num_warps=4)
    args = (rows, number, found, pieces, segments(k), n, f, k)
    registers = limited(recover_registers(x.element_size(), launch["num_warps"]))
    _recover[(programs, many)](x, w, b, buffers, *args, d, **launch, **registers)
    merged = recover_merge_launch(k)
    _recover_merge[(programs, many)](buffers, values, indices, *args, **merged)


def recover_launch(k: int) -> dict[str, int | bool]:
    buffer = triton.next_power_of_2(k + 2 * BLOCK_F.value)
    options: dict[str, int | bool] = {"BUFFER": buffer, "DEPTH": DEPTH}
    return options | {
        "ROWS": 16 if INTERPRETING else 2,  # with 1, Triton 3.6.0 fails to compile for AMD
        "UPCAST": INTERPRETING,
        "num_warps": 4 if buffer <= 512 else 8,
        "num_stages": 2,
    }


def recover_registers(operand_bytes: int, warps: int) -> int | None:
    """What float32 operands need on Triton 3.6.0 and 3.7.1 not to be spilled, found by trying."""
    if operand_bytes == 2:
        return None
    return 255 if warps == 4 else 224


def recover_merge_launch(k: int) -> dict[str, int]:
    keys = triton.next_power_of_2(segments(k) * k)
    # More warps than that spill: ptxas then aims at 40 to 80 registers.
    return {"KEYS": keys, **merge_launch(), "num_warps": min(16, max(4, keys // 256))}


def segments(k: int) -> int:
    return min(MAX_SEGMENTS, MERGED_KEYS // triton.next_power_of_2(k))


_counters: dict[torch.device, Tensor] = {}


def _counter(device: torch.device) -> Tensor:
    if device not in _counters:
        _counters[device] = torch.zeros((), dtype=torch.int64, device=device)
    return _counters[device]


def fallback_rows() -> dict[torch.device, Tensor]:
    """Rows encoded by the fallback since the process began: 0-dim int64 counters, each on its device."""
    return dict(_counters)


@triton.jit
def _list_failed(failed, rows, number, counter, n, BLOCK: tl.constexpr):
    """The failed rows of an SAE in order, numbered as those of all, and how many they are."""
    own = tl.program_id(0) * n
    total = tl.zeros((), tl.int32)
    for start in range(0, n, BLOCK):
        row = start + tl.arange(0, BLOCK)
        flag = tl.load(failed + own + row, mask=row < n, other=0)
        place = total + tl.cumsum(flag, 0) - flag
        tl.store(rows + own + place, own + row, mask=flag != 0)
        total += tl.sum(flag)
    tl.store(number + tl.program_id(0), total)
    tl.atomic_add(counter, total.to(tl.int64))


@triton.jit
def _cut(number, pieces, segments, f):
    """How the failed rows' work is cut: groups of rows, segments of the latents, latents per segment."""
    groups = tl.cdiv(number, GROUP)
    parts = tl.minimum(tl.minimum(pieces // tl.maximum(groups, 1), segments), tl.cdiv(f, BLOCK_F))
    return groups, parts, tl.cdiv(tl.cdiv(f, parts), BLOCK_F) * BLOCK_F


@triton.jit
def _shrink(buffer, count, bound, rows, k, BUFFER: tl.constexpr, ROWS: tl.constexpr):
    """Keep the k largest of each row's `count` keys, in their order; the counts and bounds after that."""
    slot = tl.arange(0, GROUP)
    col = tl.arange(0, BUFFER)[None, :]
    tl.debug_barrier()  # other threads of this program wrote what is read here
    for top in range(0, rows, ROWS):  # all at once would not fit into registers
        row = top + tl.arange(0, ROWS)
        same = row[:, None] == slot[None, :]
        filled = col < tl.sum(tl.where(same, count[None, :], 0), axis=1)[:, None]
        at = buffer + row[:, None] * BUFFER
        keys = tl.load(at + col, mask=filled, other=LOWEST)
        least = lower_bound(keys, k)
        keep = filled & (keys >= least[:, None])
        kept = keep.to(tl.int32)
        goal = tl.cumsum(kept, 1) - 1
        tl.debug_barrier()  # all threads have read
        tl.store(at + goal, keys, mask=keep)
        left = tl.sum(kept, axis=1)
        left = tl.sum(tl.where(same, left[:, None], 0), axis=0)
        count = tl.where((slot >= top) & (slot < top + ROWS), left, count)
        bound = tl.maximum(bound, tl.max(tl.where(same, least[:, None], LOWEST), axis=0))
    tl.debug_barrier()
    return count, bound


@triton.jit
def _recover(
    x, w, b, buffers, rows, number_of_rows, found, pieces, segments, n, f, k, d,
    BUFFER: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The k largest keys of 16 failed rows in one segment of the latents, one piece of work after another.

    Keys above the k-th largest so far are appended to each row's buffer, which is shrunk to k when full."""
    sae = tl.program_id(1)
    rows += sae * n
    number = tl.load(number_of_rows + sae)
    groups, parts, width = _cut(number, pieces, segments, f)
    buffer = buffers + (sae * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * (GROUP * BUFFER)
    slot = tl.arange(0, GROUP)
    col = tl.arange(0, BLOCK_F)
    depth = tl.arange(0, DEPTH)
    for piece in range(tl.program_id(0), groups * parts, tl.num_programs(0)):
        first = (piece // parts) * GROUP
        row = tl.load(rows + first + slot, mask=first + slot < number, other=0).to(tl.int64)
        begin = (piece % parts) * width
        end = tl.minimum(begin + width, f)
        count = tl.zeros((GROUP,), tl.int32)
        bound = tl.full((GROUP,), LOWEST, tl.int64)
        for start in range(begin, end, BLOCK_F):
            latent = start + col
            w_row = sae * f + latent
            scores = tl.zeros((GROUP, BLOCK_F), tl.float32)
            for step in range(0, d, DEPTH):
                at = step + depth
                x_mask = (first + slot < number)[:, None] & (at < d)[None, :]
                w_mask = (at < d)[:, None] & (latent < end)[None, :]
                left = tl.load(x + row[:, None] * d + at[None, :], mask=x_mask, other=0.0)
                right = tl.load(w + w_row.to(tl.int64)[None, :] * d + at[:, None], mask=w_mask, other=0.0)
                if UPCAST:
                    left, right = left.to(tl.float32), right.to(tl.float32)
                scores = tl.dot(left, right, scores, input_precision="ieee")
            scores += tl.load(b + w_row, mask=latent < end, other=0.0)[None, :]
            key = pack(scores, latent[None, :])
            new = (key > bound[:, None]) & (latent < end)[None, :] & (first + slot < number)[:, None]
            if tl.max(tl.max(new.to(tl.int32), axis=1), axis=0) > 0:
                one = new.to(tl.int32)
                place = count[:, None] + tl.cumsum(one, 1) - one
                tl.store(buffer + slot[:, None] * BUFFER + place, key, mask=new)
                count += tl.sum(one, axis=1)
            if (tl.max(count, axis=0) + BLOCK_F > BUFFER) | (start + BLOCK_F >= end):
                rows_here = tl.minimum(number - first, GROUP)
                count, bound = _shrink(buffer, count, bound, rows_here, k, BUFFER, ROWS)
        for start in range(0, k, BLOCK_F):
            at = start + col
            key = tl.load(
                buffer + slot[:, None] * BUFFER + at[None, :], mask=at[None, :] < count[:, None], other=LOWEST
            )
            place = sae.to(tl.int64) * pieces * GROUP + (first + slot).to(tl.int64) * parts + piece % parts
            goal = place[:, None] * k + at[None, :]
            tl.store(found + goal, key, mask=(at < k)[None, :] & (first + slot < number)[:, None])
        tl.debug_barrier()  # before the next piece of work writes to the buffer


@triton.jit
def _recover_merge(
    buffers, values, indices, rows, number_of_rows, found, pieces, segments, n, f, k,
    KEYS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The k largest of all segments of each failed row."""
    sae = tl.program_id(1).to(tl.int64)
    rows += sae * n
    found += sae * pieces * GROUP * k
    number = tl.load(number_of_rows + sae)
    _, parts, _ = _cut(number, pieces, segments, f)
    chosen = buffers + (sae * tl.num_programs(0) + tl.program_id(0)) * k
    col = tl.arange(0, KEYS)
    for place in range(tl.program_id(0), number, tl.num_programs(0)):
        row = tl.load(rows + place).to(tl.int64)
        start = found + parts.to(tl.int64) * k * place
        keys = tl.load(start + col, mask=col < parts * k, other=LOWEST)[None, :]
        bound = lower_bound(keys, k)
        keep = (keys >= bound[:, None]) & (keys > LOWEST)
        goal = tl.cumsum(keep.to(tl.int32), 1) - 1
        tl.debug_barrier()  # the last row's have been read
        tl.store(chosen + goal, keys, mask=keep)
        tl.debug_barrier()
        store_largest(chosen, k, values + row * k, indices + row * k, k, BLOCK, STEP)


def cases(shape: Shape) -> list[Case]:
    shared = {
        "rows": "*i32",
        "number_of_rows": "*i32",
        "found": "*i64",
        "pieces": "i32",
        "segments": "i32",
        "n": "i32",
        "f": "i32",
        "k": "i32",
    }
    outputs = {"values": "*fp32", "indices": "*i32"}
    listing = {"failed": "*i32", "rows": "*i32", "number": "*i32", "counter": "*i64", "n": "i32"}
    inputs = {"b": "*fp32", "buffers": "*i64", "d": "i32"} | shared
    found = [Case(_list_failed, listing, {"BLOCK": 1024})]
    for launch in _distinct(recover_launch):
        warps, stages = int(launch.pop("num_warps")), int(launch.pop("num_stages"))
        for operands in ROW_TYPES:
            types = inputs | {"x": operands, "w": operands}
            encoding = functools.partial(Case, _recover, types, launch, warps, stages)
            if operands == "*bf16":
                found.append(encoding(tensor_cores=True, archs=("sm_80", "gfx942")))
                found.append(encoding(archs=("sm_90",)))  # its matrix instructions take 64 rows, not 16
            else:
                found.append(encoding(register_limit=recover_registers(4, warps)))
    for launch in _distinct(recover_merge_launch):
        warps = int(launch.pop("num_warps"))
        found.append(Case(_recover_merge, {"buffers": "*i64"} | outputs | shared, launch, num_warps=warps))
    return found


def _distinct(launch: Callable[[int], dict[str, Any]]) -> list[dict[str, Any]]:
    """Every launch there is, for any number of slots."""
    found: list[dict[str, Any]] = []
    for k in range(1, MAX_K + 1):
        if launch(k) not in found:
            found.append(launch(k))
    return found
