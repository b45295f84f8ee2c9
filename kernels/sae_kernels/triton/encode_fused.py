"""Encoder E2: the top k of each row with the filter inside the product, which never leaves the registers.

    sample    the product with every S-th latent -> each row's guess of its k-th largest score
    product   persistent tiles; of a finished tile only scores that reach their row's guess are written,
              as packed keys appended to the row's candidates
    merge     the k largest candidates of each row; rows whose guess was wrong are encoded again (`select`)

Positions are reserved with integer atomics, so candidates lie in any order. The keys order them, so
the result has one order. Accumulators start at the bias: nothing is added later, and no registers hold it.

What a tile costs beyond its product is the test of each element, of which one in a hundred passes. On NVIDIA
that test is inline PTX: a compare and a branch, 4 instructions with what lets the branch converge again;
only what passes runs the rest. Written in Triton, which computes every position and address of a tile
whether it is needed or not, it takes about ten times as many, and runs on AMD and in the interpreter as well.
"""

import functools
import math
from itertools import product
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sae_kernels.triton.compress import multiply
from sae_kernels.triton.launch import INTERPRETING, Case, Shape
from sae_kernels.triton.select import Plan, merge, pack, recover, row_threshold

_INTERPRETING = tl.constexpr(INTERPRETING)
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)

RISK = 1e-5  # of a row to be encoded again
SAMPLE_WIDTH = 8192  # latents that `row_threshold` takes at once
SAMPLE_ELEMENTS = 4 << 20  # scores of the sample at a time: 16 MiB, which stay in the L2 cache
GROUP = 8  # tiles of rows that share the weights they read while those are in the L2 cache

# $0 nothing, $1 score, $2 guess, $3 row, $4 latent, $5 counts, $6 keys, $7 places per row.
# The key is that of `keys.pack`: `ordered` bits of the score above 0x7fffffff - latent.
_APPEND = tl.constexpr("""{
    .reg .pred  hit, fits, nan;
    .reg .b32   place, bits, flip;
    .reg .b64   at, slot;
    mov.b32     $0, 0;
    setp.geu.f32 hit, $1, $2;
    @!hit bra   DONE;
    mul.wide.s32 at, $3, 4;
    add.s64     at, at, $5;
    atom.relaxed.gpu.global.add.u32 place, [at], 1;
    setp.lt.u32 fits, place, $7;
    @!fits bra  DONE;
    add.f32     bits, $1, 0f00000000;
    shr.s32     flip, bits, 31;
    and.b32     flip, flip, 0x7fffffff;
    xor.b32     bits, bits, flip;
    setp.nan.f32 nan, $1, $1;
    selp.b32    bits, 0x7fffffff, bits, nan;
    sub.s32     flip, 0x7fffffff, $4;
    mul.wide.s32 at, $3, $7;
    cvt.u64.u32 slot, place;
    add.s64     at, at, slot;
    shl.b64     at, at, 3;
    add.s64     at, at, $6;
    st.global.v2.b32 [at], {flip, bits};
DONE:
}""")


class Tile(NamedTuple):
    """How the product is cut, and how a finished piece of it is filtered.

    Attributes:
        rows, latents, depth: of the piece that a program holds and of one step of its product.
        warps, stages: launch options.
        per_core: programs that share a multiprocessor, so that one multiplies while another filters.
        descriptors: operands are copied by the bulk copy engine.
        ptx: the filter is inline PTX.
    """

    rows: int
    latents: int
    depth: int
    warps: int
    stages: int
    per_core: int
    descriptors: bool
    ptx: bool


# Two programs of 172 registers and 96 KiB share a multiprocessor of Hopper, and one multiplies while the
# other filters. The wide tile (222 registers, 144 KiB) reads less but is alone there: for a GPU to decide.
HOPPER = Tile(128, 128, 64, warps=4, stages=3, per_core=2, descriptors=True, ptx=True)
HOPPER_WIDE = Tile(128, 256, 64, warps=8, stages=3, per_core=1, descriptors=True, ptx=True)
AMPERE = Tile(128, 128, 64, warps=8, stages=3, per_core=1, descriptors=False, ptx=True)
CDNA = Tile(128, 128, 32, warps=8, stages=2, per_core=1, descriptors=False, ptx=False)
# float32: twice the bytes, and no matrix instructions, so that 8 warps hold the sums.
FULL_WIDTH = AMPERE._replace(depth=32)
INTERPRETED = Tile(32, 128, 64, warps=4, stages=2, per_core=1, descriptors=False, ptx=False)


def topk_encode_fused(
    x: Tensor, w: Tensor, b: Tensor, k: int, guess: Tensor | None = None, tile: Tile | None = None
) -> tuple[Tensor, Tensor]:
    """Encoder E2; arguments and results as `topk_encode` without autograd, k at most `select.MAX_K`.

    Args:
        guess: [N] float32 thresholds instead of those of the sample; the result does not depend on them
            but for the rounding of the rows that take the fallback.
        tile: instead of the one for this device."""
    values, indices = topk_encode_fused_many(x[None], w[None], b[None], k, guess, tile)
    return values[0], indices[0]


def topk_encode_fused_many(
    x: Tensor, w: Tensor, b: Tensor, k: int, guess: Tensor | None = None, tile: Tile | None = None
) -> tuple[Tensor, Tensor]:
    """E2 of M SAEs in the launches of one: x [M, N, D], w [M, F, D], b [M, F] -> two of [M, N, k]."""
    (many, n, _), f = x.shape, w.shape[1]
    x, w, b = x.contiguous(), w.contiguous(), b.float().contiguous()
    values = torch.empty(many, n, k, dtype=torch.float32, device=x.device)
    indices = torch.empty(many, n, k, dtype=torch.int32, device=x.device)
    if n:
        how = plan(k, f)
        with torch.cuda.device_of(x):
            if guess is None:
                guess = _guess(x, w, b, how)
            keys, counts = _candidates(x, w, b, guess.float().contiguous(), how.capacity, tile)
            failed = counts.new_empty(many * n)
            merge(keys, counts, k, (values, indices, failed))
            recover(x, w, b, k, failed, values, indices)
    return values, indices


def bytes_of_candidates(rows: int, k: int, f: int) -> int:
    return 8 * rows * plan(k, f).capacity


@functools.cache
def plan(k: int, f: int) -> Plan:
    """The sample, rank and capacity; unlike E1's, this sample is multiplied twice, so it is a small one.

    If the order of latents says nothing about their scores, every S-th of them holds binomially many of
    the k - 1 largest, (k - 1) / S expected: `rank` or more, and there are too few candidates. Of as many
    as have a place it must hold `rank`, or there are too many. Both counts spread less than Poisson's."""
    stripes = max(16, triton.next_power_of_2(triton.cdiv(f, SAMPLE_WIDTH)))
    rank = next(m for m in range(1, k + 1) if m == k or 1 - _fewer(m, (k - 1) / stripes) <= RISK)
    if 2 * rank * stripes >= f:
        return Plan(1, 0, triton.next_power_of_2(max(f, 64)))
    capacity = triton.next_power_of_2(max(k, 64))
    while capacity < f and _fewer(rank, capacity / stripes) > RISK:
        capacity *= 2
    return Plan(stripes, rank, capacity)


def _fewer(count: int, expected: float) -> float:
    """P(Poisson(expected) < count)"""
    return math.fsum(math.exp(i * math.log(expected) - expected - math.lgamma(i + 1)) for i in range(count))


def _guess(x: Tensor, w: Tensor, b: Tensor, how: Plan) -> Tensor:
    """[M, N] float32"""
    (many, n, _), f = x.shape, w.shape[1]
    if how.stripes == 1:
        return torch.full((many, n), -torch.inf, dtype=torch.float32, device=x.device)
    drawn = (0x9E3779B1 * (n + f) >> 16) % how.stripes  # none is preferred; every run draws the same
    weights, bias = w[:, drawn :: how.stripes], b[:, drawn :: how.stripes].contiguous()
    width = weights.shape[1]
    step = min(n, max(1, SAMPLE_ELEMENTS // width))
    together = min(
        many, max(1, SAMPLE_ELEMENTS // (step * width))
    )  # SAEs, all rows of which are done at once
    sample = torch.empty(together * step * width, dtype=torch.float32, device=x.device)
    guess = torch.empty(many, n, dtype=torch.float32, device=x.device)
    for first, start in product(range(0, many, together), range(0, n, step)):
        saes, rows = slice(first, min(first + together, many)), slice(start, min(start + step, n))
        part = sample[: (saes.stop - first) * (rows.stop - start) * width].view(-1, rows.stop - start, width)
        if len(part) > 1:
            multiply(x[saes, rows], weights[saes].mT, part)
        else:  # a library may know better what to do with a matrix than with a batch of one
            multiply(x[first, rows], weights[first].t(), part[0])
        row_threshold(part, how.rank, bias[saes], guess[saes, rows])
    return guess


def _candidates(
    x: Tensor, w: Tensor, b: Tensor, guess: Tensor, capacity: int, tile: Tile | None
) -> tuple[Tensor, Tensor]:
    """Keys [M N, capacity] of the scores that reach their row's guess; their number, kept or not [M N]."""
    (many, n, d), f = x.shape, w.shape[1]
    asked, cores = tile, _cores(x.device)
    tile = asked or tile_for(x.device, x.dtype)
    if tile.descriptors and not _can_describe(x, w):  # by pointers Hopper's tile spills, Ampere's barely
        tile = asked._replace(descriptors=False) if asked else AMPERE
    tiles = many * triton.cdiv(n, tile.rows) * triton.cdiv(f, tile.latents)
    # PTX has no mask for rows: a last one takes what those of a tile beyond N find.
    counts = torch.zeros(many * n + 1, dtype=torch.int32, device=x.device)
    keys = torch.empty(many * n + 1, capacity, dtype=torch.int64, device=x.device)
    operands: tuple[Any, Any] = (x, w)
    if tile.descriptors:
        # Not `from_tensor`: the stride of a dimension of size 1 may be anything in a contiguous tensor.
        operands = (
            TensorDescriptor(x, [many * n, d], [d, 1], [tile.rows, tile.depth]),
            TensorDescriptor(w, [many * f, d], [d, 1], [tile.latents, tile.depth]),
        )
    _filtered_product[(min(tiles, cores * tile.per_core),)](
        *(*operands, b, guess, counts, keys, many, n, f, d, capacity),
        **_constants(tile, f),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return keys[:-1], counts[:-1]


@functools.cache
def tile_for(device: torch.device, dtype: torch.dtype) -> Tile:
    if INTERPRETING:
        return INTERPRETED
    if torch.version.hip is not None:
        return CDNA
    if dtype.itemsize > 2:
        return FULL_WIDTH
    return HOPPER if torch.cuda.get_device_capability(device) >= (9, 0) else AMPERE


@functools.cache
def _cores(device: torch.device) -> int:
    return 3 if INTERPRETING else torch.cuda.get_device_properties(device).multi_processor_count


def _can_describe(x: Tensor, w: Tensor) -> bool:
    """Whether the copy engine takes these: rows begin at multiples of 16 bytes."""
    return all(t.data_ptr() % 16 == 0 and t.shape[-1] * t.element_size() % 16 == 0 for t in (x, w))


def _constants(tile: Tile, f: int) -> dict[str, Any]:
    return {
        "ROWS": tile.rows,
        "LATENTS": tile.latents,
        "DEPTH": tile.depth,
        "GROUP": GROUP,
        "WHOLE": f % tile.latents == 0,
        "DESCRIPTORS": tile.descriptors,
        "PTX": tile.ptx,
    }


@triton.jit(do_not_specialize=["many"])
def _filtered_product(
    x, w, b, guess, counts, keys, many, n, f, d, capacity,
    ROWS: tl.constexpr, LATENTS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
    WHOLE: tl.constexpr, DESCRIPTORS: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    down = tl.cdiv(n, ROWS)
    across = tl.cdiv(f, LATENTS)
    depth = tl.arange(0, DEPTH)
    # Not flattened with the loop inside, which crashes the compiler for Hopper.
    for number in tl.range(tl.program_id(0), many * down * across, tl.num_programs(0), flatten=False):
        sae = number // (down * across)
        tile = number % (down * across)
        top = tile // (GROUP * across) * GROUP
        height = tl.minimum(down - top, GROUP)
        first_row = (top + tile % (GROUP * across) % height) * ROWS
        first_latent = (tile % (GROUP * across) // height) * LATENTS
        row = first_row + tl.arange(0, ROWS)
        latent = first_latent + tl.arange(0, LATENTS)
        x_row = sae * n + row  # of those of all SAEs
        w_row = sae * f + latent
        bias = tl.load(b + sae * f + latent, mask=latent < f, other=0.0)
        scores = tl.zeros((ROWS, LATENTS), tl.float32) + bias[None, :]
        if not DESCRIPTORS:
            x_at = x + x_row.to(tl.int64)[:, None] * d + depth[None, :]
            w_at = w + w_row.to(tl.int64)[None, :] * d + depth[:, None]
        for start in range(0, d, DEPTH):
            if DESCRIPTORS:
                left = x.load([sae * n + first_row, start])
                right = w.load([sae * f + first_latent, start]).T
            else:
                left = tl.load(x_at, mask=(row < n)[:, None] & (start + depth < d)[None, :], other=0.0)
                right = tl.load(w_at, mask=(latent < f)[None, :] & (start + depth < d)[:, None], other=0.0)
                x_at += DEPTH
                w_at += DEPTH
            if _INTERPRETING:
                left, right = left.to(tl.float32), right.to(tl.float32)
            scores = tl.dot(left, right, scores, input_precision="ieee")
        least = tl.load(guess + x_row, mask=row < n, other=float("inf"))
        place_row = tl.where(row < n, x_row, many * n)
        if not WHOLE:  # below every guess, which is finite as of the next line; NaN as a guess lets all pass
            scores = tl.where((latent < f)[None, :], scores, float("-inf"))
        least = tl.where(least > _LOWEST, least, _LOWEST)[:, None]
        if PTX:
            tl.inline_asm_elementwise(
                _APPEND,
                "=r,f,f,r,r,l,l,r",
                [
                    scores,
                    least,
                    place_row[:, None],
                    latent[None, :],
                    counts.to(tl.int64),
                    keys.to(tl.int64),
                    capacity,
                ],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )
        else:
            hit = tl.where(scores < least, False, (row < n)[:, None])
            count = tl.broadcast_to((counts + x_row)[:, None], (ROWS, LATENTS))
            place = tl.atomic_add(count, 1, mask=hit, sem="relaxed")
            slot = x_row.to(tl.int64)[:, None] * capacity + place
            tl.store(keys + slot, pack(scores, latent[None, :]), mask=hit & (place < capacity))


def cases(shape: Shape) -> list[Case]:
    types = {**dict.fromkeys(("b", "guess"), "*fp32"), "counts": "*i32", "keys": "*i64"}
    types |= dict.fromkeys(("many", "n", "f", "d", "capacity"), "i32")
    found = []
    for arch, tile, dtype in (
        ("sm_80", AMPERE, "bf16"),
        ("sm_80", FULL_WIDTH, "fp32"),
        ("sm_90", HOPPER, "bf16"),
        ("sm_90", HOPPER_WIDE, "bf16"),
        ("sm_90", AMPERE, "bf16"),  # what the copy engine does not take
        ("sm_90", FULL_WIDTH, "fp32"),
        ("gfx942", CDNA, "bf16"),
        ("gfx942", CDNA, "fp32"),
    ):
        operands = {"x": f"*{dtype}", "w": f"*{dtype}"}
        if tile.descriptors:
            operands = {
                "x": f"tensordesc<{dtype}[{tile.rows},{tile.depth}]>",
                "w": f"tensordesc<{dtype}[{tile.latents},{tile.depth}]>",
            }
        for f in (tile.latents, tile.latents + 1):
            found.append(
                Case(
                    _filtered_product,
                    operands | types,
                    _constants(tile, f),
                    num_warps=tile.warps,
                    num_stages=tile.stages,
                    tensor_cores=dtype == "bf16",
                    odd=("many",),
                    archs=(arch,),
                )
            )
    return found
