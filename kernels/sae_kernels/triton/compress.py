"""Encoders whose rows differ in their number of slots: `batch_topk_encode` and `threshold_encode`.

The product is taken in chunks that stay in the cache (`products`); a kernel keeps what passes of each
chunk before the next one overwrites it, so nothing of size N x F exists.

threshold_encode. A program owns a row and appends what passes to the row's `KEPT` places, latents ascending,
and counts on when they are full. The counts give the offsets, the host reads how many slots there are (the
one wait), and what was kept is moved to its place; chunks of rows that did not fit are multiplied again.

batch_topk_encode. Guess, filter, verify. A pool takes every positive activation that reaches a guess of
the N*k-th largest one. If it holds at least N*k and did not overflow, the N*k largest are among them,
however good the guess was. The pool is filled in any order and then sorted by place (row, latent), so that
the result has one order, and ties go to the smaller place. If X

The guess comes from a sample in which every row and every latent takes part once: rows r mod S meet
latents r mod S only. Dense latents and rows with many active latents, of which a sample of rows or
of latents alone has too many or too few, thus weigh in it as they do in the whole.

An activation is held as the bits of its float32: positive floats are ordered as their bits are.
"""

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from sae_kernels.slots import offsets_of
from sae_kernels.triton.launch import Case, Shape
from sae_kernels.triton.recompute import largest_of_batch

CHUNK_ROWS, CHUNK_LATENTS = 1024, 8192  # 32 MiB of float32: inside the L2 cache of an H100, not of an A100
KEPT = 256  # slots per row that threshold_encode keeps in its first pass
SAMPLE = 8 << 20  # activations that the guess is drawn from, about
SMALL = 1 << 16  # activations that are pooled without a guess
PLACE_BLOCK = 1024
LAST = torch.iinfo(torch.int64).max  # a place after every other

_fallbacks: dict[torch.device, Tensor] = {}


def fallback_batches(device: torch.device) -> Tensor:
    """0-dim int64 on the device: batches for which `batch_topk_encode` guessed wrong and multiplied again."""
    if device not in _fallbacks:
        _fallbacks[device] = torch.zeros((), dtype=torch.int64, device=device)
    return _fallbacks[device]


def threshold_encode(x: Tensor, w: Tensor, b: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n, f = len(x), len(w)
    limits = threshold.float().expand(f).contiguous()
    bias = b.float().contiguous()
    counts = torch.zeros(n, dtype=torch.int32, device=x.device)
    kept_values = torch.empty(n, KEPT, dtype=torch.float32, device=x.device)
    kept_indices = torch.empty(n, KEPT, dtype=torch.int32, device=x.device)

    def append(first_row: int, rows: Tensor, begins: Tensor, values: Tensor, indices: Tensor) -> None:
        for row, latent, chunk in products(rows, w):
            _append_above[(len(chunk),)](
                *(chunk, bias, limits, counts, begins, values, indices),
                *(first_row + row, latent, chunk.shape[1]),
                KEPT=KEPT,
                BLOCK=_block(chunk.shape[1]),
                FILL=begins is not counts,
            )

    with torch.cuda.device_of(x):
        append(0, x, counts, kept_values, kept_indices)
        offsets = offsets_of(counts.long())
        fullest = functional.pad(counts, (0, -n % CHUNK_ROWS)).view(-1, CHUNK_ROWS)
        fullest = fullest.amax(dim=1).long()  # of each block of rows that is multiplied at once
        slots, *most = torch.cat([offsets[-1:], fullest]).tolist()  # the host waits here, and only here
        values = torch.empty(slots, dtype=torch.float32, device=x.device)
        indices = torch.empty(slots, dtype=torch.int32, device=x.device)
        if n:
            _move[(n,)](counts, offsets, kept_values, kept_indices, values, indices, KEPT=KEPT)
        for number, count in enumerate(most):
            if count > KEPT:
                first = number * CHUNK_ROWS
                counts[first : first + CHUNK_ROWS] = 0
                append(first, x[first : first + CHUNK_ROWS], offsets, values, indices)
    return values, indices, offsets


def products(x: Tensor, w: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """(first row, first latent, float32 [rows, latents]) of x @ w.T; the next one overwrites the last one."""
    n, f = len(x), len(w)
    buffer = torch.empty(min(n, CHUNK_ROWS) * min(f, CHUNK_LATENTS), dtype=torch.float32, device=x.device)
    for row in range(0, n, CHUNK_ROWS):
        for latent in range(0, f, CHUNK_LATENTS):
            a, b = x[row : row + CHUNK_ROWS], w[latent : latent + CHUNK_LATENTS]
            out = buffer[: len(a) * len(b)].view(len(a), len(b))
            multiply(a, b.t(), out)
            yield row, latent, out


def multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b in float32, of matrices or batches of them."""
    product = torch.mm if a.dim() == 2 else torch.bmm
    if a.dtype == torch.float32:
        product(a, b, out=out)
    elif a.device.type == "cpu":  # no product of narrow operands into float32 there
        product(a.float(), b.float(), out=out)
    elif torch.version.hip is not None:  # nor there: the product is rounded
        out.copy_(product(a, b))
    else:
        product(a, b, out_dtype=torch.float32, out=out)


def _block(latents: int) -> int:
    """Latents of a row that a filter reads at once."""
    return min(2048, max(16, triton.next_power_of_2(latents)))


@triton.jit
def _append_above(
    chunk,
    bias,
    limits,
    counts,
    begins,
    values,
    indices,
    first_row,
    first_latent,
    latents,
    KEPT: tl.constexpr,
    BLOCK: tl.constexpr,
    FILL: tl.constexpr,
):
    """Append what a chunk of a row has above its limits: to the row's kept places, or to its final ones."""
    row = first_row + tl.program_id(0)
    if FILL:
        begin = tl.load(begins + row)
        room = tl.load(begins + row + 1) - begin
    else:
        begin = row.to(tl.int64) * KEPT
        room = KEPT
    here = chunk + tl.program_id(0).to(tl.int64) * latents
    seen = tl.load(counts + row)
    for start in range(0, latents, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < latents
        latent = first_latent + column
        pre = tl.load(here + column, mask=inside, other=0.0) + tl.load(bias + latent, mask=inside, other=0.0)
        limit = tl.load(limits + latent, mask=inside, other=0.0)
        hit = inside & (pre > limit) & (pre > 0)
        place = seen + tl.cumsum(hit.to(tl.int32), 0) - 1
        tl.store(values + begin + place, pre, mask=hit & (place < room))
        tl.store(indices + begin + place, latent, mask=hit & (place < room))
        seen += tl.sum(hit.to(tl.int32), 0)
    tl.store(counts + row, seen)


@triton.jit
def _move(counts, offsets, kept_values, kept_indices, values, indices, KEPT: tl.constexpr):
    """What a row has kept, to its place. A row that has more than it could keep is filled afterwards."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, KEPT)
    inside = slot < tl.load(counts + row)
    begin = tl.load(offsets + row)
    kept = row * KEPT + slot
    tl.store(values + begin + slot, tl.load(kept_values + kept, mask=inside, other=0.0), mask=inside)
    tl.store(indices + begin + slot, tl.load(kept_indices + kept, mask=inside, other=0), mask=inside)


def batch_topk_encode(
    x: Tensor, w: Tensor, b: Tensor, k: int, guess: float | None = None, room: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """As the public op without autograd.

    Args:
        guess: instead of the sample's; the result does not depend on it but for the rounding of the product.
        room: places in the pool; likewise."""
    n, f = len(x), len(w)
    x, w, bias = x.contiguous(), w.contiguous(), b.float().contiguous()
    values = torch.empty(n * k, dtype=torch.float32, device=x.device)
    indices = torch.empty(n * k, dtype=torch.int32, device=x.device)
    if not n:
        return values, indices, torch.zeros(1, dtype=torch.int64, device=x.device)
    everything = guess is None and room is None and n * f <= max(SMALL, 4 * n * k)
    with torch.cuda.device_of(x):
        sample, wanted, size = (1, 1, n * f) if everything else _sample_of(n, f, k)
        size = size if room is None else room
        if guess is None and not everything:
            at_least = _guess(x, w, bias, sample, wanted)
        else:
            at_least = torch.full((), guess or 0.0, dtype=torch.float32, device=x.device)
        total = torch.zeros((), dtype=torch.int64, device=x.device)
        bits = torch.full(
            (max(size, n * k),), -1, dtype=torch.int32, device=x.device
        )  # below every activation
        places = torch.full(bits.shape, LAST, dtype=torch.int64, device=x.device)
        for row, latent, chunk in products(x, w):
            _collect[(len(chunk),)](
                *(chunk, bias, at_least, total, bits, places, row, latent, chunk.shape[1], f, size),
                BLOCK=_block(chunk.shape[1]),
                EVERYTHING=everything,
            )
        offsets = _select(bits, places, values, indices, n, f, k)
        if not everything:
            failed = (total < n * k) | (total > size)
            recomputed = largest_of_batch(x, w, bias, k, failed, values, indices)
            offsets = torch.where(failed, recomputed, offsets)
            fallback_batches(x.device).add_(failed)
    return values, indices, offsets


def _sample_of(n: int, f: int, k: int) -> tuple[int, int, int]:
    """S, how many of the sample shall reach the guess, and the size of the pool.

    About n * k / S of the sample are among the N*k largest. The guess aims at a quarter more and six
    standard deviations of a count, so that it is too high in one batch of 10^9 if the sample were random;
    the pool holds 1.6 times the activations that it should let through."""
    sample = min(n, f, max(16, triton.next_power_of_2(-(-n * f // SAMPLE))))
    share = (n // sample) * (f // sample) * sample / (n * f)
    expected = n * k * share
    wanted = math.ceil(1.25 * expected + 6 * math.sqrt(expected) + 8)
    wanted = min(wanted, (n // sample) * (f // sample) * sample)
    return sample, wanted, min(n * f, math.ceil(1.6 * wanted / share))


def _guess(x: Tensor, w: Tensor, bias: Tensor, sample: int, wanted: int) -> Tensor:
    rows, latents = len(x) // sample, len(w) // sample
    a = x[: rows * sample].unflatten(0, (rows, sample)).transpose(0, 1)  # [S, N / S, D]
    c = w[: latents * sample].unflatten(0, (latents, sample)).permute(1, 2, 0)  # [S, D, F / S]
    pre = torch.empty(sample, rows, latents, dtype=torch.float32, device=x.device)
    multiply(a, c, pre)
    pre += bias[: latents * sample].view(latents, sample).t().unsqueeze(1)
    return pre.view(-1).topk(wanted).values[-1]


@triton.jit
def _activation_bits(pre):
    """relu as bits: 0 for what is not positive, the largest for NaN."""
    bits = tl.where(pre <= 0, 0.0, pre).to(tl.int32, bitcast=True)
    return tl.where(pre != pre, 0x7FC00000, bits)


@triton.jit
def _collect(
    chunk,
    bias,
    guess,
    total,
    bits,
    places,
    first_row,
    first_latent,
    latents,
    f,
    room,
    BLOCK: tl.constexpr,
    EVERYTHING: tl.constexpr,
):
    """Append the activations of a chunk of a row that reach the guess to the pool."""
    row = (first_row + tl.program_id(0)).to(tl.int64)
    here = chunk + tl.program_id(0).to(tl.int64) * latents
    at_least = tl.load(guess)
    for start in range(0, latents, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < latents
        latent = first_latent + column
        pre = tl.load(here + column, mask=inside, other=0.0) + tl.load(bias + latent, mask=inside, other=0.0)
        hit = inside
        if not EVERYTHING:  # written so that NaN hits, as the activation or as the guess
            hit = hit & tl.where((pre <= 0) | (pre < at_least), False, True)
        hits = tl.sum(hit.to(tl.int32), 0)
        begin = tl.atomic_add(total, hits.to(tl.int64), mask=hits > 0, sem="relaxed")
        place = begin + tl.cumsum(hit.to(tl.int32), 0) - 1
        fits = hit & (place < room)
        tl.store(bits + place, _activation_bits(pre), mask=fits)
        tl.store(places + place, row * f + latent, mask=fits)


def _select(bits: Tensor, places: Tensor, values: Tensor, indices: Tensor, n: int, f: int, k: int) -> Tensor:
    """Write the n * k largest of the pool, by place; return the offsets."""
    least = bits.topk(n * k, sorted=False).values.min()
    places, order = places.sort()
    bits = bits[order]
    larger, equal = bits > least, bits == least
    chosen = larger | (equal & (equal.cumsum(0) <= n * k - larger.sum()))
    slot = offsets_of(chosen)
    _place[(triton.cdiv(len(bits), PLACE_BLOCK),)](
        *(bits, places, chosen, slot, values, indices, len(bits), f, n * k), BLOCK=PLACE_BLOCK
    )
    begins = torch.arange(n + 1, device=bits.device) * f
    return slot[torch.searchsorted(places, begins)]


@triton.jit
def _place(bits, places, chosen, slots, values, indices, count, f, num_slots, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    slot = tl.load(slots + at, mask=inside, other=0)
    kept = inside & (tl.load(chosen + at, mask=inside, other=0) != 0) & (slot < num_slots)
    value = tl.load(bits + at, mask=kept, other=0).to(tl.float32, bitcast=True)
    tl.store(values + slot, value, mask=kept)
    latent = tl.load(places + at, mask=kept, other=0) % f
    tl.store(indices + slot, latent.to(tl.int32), mask=kept)


def cases(shape: Shape) -> list[Case]:
    chunk = {"chunk": "*fp32", "bias": "*fp32", "first_row": "i32", "first_latent": "i32", "latents": "i32"}
    keep = chunk | {"limits": "*fp32", "counts": "*i32", "values": "*fp32", "indices": "*i32"}
    pool = {"bits": "*i32", "places": "*i64", "f": "i32"}
    block = _block(min(shape.f, CHUNK_LATENTS))
    return [
        *(
            Case(
                _append_above,
                keep | {"begins": "*i64" if fill else "*i32"},
                {"KEPT": KEPT, "BLOCK": block, "FILL": fill},
            )
            for fill in (False, True)
        ),
        Case(
            _move,
            {
                **dict.fromkeys(("counts", "kept_indices", "indices"), "*i32"),
                **dict.fromkeys(("kept_values", "values"), "*fp32"),
                "offsets": "*i64",
            },
            {"KEPT": KEPT},
        ),
        *(
            Case(
                _collect,
                chunk | pool | {"guess": "*fp32", "total": "*i64", "room": "i32"},
                {"BLOCK": block, "EVERYTHING": everything},
                odd=("room",),
            )
            for everything in (False, True)
        ),
        Case(
            _place,
            pool
            | {"chosen": "*i1", "slots": "*i64", "values": "*fp32", "indices": "*i32"}
            | {"count": "i32", "num_slots": "i32"},
            {"BLOCK": PLACE_BLOCK},
            odd=("count",),
        ),
    ]
