"""Dense top-k for AuxK on a GPU: a matrix product, then one program per row that keeps the k largest.

The k-th largest of a row is found by search over thresholds instead of sorting. Bits of floats that are
not negative are ordered like the floats themselves, so a threshold is an int32. Each round counts the
elements at or above 8 evenly spaced thresholds and goes on between the two around k; it stops as soon as
exactly k are above one, after about 6 rounds of at most 11. Elements that tie for the last places are
numbered in their order, and the first ones are kept.

A row of up to MAX_WHOLE latents is read once and stays in registers; a longer one is read once per round.
The product is written where the kernel then selects in place: there is no other [N, F] tensor.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae_kernels.triton.launch import Case, Shape

MAX_WHOLE = 8192  # twice as many spill registers on NVIDIA
WAYS = tl.constexpr(8)
_NAN = tl.constexpr(0x7F800001)  # the smallest key that is above the infinity's
_BITS = tl.constexpr(0x7FFFFFFF)


class Launch(NamedTuple):
    """Elements of a row that a program holds at a time, whether these are all of them, and its warps."""

    chunk: int
    whole: bool
    warps: int


def launch_of(num_latents: int) -> Launch:
    """16 elements per thread. Rows in chunks need registers for the next one besides: 8 per thread."""
    if num_latents > MAX_WHOLE:
        return Launch(2048, False, 8)
    chunk = max(128, triton.next_power_of_2(num_latents))
    return Launch(chunk, True, max(1, chunk // 512))


def dead_encode(x: Tensor, w: Tensor, b: Tensor, k: int) -> Tensor:
    n, f = len(x), len(w)
    acts = _product(x, w)
    if k >= f:
        return acts.add_(b).relu_()
    if n > 0:
        how = launch_of(f)
        with torch.cuda.device_of(x):
            _keep_largest[(n,)](
                *(acts, b.float().contiguous(), f, k), CHUNK=how.chunk, WHOLE=how.whole, num_warps=how.warps
            )
    return acts


def _product(x: Tensor, w: Tensor) -> Tensor:
    """x @ w.T in float32, [N, F] contiguous."""
    if x.dtype == torch.float32 or not x.is_cuda or torch.version.hip is not None:
        return torch.mm(x.float(), w.float().T)
    return torch.mm(x, w.T, out_dtype=torch.float32)


@triton.jit
def _keys(acts, bias, start, f, CHUNK: tl.constexpr):
    """Ordered keys of relu(acts + bias) of columns start to start + CHUNK: bits of the floats; -1 past f."""
    columns = start + tl.arange(0, CHUNK)
    inside = columns < f
    pre = tl.load(acts + columns, mask=inside, other=0.0)
    pre += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    positive = tl.where(pre <= 0, 0.0, pre)  # a NaN stays one
    key = tl.minimum(positive.to(tl.int32, bitcast=True) & _BITS, _NAN)
    return tl.where(inside, key, -1)


@triton.jit
def _count(keys, thresholds):
    """[WAYS]: how many keys reach each threshold."""
    return tl.sum((keys[None, :] >= thresholds[:, None]).to(tl.int32), axis=1)


@triton.jit
def _keep(acts, keys, start, f, threshold, exact, room, CHUNK: tl.constexpr):
    """Write the kept elements of a chunk, zero for the rest; returns how many ties are still to be kept."""
    columns = start + tl.arange(0, CHUNK)
    kept = keys >= threshold
    if not exact:
        tied = (keys == threshold).to(tl.int32)
        kept = (keys > threshold) | ((tied == 1) & (tl.cumsum(tied, axis=0) <= room))
        room -= tl.sum(tied, axis=0)
    value = tl.where(kept, keys.to(tl.float32, bitcast=True), 0.0)
    tl.store(acts + columns, value, mask=columns < f)
    return room


@triton.jit
def _keep_largest(acts, bias, f, k, CHUNK: tl.constexpr, WHOLE: tl.constexpr):
    """Row program_id of acts [N, f] <- relu(acts + bias) where it is among the k largest, 0 elsewhere."""
    acts += tl.program_id(0).to(tl.int64) * f
    if WHOLE:
        keys = _keys(acts, bias, 0, f, CHUNK)
    # At or above low there are above_low >= k elements, at or above high there are above_high < k.
    low, above_low = 0, f
    high, above_high = _NAN + 1, 0
    while (high - low > 1) & (above_low > k):
        thresholds = tl.minimum(low + tl.arange(0, WAYS) * ((high - low) // WAYS + 1), high)
        if WHOLE:
            counts = _count(keys, thresholds)
        else:
            counts = tl.zeros([WAYS], dtype=tl.int32)
            for start in range(0, f, CHUNK):
                counts += _count(_keys(acts, bias, start, f, CHUNK), thresholds)
        enough = counts >= k
        low = tl.max(tl.where(enough, thresholds, low), axis=0)
        high = tl.min(tl.where(enough, high, thresholds), axis=0)
        above_low = tl.min(tl.where(enough, counts, above_low), axis=0)
        above_high = tl.max(tl.where(enough, above_high, counts), axis=0)
    exact, room = above_low == k, k - above_high
    if WHOLE:
        _keep(acts, keys, 0, f, low, exact, room, CHUNK)
    else:
        for start in range(0, f, CHUNK):
            chunk_keys = _keys(acts, bias, start, f, CHUNK)
            room = _keep(acts, chunk_keys, start, f, low, exact, room, CHUNK)


def cases(shape: Shape) -> list[Case]:
    """Any number of dead latents: launches differ by powers of two of them."""
    launches = {launch_of(2**i) for i in range(shape.f.bit_length())}
    return [
        Case(
            _keep_largest,
            types={"acts": "*fp32", "bias": "*fp32", "f": "i32", "k": "i32"},
            constants={"CHUNK": how.chunk, "WHOLE": how.whole},
            num_warps=how.warps,
            max_registers=128,
            odd=("f", "k"),
        )
        for how in sorted(launches)
    ]
