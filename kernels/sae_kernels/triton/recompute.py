"""The N*k largest activations of a batch by brute force: what `batch_topk_encode` does if its guess failed.

`x @ w.T` is multiplied anew in each of six passes, and nothing of it is kept. Four passes count how often
each value of 8 bits occurs among the activations whose higher bits are those of the N*k-th largest
one, which is thereby known 8 bits further; integer counts are exact in any order. The fifth counts what each
row has above and at that activation, from which follow the offsets and how many of the equals each row may
keep, the first rows first. The sixth writes.

A program owns some rows and walks over all latents in order, so every row is written in the order of its
latents. All passes multiply with the same instructions, so they all see the same bits. Each one is launched
whether it is needed or not, and returns at once if `failed` is 0: no one waits for the device to say so.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae_kernels.slots import offsets_of
from sae_kernels.triton.launch import INTERPRETING, Case, Shape
from sae_kernels.triton.tiles import ROW_TYPES

_INTERPRETING = tl.constexpr(INTERPRETING)
HISTOGRAM, COUNT, WRITE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


def largest_of_batch(
    x: Tensor, w: Tensor, bias: Tensor, k: int, failed: Tensor, values: Tensor, indices: Tensor
) -> Tensor:
    """Write the codes of `batch_topk_encode` over values and indices, and return their offsets, if `failed`.

    x, w and bias are contiguous, and failed is a 0-dim bool on the device. If it is false, nothing is written
    and the offsets are zeros."""
    n, f = len(x), len(w)
    how = recompute_launch(x.element_size())
    seen = torch.zeros(4, 256, dtype=torch.int64, device=x.device)
    larger, equal = (torch.zeros(n, dtype=torch.int64, device=x.device) for _ in range(2))
    offsets, keep = torch.zeros(n + 1, dtype=torch.int64, device=x.device), equal
    for mode, known in [*((HISTOGRAM, i) for i in range(4)), (COUNT, 4), (WRITE, 4)]:
        if mode == WRITE:
            left = n * k - larger.sum()  # of the equals, for the first rows
            before = equal.cumsum(0) - equal
            keep = torch.minimum((left - before).clamp_min(0), equal) * failed
            offsets = offsets_of(larger + keep)
        _recompute[(triton.cdiv(n, how["ROWS"]),)](
            *(x, w, bias, failed, seen, larger, equal, keep, offsets, values, indices),
            *(n, f, x.shape[1], n * k, known),
            MODE=mode,
            **how,
        )
    return offsets


def recompute_launch(operand_bytes: int) -> dict[str, int]:
    if operand_bytes > 2:  # no matrix instructions on NVIDIA: operands and sums are all in registers
        return {"ROWS": 32, "LATENTS": 64, "DEPTH": 32, "num_warps": 8, "num_stages": 2}
    return {"ROWS": 64, "LATENTS": 64, "DEPTH": 64, "num_warps": 4, "num_stages": 3}


@triton.jit
def _least(seen, known, wanted):
    """The highest 8 * known bits of the wanted-th largest activation, all 31 of them if known is 4."""
    bins = tl.arange(0, 256)
    prefix = tl.zeros((), tl.int64)
    for done in range(0, known):
        count = tl.load(seen + done * 256 + bins)
        reach = tl.cumsum(count, 0, reverse=True)  # how many have this digit or a larger one
        digit = tl.sum((reach >= wanted).to(tl.int32), 0) - 1
        wanted -= tl.sum(tl.where(bins > digit, count, 0), 0)
        prefix = prefix * 256 + digit
    return tl.where(known == 4, prefix >> 1, prefix).to(tl.int32)  # of 32 bits, the last is always 0


@triton.jit
def _recompute(
    x,
    w,
    bias,
    failed,
    seen,
    larger,
    equal,
    keep,
    offsets,
    values,
    indices,
    n,
    f,
    d,
    num_slots,
    known,
    MODE: tl.constexpr,
    ROWS: tl.constexpr,
    LATENTS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    if tl.load(failed) == 0:
        return
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    depth = tl.arange(0, DEPTH)
    some_latents = tl.arange(0, LATENTS)
    least = _least(seen, known, tl.zeros((), tl.int64) + num_slots)
    bins = tl.arange(0, 256)
    histogram = tl.zeros((256,), tl.int32)
    num_larger = tl.zeros((ROWS,), tl.int32)
    num_equal = tl.zeros((ROWS,), tl.int32)
    if MODE == WRITE:
        may_keep = tl.load(keep + row, mask=row < n, other=0).to(tl.int32)
        begin = tl.load(offsets + row, mask=row < n, other=0).to(tl.int32)  # below num_slots, an int32
    for first in range(0, f, LATENTS):
        latent = first + some_latents
        sums = tl.zeros((ROWS, LATENTS), tl.float32)
        x_at = x + row.to(tl.int64)[:, None] * d + depth[None, :]
        w_at = w + latent.to(tl.int64)[None, :] * d + depth[:, None]
        for start in range(0, d, DEPTH):
            a = tl.load(x_at, mask=(row < n)[:, None] & (start + depth < d)[None, :], other=0.0)
            b = tl.load(w_at, mask=(latent < f)[None, :] & (start + depth < d)[:, None], other=0.0)
            if _INTERPRETING:
                a, b = a.to(tl.float32), b.to(tl.float32)
            sums = tl.dot(a, b, sums, input_precision="ieee")
            x_at += DEPTH
            w_at += DEPTH
        pre = sums + tl.load(bias + latent, mask=latent < f, other=0.0)[None, :]
        inside = (row < n)[:, None] & (latent < f)[None, :]
        bits = tl.where(pre <= 0, 0.0, pre).to(tl.int32, bitcast=True)
        bits = tl.where(pre != pre, 0x7FC00000, bits)  # 31 bits: the sign is always 0
        if MODE == HISTOGRAM:
            same = inside & ((bits >> (31 - 8 * known)) == least)
            digit = (((bits << 1) >> (24 - 8 * known)) & 255).to(tl.int32)
            # One tensor, for two could be reordered in two ways: 256 is what is not counted.
            flat = tl.reshape(tl.where(same, digit, 256), (ROWS * LATENTS,), can_reorder=True)
            histogram += tl.histogram(flat & 255, 256, mask=flat < 256)
        else:
            is_larger = inside & (bits > least)
            is_equal = inside & (bits == least)
            if MODE == WRITE:
                counts = tl.cumsum(
                    is_larger.to(tl.int32) + (is_equal.to(tl.int32) << 16), 1
                )  # both in one scan
                rank = num_equal[:, None] + (counts >> 16)
                chosen = is_larger | (is_equal & (rank <= may_keep[:, None]))
                before = begin + num_larger - 1
                slot = before[:, None] + (counts & 0xFFFF) + tl.minimum(rank, may_keep[:, None])
                chosen = chosen & (slot < num_slots)
                tl.store(values + slot, bits.to(tl.float32, bitcast=True), mask=chosen)
                column = tl.broadcast_to(latent[None, :], (ROWS, LATENTS))
                tl.store(indices + slot, column, mask=chosen)
            num_larger += tl.sum(is_larger.to(tl.int32), 1)
            num_equal += tl.sum(is_equal.to(tl.int32), 1)
    if MODE == HISTOGRAM:
        tl.atomic_add(seen + known * 256 + bins, histogram.to(tl.int64), sem="relaxed")
    elif MODE == COUNT:
        tl.store(larger + row, num_larger.to(tl.int64), mask=row < n)
        tl.store(equal + row, num_equal.to(tl.int64), mask=row < n)


def cases(shape: Shape) -> list[Case]:
    types = {
        **dict.fromkeys(("bias", "values"), "*fp32"),
        **dict.fromkeys(("seen", "larger", "equal", "keep", "offsets"), "*i64"),
        **dict.fromkeys(("n", "f", "d", "num_slots", "known"), "i32"),
        "failed": "*i1",
        "indices": "*i32",
    }
    found = []
    for operands, operand_bytes in zip(ROW_TYPES, (2, 4), strict=True):
        how = recompute_launch(operand_bytes)
        warps, stages = how.pop("num_warps"), how.pop("num_stages")
        for mode in (HISTOGRAM, COUNT, WRITE):
            found.append(
                Case(
                    _recompute,
                    types | {"x": operands, "w": operands},
                    how | {"MODE": mode.value},
                    num_warps=warps,
                    num_stages=stages,
                    tensor_cores=operand_bytes == 2,
                    odd=("known",),
                )
            )
    return found
