"""Encoder E1: a library's product in chunks that stay in the L2 cache, and a filter over each chunk.

[N, F] is never kept. Latents are cut into stripes f = r, r + S, r + 2 S, ...: a strided view of the weights,
so a stripe's product is a plain matrix product. One stripe is the sample of which `select` guesses each
row's threshold; its candidates count as those of any other, so the sample costs nothing extra:

    for each block of rows:   product with the sample stripe -> guess
                              for each chunk of each stripe: product -> append candidates
                              merge
    recover the rows that failed

On a GPU products run on the current stream and all that reads them on a second one, through a ring of two
buffers: the filter of one chunk overlaps the product of the next. One program owns a row's list of
candidates, which are therefore appended in a fixed order without atomics. No step waits for the device,
and all streams are joined at the end, so a call can be captured in a CUDA graph.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae_kernels import chunked
from sae_kernels.many import ONE_BY_ONE
from sae_kernels.triton.encode_fused import bytes_of_candidates, topk_encode_fused, topk_encode_fused_many
from sae_kernels.triton.launch import INTERPRETING, Case, Shape, on_device
from sae_kernels.triton.select import MAX_K, Plan, merge, pack, plan, recover, row_threshold
from sae_kernels.triton.tuning import encoder_for

# A chunk of 1024 rows by 4096 latents of float32 is 16 MiB: two of them stay in the 50 to 60 MB of L2 of
# an H100 or H200, beside the weights that the product streams. More rows per block would read the
# weights less often (1024 FLOP per byte of them), more latents per chunk would launch less often.
BLOCK_ROWS = 1024
CHUNK_LATENTS = 4096
MANY_BYTES = 1 << 30  # of candidates of several SAEs: with more, launches are not what takes the time


def topk_encode(x: Tensor, w: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    if k > MAX_K:  # nearly dense: there is no short list of candidates to be had
        return chunked.topk_encode(x, w, b, k)
    with torch.cuda.device_of(x):  # of which it is asked what it can do
        fused = encoder_for(len(x), x.shape[1], len(w), k, x.dtype) == "e2"
    return topk_encode_fused(x, w, b, k) if fused else topk_encode_chunked(x, w, b, k)


def topk_encode_many(x: Tensor, w: Tensor, b: Tensor, ks: Sequence[int]) -> tuple[Tensor, Tensor]:
    """By E2 in the launches of one, with slots for the largest k, of which others keep their first k."""
    (many, n, d), f, k = x.shape, w.shape[1], max(ks)
    with torch.cuda.device_of(x):
        fused = k <= MAX_K and encoder_for(n, d, f, k, x.dtype) == "e2"
    if not fused or bytes_of_candidates(many * n, k, f) > MANY_BYTES:
        return ONE_BY_ONE["topk_encode"](x, w, b, ks)
    values, indices = topk_encode_fused_many(x, w, b, k)
    if min(ks) < k:
        empty = torch.arange(k, device=x.device) >= on_device(ks, torch.int64, x.device)[:, None, None]
        values.masked_fill_(empty, 0)
        indices.masked_fill_(empty, 0)
    return values, indices


def topk_encode_chunked(
    x: Tensor, w: Tensor, b: Tensor, k: int, guess: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Encoder E1.

    Args:
        guess: [N] float32 thresholds instead of those of the sample; the result does not depend on them
            but for the rounding of the rows that take the fallback."""
    (n, _), f = x.shape, len(w)
    x, w, b = x.contiguous(), w.contiguous(), b.float().contiguous()
    values = torch.empty(n, k, dtype=torch.float32, device=x.device)
    indices = torch.empty(n, k, dtype=torch.int32, device=x.device)
    failed = torch.empty(n, dtype=torch.int32, device=x.device)
    if n:
        with torch.cuda.device_of(x):
            how = plan(k, f)
            _encode(x, w, b, how, guess, (values, indices, failed))
            recover(x, w, b, k, failed, values, indices)
    return values, indices


def _encode(
    x: Tensor, w: Tensor, b: Tensor, how: Plan, guess: Tensor | None, out: tuple[Tensor, Tensor, Tensor]
) -> None:
    n, f, k = len(x), len(w), out[0].shape[1]
    left, right = _operands(x, w)
    height = triton.cdiv(n, triton.cdiv(n, BLOCK_ROWS))
    widest = triton.cdiv(f, how.stripes)
    width = min(widest, 16 * triton.cdiv(triton.cdiv(widest, triton.cdiv(widest, CHUNK_LATENTS)), 16))
    dtype = _product_dtype(x)
    sampled = how.stripes > 1 and guess is None
    sample = _Slot(height, widest, x.device, dtype) if sampled else None
    ring = [_Slot(height, width, x.device, dtype) for _ in range(2)]
    keys = torch.empty(height, how.capacity, dtype=torch.int64, device=x.device)
    counts = torch.empty(height, dtype=torch.int32, device=x.device)
    thresholds = torch.empty(height, dtype=torch.float32, device=x.device)
    if not sampled:
        thresholds.fill_(-torch.inf)
    # Biases in the order of the stripes: the filter would touch a sector for each of them otherwise.
    biases = [b[stripe :: how.stripes].contiguous() for stripe in range(how.stripes)]
    drawn = (0x9E3779B1 * (n + f) >> 16) % how.stripes  # no stripe is preferred, and every run draws the same
    turn = 0
    with _Pipeline(x.device) as pipeline:
        for top in range(0, n, height):
            rows = slice(top, min(top + height, n))
            size = rows.stop - top
            with pipeline.reading():
                counts.zero_()
                if guess is not None:
                    thresholds[:size].copy_(guess[rows])
            for stripe in (drawn, *(s for s in range(how.stripes) if s != drawn)):
                weights, bias = right[stripe :: how.stripes], biases[stripe]
                sampling = sampled and stripe == drawn
                step = widest if sampling else width
                for start in range(0, len(weights), step):
                    part = slice(start, min(start + step, len(weights)))
                    slot = sample if sampling and sample is not None else ring[turn % 2]
                    turn += not sampling
                    scores = slot.buffer[:size, : part.stop - start]
                    with pipeline.writing(slot):
                        _product(left[rows], weights[part].t(), scores)
                    with pipeline.reading(slot):
                        if sampling:
                            row_threshold(scores, how.rank, bias, thresholds[:size])
                        first = stripe + how.stripes * start
                        append(scores, bias[part], thresholds, keys, counts, first, how.stripes)
            with pipeline.reading():
                values, indices, failed = (t[rows] for t in out)
                merge(keys[:size], counts[:size], k, (values, indices, failed))


def _product_dtype(x: Tensor) -> torch.dtype:
    """float32; where a library cannot write that of narrower operands, their own: the product is rounded."""
    return torch.float32 if torch.version.hip is None or x.dtype == torch.float32 else x.dtype


def _operands(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    # A CPU has no product of narrow operands into float32. Upcast, they have the same exact products.
    return (x, w) if x.is_cuda else (x.float(), w.float())


def _product(x: Tensor, w: Tensor, out: Tensor) -> None:
    if x.dtype == out.dtype:
        torch.mm(x, w, out=out)
    else:
        torch.mm(x, w, out_dtype=out.dtype, out=out)


class _Slot:
    """A buffer that one stream writes and another reads."""

    def __init__(self, rows: int, latents: int, device: torch.device, dtype: torch.dtype) -> None:
        # Rows begin at multiples of 64 bytes, whatever the number of latents.
        self.buffer = torch.empty(rows, 16 * triton.cdiv(latents, 16), dtype=dtype, device=device)
        self.written: torch.cuda.Event | None = None
        self.read: torch.cuda.Event | None = None
        if device.type == "cuda":
            self.written, self.read = torch.cuda.Event(), torch.cuda.Event()


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class _Pipeline:
    """The current stream for what writes slots and a second one for what reads them; a CPU has no streams.

    Everything is allocated before, on the current stream, which waits for the second one at the end:
    so memory can be returned to the allocator as if there were one stream."""

    def __init__(self, device: torch.device) -> None:
        self.streams = None
        if device.type == "cuda":
            self.streams = torch.cuda.current_stream(device), _side_stream(device)

    def __enter__(self) -> "_Pipeline":
        if self.streams:
            main, side = self.streams
            side.wait_stream(main)
        return self

    def __exit__(self, *error: object) -> None:
        if self.streams:
            main, side = self.streams
            main.wait_stream(side)

    @contextlib.contextmanager
    def writing(self, slot: _Slot) -> Iterator[None]:
        if self.streams and slot.written and slot.read:
            slot.read.wait(self.streams[0])  # of a slot that was never read it does nothing
            yield
            slot.written.record(self.streams[0])
        else:
            yield

    @contextlib.contextmanager
    def reading(self, slot: _Slot | None = None) -> Iterator[None]:
        if self.streams:
            side = self.streams[1]
            if slot and slot.written:
                slot.written.wait(side)
            with torch.cuda.stream(side):
                yield
            if slot and slot.read:
                slot.read.record(side)
        else:
            yield


def append(
    scores: Tensor, bias: Tensor, thresholds: Tensor, keys: Tensor, counts: Tensor, first: int, step: int
) -> None:
    """Append to each row's keys those of scores + bias that reach its threshold, in the order of latents.

    Args:
        scores: [R, C], the last dimension contiguous. bias: [C] float32.
        thresholds: [R or more] float32.
        keys: [R or more, capacity] int64. counts: [R or more] int32, of candidates so far: those beyond the
            capacity are counted only.
        first, step: column c is latent first + step * c."""
    rows, width = scores.shape
    launch = append_launch()
    grid = (triton.cdiv(rows, launch["ROWS"]),)
    args = (scores, bias, thresholds, keys, counts, rows, width, scores.stride(0), keys.shape[1], first, step)
    _append[grid](*args, **launch)


def append_launch() -> dict[str, int]:
    # One warp per row scans without barriers, and 32 scores per thread keep enough loads in flight.
    return {"ROWS": 32 if INTERPRETING else 1, "BLOCK": 1024, "num_warps": 1}


@triton.jit(do_not_specialize=["first"])
def _append(
    scores,
    bias,
    thresholds,
    keys,
    counts,
    rows,
    width,
    stride,
    capacity,
    first,
    step,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    wide = row.to(tl.int64)[:, None]
    threshold = tl.load(thresholds + row, mask=row < rows, other=0.0)[:, None]
    count = tl.load(counts + row, mask=row < rows, other=0)
    for start in range(0, width, BLOCK):
        col = start + tl.arange(0, BLOCK)
        inside = (row < rows)[:, None] & (col < width)[None, :]
        score = tl.load(scores + wide * stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
        score += tl.load(bias + col, mask=col < width, other=0.0)[None, :]
        hit = inside & ~(score < threshold)  # so NaN reaches every threshold, and every score reaches NaN
        one = hit.to(tl.int32)
        place = count[:, None] + tl.cumsum(one, 1) - one
        key = pack(score, (first + step * col)[None, :])
        tl.store(keys + wide * capacity + place, key, mask=hit & (place < capacity))
        count += tl.sum(one, axis=1)
    tl.store(counts + row, count, mask=row < rows)


def cases(shape: Shape) -> list[Case]:
    """On AMD scores may be the rounded product of bfloat16 operands."""
    types = {"bias": "*fp32", "thresholds": "*fp32", "keys": "*i64", "counts": "*i32"}
    types |= dict.fromkeys(("rows", "width", "stride", "capacity", "first", "step"), "i32")
    launch = append_launch()
    warps = launch.pop("num_warps")
    case = functools.partial(Case, _append, constants=launch, num_warps=warps, odd=("first", "step"))
    return [
        case(types={"scores": "*fp32"} | types),
        case(types={"scores": "*bf16"} | types, archs=("gfx942",)),
    ]
