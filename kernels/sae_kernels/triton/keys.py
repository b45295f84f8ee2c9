"""Packed keys: a score and its index in one int64, and the k largest of each row's keys.

Keys order by score, then by smaller index; they are distinct, so what is selected does not depend on the
order in which they were written. NaN is the largest score, as it is for torch.topk: it must surface.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae_kernels.triton.launch import INTERPRETING, Case, Shape

LOWEST = tl.constexpr(-(1 << 63))  # below every key


@triton.jit
def ordered(score):
    """int32 of the order of the float32 score; 0.0 and -0.0 are equal, NaN is above everything."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    return tl.where(score != score, 0x7FFFFFFF, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits))


@triton.jit
def score_of(order):
    """The float32 whose `ordered` it is."""
    return tl.where(order < 0, order ^ 0x7FFFFFFF, order).to(tl.float32, bitcast=True)


@triton.jit
def pack(score, index):
    """int64 key of a float32 score and an int32 index: the larger score is larger, then the smaller index."""
    return (ordered(score).to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)


@triton.jit
def unpack(key):
    """score, index"""
    return score_of((key >> 32).to(tl.int32)), 0x7FFFFFFF - (key & 0x7FFFFFFF).to(tl.int32)


def merge(
    keys: Tensor, counts: Tensor, k: int, out: tuple[Tensor, Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest keys of each row, in order.

    Args:
        keys: [R, capacity] int64 of `pack`, distinct within a row, contiguous; the first counts[r] count.
        counts: [R] int32, of all candidates, also of those that found no place.
        out: what to write to; the returned three.

    Returns:
        values [R, k] float32: scores, 0 where they are negative.
        indices [R, k] int32.
        failed [R] int32: 1 where there were fewer than k candidates or more than places, else 0. The codes
            of such a row are zeros until `recover` writes them."""
    rows, capacity = keys.shape
    if out is None:
        values = torch.empty(rows, k, dtype=torch.float32, device=keys.device)
        out = values, torch.empty_like(values, dtype=torch.int32), counts.new_empty(rows)
    if rows:
        _merge[(rows,)](keys, counts, *out, capacity, k, **merge_launch())
    return out


def merge_launch() -> dict[str, int]:
    if INTERPRETING:  # at a cost per step, whatever its size
        return {"BLOCK": 256, "STEP": 256, "num_warps": 4}
    return {"BLOCK": 128, "STEP": 32, "num_warps": 4}


@triton.jit
def _merge(keys, counts, values, indices, failed, capacity, k, BLOCK: tl.constexpr, STEP: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(counts + row)
    fails = (count < k) | (count > capacity)
    tl.store(failed + row, fails.to(tl.int32))
    if fails:
        for start in range(0, k, BLOCK):
            slot = start + tl.arange(0, BLOCK)
            tl.store(values + row * k + slot, tl.zeros((BLOCK,), tl.float32), mask=slot < k)
            tl.store(indices + row * k + slot, tl.zeros((BLOCK,), tl.int32), mask=slot < k)
    else:
        store_largest(keys + row * capacity, count, values + row * k, indices + row * k, k, BLOCK, STEP)


@triton.jit
def store_largest(keys, count, values, indices, k, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """Write the k largest of `count` distinct keys: the slot of each is the number of larger ones."""
    for start in range(0, count, BLOCK):
        mine = start + tl.arange(0, BLOCK)
        key = tl.load(keys + mine, mask=mine < count, other=LOWEST)
        larger = tl.zeros((BLOCK, STEP), tl.int32)
        for begin in range(0, count, STEP):
            other = begin + tl.arange(0, STEP)
            rival = tl.load(keys + other, mask=other < count, other=LOWEST)
            larger += (rival[None, :] > key[:, None]).to(tl.int32)
        slot = tl.sum(larger, axis=1)
        score, index = unpack(key)
        chosen = (mine < count) & (slot < k)
        tl.store(values + slot, tl.where(score <= 0.0, 0.0, score), mask=chosen)  # NaN is kept
        tl.store(indices + slot, index, mask=chosen)


@triton.jit
def lower_bound(keys, k):
    """int64 [R] that the k largest keys of each row of keys [R, T], but no others, reach.

    LOWEST in a row with at most k keys above it. Bits are set from the top while k keys still reach it."""
    bound = tl.full((keys.shape[0],), LOWEST, tl.int64)
    reach = tl.sum((keys > LOWEST).to(tl.int32), axis=1)
    open_rows = tl.max((reach > k).to(tl.int32), axis=0)
    bit = tl.full((), 63, tl.int64)
    while (bit >= 0) & (open_rows > 0):
        trial = bound + (tl.full((keys.shape[0],), 1, tl.int64) << bit)  # 1 << 63 takes LOWEST to 0
        count = tl.sum((keys >= trial[:, None]).to(tl.int32), axis=1)
        bound = tl.where(count >= k, trial, bound)
        reach = tl.where(count >= k, count, reach)
        open_rows = tl.max((reach > k).to(tl.int32), axis=0)
        bit -= 1
    return bound


def cases(shape: Shape) -> list[Case]:
    types = {"keys": "*i64", "counts": "*i32", "values": "*fp32", "indices": "*i32", "failed": "*i32"}
    types |= {"capacity": "i32", "k": "i32"}
    launch = merge_launch()
    warps = launch.pop("num_warps")
    return [Case(_merge, types, launch, num_warps=warps)]
