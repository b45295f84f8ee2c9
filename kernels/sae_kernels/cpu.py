"""The fast path on CPUs: library calls that do sparse work as sparse work.

Decoding is an embedding bag with per-sample weights; the gradient of a value is a sampled dense
product; a sum over each latent's rows is a stable sort followed by an embedding bag over the rows.
The timings that led to each choice are in kernels/NOTES.md.
"""

import warnings
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from sae_kernels import chunked, cpu_bf16
from sae_kernels.chunked import (
    compressed,
    decode_residual_with,
    encode_in_chunks,
    first_largest,
    keep_top_k,
    sparse_decode,
    threshold_in_chunks,
)
from sae_kernels.chunked_step import latent_step_with, settle, sparse_grad_with
from sae_kernels.contracts import accumulate_dtype
from sae_kernels.cpu_candidates import BLOCK
from sae_kernels.cpu_step import slots_by_latent, sums_by_latent
from sae_kernels.slots import row_of_slot

__all__ = [
    "batch_topk_encode",
    "dead_encode",
    "decode_residual",
    "gather_dot",
    "latent_step",
    "segment_rows",
    "settle",
    "sparse_decode",
    "sparse_grad",
    "supports",
    "threshold_encode",
    "topk_encode",
]

# Measured with 2 threads (AVX-512, 36 MB L3) at N 2048, D 576, F 4608: the product takes 47 ms in
# chunks of 1024 rows, 49 in 512, 57 in 256, 58 in 128, 82 in 64, 55 whole. 16 MiB of preactivations:
CHUNK_ELEMENTS = 4 << 20
MIN_CHUNK_ROWS = 256
# Products that only guess are of two bytes and need no second pass: 5 % faster than in 4 << 20, and 20 MiB.
GUESS_ELEMENTS = 10 << 20
# Without instructions for it, oneDNN's bfloat16 product takes 223 ms where float32 takes 67.
NATIVE_BF16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()

# torch says once per process that CSR is in beta, and 2.11 that it will not check what it was asked not to:
# let it say so here.
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="Sparse (CSR tensor support is in beta|invariant checks are)")
    torch.sparse_csr_tensor([0, 0], [], [], size=(1, 1), device="cpu", check_invariants=False)


def supports(op: str, *tensors: Tensor) -> str | None:
    for tensor in tensors:
        if tensor.device.type != "cpu":
            return f"a tensor is on {tensor.device}"
    return None


def topk_encode(x: Tensor, w: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    acc = accumulate_dtype(x, w, b)
    if NATIVE_BF16 and acc == torch.float32 and cpu_bf16.pays(k, len(w)):
        codes, elements = cpu_bf16.encoder(w, b, k, top_k, gather_dot), GUESS_ELEMENTS
    else:
        product, elements = preactivations(w, b, acc), CHUNK_ELEMENTS

        def codes(part: Tensor) -> tuple[Tensor, Tensor]:
            return top_k(product(part), k)

    return encode_in_chunks(x, k, acc, _chunk_rows(w, elements), codes)


def _chunk_rows(w: Tensor, elements: int) -> int:
    return max(MIN_CHUNK_ROWS, elements // max(1, len(w)))


def preactivations(w: Tensor, b: Tensor, acc: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Rows of x -> their pre-activations in acc, in memory that the next call overwrites."""
    # Operands that were rounded stay rounded: their product is exact in float32.
    w_t, b = w.to(acc).t(), b.to(acc)
    memory = torch.empty(0, dtype=acc, device="cpu")

    def product(part: Tensor) -> Tensor:
        nonlocal memory
        if len(memory) < len(part):
            memory = torch.empty(len(part), len(w), dtype=acc, device="cpu")
        # addmm would write the bias to all of the output first, and read it again: 5 ms of 92 (1 thread).
        return torch.mm(part.to(acc), w_t, out=memory[: len(part)]).add_(b)

    return product


def top_k(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and int64 indices of the k largest of each row of pre [N, F], in any order.

    Of every 8 strided preactivations only the largest competes at first: 1.35 to 1.9 times as fast as topk
    over the row for F 1024 to 32768. Blocks of 16 do the same, of 4 and 32 less.

    Exact: if one of the k largest were outside the k blocks with the largest maxima, those k maxima
    would all be at least as large, and so make up an equal top k."""
    n, d_sae = pre.shape
    if d_sae % BLOCK or d_sae < 2 * BLOCK * k:
        values, indices = pre.topk(k, dim=-1, sorted=False)
        return values, indices
    num_blocks = d_sae // BLOCK  # block i holds latents i, i + num_blocks, i + 2 * num_blocks ...
    best = pre.view(n, BLOCK, num_blocks).amax(dim=1).topk(k, dim=-1, sorted=False).indices  # [N, k]
    members = best.unsqueeze(1) + num_blocks * torch.arange(BLOCK, device="cpu").unsqueeze(1)
    members = members.view(n, BLOCK * k)
    values, place = pre.gather(1, members).topk(k, dim=-1, sorted=False)
    return values, members.gather(1, place)


def batch_topk_encode(x: Tensor, w: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """What is not above the N * k-th best so far is left out as soon as it has been computed."""
    acc = accumulate_dtype(x, w, b)
    product = preactivations(w, b, acc)
    n, d_sae, budget = len(x), len(w), len(x) * k
    values = torch.empty(0, dtype=acc, device="cpu")
    places = torch.empty(0, dtype=torch.int64, device="cpu")  # row * F + latent
    least = torch.zeros((), dtype=acc, device="cpu")
    step = _chunk_rows(w, CHUNK_ELEMENTS)
    for start in range(0, n, step):
        pre = product(x[start : start + step]).view(-1)
        found = true_places((pre <= least).logical_not_())  # NaN is among them
        values, places = torch.cat([values, pre[found]]), torch.cat([places, found + start * d_sae])
        if len(values) > budget:
            keep = first_largest(values, budget)
            values, places = values[keep], places[keep]
            least = values.nan_to_num(nan=torch.inf, posinf=torch.inf).amin()
    if len(values) < budget:
        values, places = _with_empty_slots(values, places, n, d_sae, budget)
    return compressed(values, places, n, d_sae)


def true_places(mask: Tensor) -> Tensor:
    """mask.nonzero().squeeze(1) of a new, mostly false mask [M]: looks at eight places at once."""
    if mask.numel() % 8:
        return mask.nonzero().squeeze(1)
    words = mask.view(torch.int64).nonzero().squeeze(1)
    word, byte = mask.view(-1, 8)[words].nonzero(as_tuple=True)
    return words[word] * 8 + byte


def _with_empty_slots(
    values: Tensor, places: Tensor, n: int, d_sae: int, count: int
) -> tuple[Tensor, Tensor]:
    """`count` slots: the empty ones at the first places that are free, as if zeros had competed."""
    missing = count - len(places)
    free = (d_sae - torch.bincount(places // d_sae, minlength=n)).cumsum(0)
    end = (int(torch.searchsorted(free, missing)) + 1) * d_sae  # rows before it have `missing` free places
    taken = torch.zeros(end, dtype=torch.bool, device="cpu")
    taken[places[places < end]] = True
    empty = taken.logical_not_().nonzero().squeeze(1)[:missing]
    places, order = torch.cat([places, empty]).sort()
    return torch.cat([values, values.new_zeros(missing)])[order], places


def threshold_encode(x: Tensor, w: Tensor, b: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    acc = accumulate_dtype(x, w, b)
    product = preactivations(w, b, acc)
    return threshold_in_chunks(
        x, len(w), acc, _chunk_rows(w, CHUNK_ELEMENTS), product, threshold, true_places
    )


def dead_encode(x: Tensor, w: Tensor, b: Tensor, k: int) -> Tensor:
    product = preactivations(w, b, accumulate_dtype(x, w, b))
    return keep_top_k(product(x).relu_(), k)


def gather_dot(rows: Tensor, indices: Tensor, weight: Tensor, offsets: Tensor | None = None) -> Tensor:
    acc = accumulate_dtype(rows, weight)
    n = len(rows)
    if indices.numel() > n * len(weight):  # more slots than places: sampled_addmm refuses such a pattern
        return chunked.gather_dot(rows, indices, weight, offsets)
    if offsets is None:
        offsets = torch.arange(n + 1, dtype=torch.int32, device="cpu") * indices.shape[1]
    out = torch.zeros(indices.shape, dtype=acc, device="cpu")
    pattern = torch.sparse_csr_tensor(
        offsets.int(),
        indices.reshape(-1),
        out.view(-1),  # its memory, so that the pattern need not be copied, nor out be a view of it
        size=(n, len(weight)),
        device="cpu",
        check_invariants=False,  # a row's columns are neither sorted nor distinct, and need not be
    )
    torch.sparse.sampled_addmm(pattern, rows.to(acc), weight.to(acc).t(), beta=0.0, out=pattern)
    return out


decode_residual = partial(decode_residual_with, gather_dot)


def segment_rows(
    values: Tensor, indices: Tensor, rows: Tensor, d_sae: int, offsets: Tensor | None = None
) -> Tensor:
    acc = accumulate_dtype(values, rows)
    order, starts = slots_by_latent(values, indices, d_sae)
    return F.embedding_bag(
        row_of_slot(indices, offsets)[order],
        rows.to(acc).contiguous(),
        starts,
        per_sample_weights=values.to(acc).reshape(-1)[order],
        mode="sum",
        include_last_offset=True,
    )


def sparse_grad(
    x: Tensor,
    g: Tensor,
    values: Tensor,
    indices: Tensor,
    w_dec: Tensor,
    scale: float = 1.0,
    dots: Tensor | None = None,
    offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if dots is None:
        dots = gather_dot(g, indices, w_dec, offsets)
    return sparse_grad_with(sums_by_latent, x, g, values, indices, len(w_dec), scale, dots, offsets)


latent_step = partial(latent_step_with, sums_by_latent)
