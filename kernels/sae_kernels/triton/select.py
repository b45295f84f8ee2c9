"""Exact selection of each row's k largest scores without keeping the scores: guess, filter, verify.

Any threshold that k or more of a row's scores reach leaves a set of candidates with the row's k largest
in it, so a cheap guess decides only how much work there is, never the result:

    guess    `row_threshold`: a high rank among the scores of a sample of the latents (`plan`)
    filter   the encoder keeps the scores that reach it, as packed keys, at most `capacity` per row
    verify   `merge`: the k largest of each row; a row with fewer than k candidates or more than fit fails
    recover  failed rows are encoded again over all latents; the device counts them (`fallback_rows`)

Keys order by score, then by smaller index; they are distinct, so the result does not depend on the order
in which candidates were appended. NaN is the largest score, as it is for torch.topk: it must surface.
Nothing here waits for the device, and there are no float atomics.
"""

import functools
import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae_kernels.triton.keys import merge, ordered, pack, score_of, unpack
from sae_kernels.triton.launch import INTERPRETING, Case, Shape
from sae_kernels.triton.recover import MAX_K, fallback_rows, recover

__all__ = [
    "MAX_K",
    "Plan",
    "cases",
    "fallback_rows",
    "merge",
    "pack",
    "plan",
    "recover",
    "row_threshold",
    "unpack",
]

RISK = 1e-6  # of a row to fail, either way, if the order of latents says nothing about their scores
SAMPLE_WIDTH = 8192  # a program of `_threshold` holds a row's sample in registers
MAX_STRIPES = 64  # beyond, the guess gets so coarse that more candidates cost more than a longer sample


@dataclass(frozen=True)
class Plan:
    """How candidates of k of f latents are found.

    Attributes:
        stripes: the sample is one latent of so many; 1 means no sample, everything is a candidate.
        rank: the guess is the sample's rank-th largest score.
        capacity: places for candidates per row, a power of two.
    """

    stripes: int
    rank: int
    capacity: int


@functools.cache
def plan(k: int, f: int) -> Plan:
    """The sample, rank and capacity for which a row fails with probability RISK or less.

    If every S-th latent is sampled and their order is exchangeable, the number of the row's k - 1 largest
    in the sample is at most binomial(k - 1, 1/S) in spread. The rank-th largest of the sample lies above
    the k-th largest score if `rank` of them are in there (too few candidates), and below the capacity-th
    largest if fewer than `rank` of those are (too many). About rank * S candidates are expected.
    """
    stripes = max(4, triton.next_power_of_2(triton.cdiv(f, SAMPLE_WIDTH)))
    if stripes > MAX_STRIPES:
        stripes = max(MAX_STRIPES, triton.next_power_of_2(triton.cdiv(f, 2 * SAMPLE_WIDTH)))
    rank = next(m for m in range(1, k + 1) if m == k or _tail(k - 1, 1 / stripes, m) <= RISK)
    if 2 * rank * stripes >= f:
        return Plan(1, 0, triton.next_power_of_2(max(f, 64)))
    capacity = triton.next_power_of_2(max(k, 64))
    while capacity < f and 1 - _tail(capacity, 1 / stripes, rank) > RISK:
        capacity *= 2
    return Plan(stripes, rank, capacity)


def _tail(n: int, p: float, m: int) -> float:
    """P(binomial(n, p) >= m)"""
    logs = (
        math.lgamma(n + 1)
        - math.lgamma(i + 1)
        - math.lgamma(n - i + 1)
        + i * math.log(p)
        + (n - i) * math.log1p(-p)
        for i in range(m)
    )
    return max(0.0, 1.0 - math.fsum(math.exp(log) for log in logs))


def row_threshold(sample: Tensor, rank: int, bias: Tensor, out: Tensor | None = None) -> Tensor:
    """The rank-th largest of sample + bias in each row, rounded down to 16 bits, which is all a guess needs.

    Args:
        sample: [R, S], the last dimension contiguous, or contiguous [M, R, S]; S is at most 2 * SAMPLE_WIDTH.
        bias: [S] or [M, S] float32.
        out: [R] or [M, R] float32 to write to, the last dimension contiguous.

    Returns:
        `out`; NaN, which every score reaches, if the sample has fewer than `rank` scores."""
    *many, rows, width = sample.shape
    out = torch.empty(*many, rows, dtype=torch.float32, device=sample.device) if out is None else out
    launch = threshold_launch(width)
    if rows:
        grid = (triton.cdiv(rows, launch["ROWS"]), *many)
        apart = out.stride(0) if many else rows
        _threshold[grid](sample, bias, out, rows, width, sample.stride(-2), apart, rank, **launch)
    return out


def threshold_launch(width: int) -> dict[str, int]:
    block = max(1024, triton.next_power_of_2(width))
    return {"ROWS": 32 if INTERPRETING else 1, "BLOCK": block, "num_warps": min(32, max(4, block // 512))}


@triton.jit
def _threshold(sample, bias, out, rows, width, stride, apart, rank, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    sae = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (col < width)[None, :]
    at = (sae * rows + row).to(tl.int64)[:, None] * stride + col[None, :]
    score = tl.load(sample + at, mask=inside, other=0.0).to(tl.float32)
    score += tl.load(bias + sae * width + col, mask=col < width, other=0.0)[None, :]
    # The largest 16-bit number that `rank` scores reach, bit by bit; -32768 belongs to a negative NaN.
    upper = tl.where(inside, ordered(score) >> 16, -32769)
    best = tl.full((ROWS,), -32768, tl.int32)
    for bit in range(15, -1, -1):
        trial = best + (1 << bit)
        count = tl.sum((upper >= trial[:, None]).to(tl.int32), axis=1)
        best = tl.where(count >= rank, trial, best)
    tl.store(out + sae * apart + row, score_of(best << 16), mask=row < rows)


def cases(shape: Shape) -> list[Case]:
    """Any width of a sample; on AMD it may be the rounded product of bfloat16 operands."""
    types = {"bias": "*fp32", "out": "*fp32", "rows": "i32", "width": "i32", "stride": "i32", "rank": "i32"}
    types["apart"] = "i32"
    found = []
    for block in sorted({threshold_launch(2**i)["BLOCK"] for i in range((2 * SAMPLE_WIDTH).bit_length())}):
        launch = threshold_launch(block)
        warps = launch.pop("num_warps")
        case = functools.partial(Case, _threshold, constants=launch, num_warps=warps, odd=("rank",))
        found.append(case(types={"sample": "*fp32"} | types))
        found.append(case(types={"sample": "*bf16"} | types, archs=("gfx942",)))
    return found
