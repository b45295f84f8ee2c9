"""The fast path on CPUs: library calls that do sparse work as sparse work.

Decoding is an embedding bag with per-sample weights; the gradient of a value is a sampled dense
product; a sum over each latent's rows is a stable sort followed by an embedding bag over the rows.
The timings that led to each choice are in kernels/NOTES.md.
"""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from sae_kernels.chunked import encode_in_chunks, sparse_decode
from sae_kernels.contracts import accumulate_dtype
from sae_kernels.slots import row_of_slot, slots_by_latent

__all__ = ["gather_dot", "segment_rows", "sparse_decode", "supports", "topk_encode"]

# Measured with 2 threads (AVX-512, 36 MB L3) at N 2048, D 576, F 4608: the product takes 47 ms in
# chunks of 1024 rows, 49 in 512, 57 in 256, 58 in 128, 82 in 64, 55 whole. 16 MiB of preactivations:
CHUNK_ELEMENTS = 4 << 20
MIN_CHUNK_ROWS = 256
# Of every 8 strided preactivations only the largest competes at first: 1.35 to 1.9 times as fast as
# topk over the row for F 1024 to 32768. Blocks of 16 do the same, of 4 and 32 less.
BLOCK = 8
# Without instructions for it, oneDNN's bfloat16 product takes 223 ms where float32 takes 67.
NATIVE_BF16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()

with warnings.catch_warnings():  # torch says once per process that CSR is in beta: let it say so here
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
    torch.sparse_csr_tensor([0, 0], [], [], size=(1, 1), check_invariants=False)


def supports(op: str, *tensors: Tensor) -> str | None:
    for tensor in tensors:
        if tensor.device.type != "cpu":
            return f"a tensor is on {tensor.device}"
    return None


def topk_encode(x: Tensor, w: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    acc = accumulate_dtype(x, w, b)
    b = b.to(acc)
    in_bf16 = NATIVE_BF16 and x.dtype == w.dtype == torch.bfloat16
    if not in_bf16:  # operands that were rounded stay rounded: their product is exact in float32
        x, w = x.to(acc), w.to(acc)

    def codes(part: Tensor) -> tuple[Tensor, Tensor]:
        pre = F.linear(part, w).to(acc).add_(b) if in_bf16 else F.linear(part, w, b)
        return top_k(pre, k)

    return encode_in_chunks(x, k, acc, max(MIN_CHUNK_ROWS, CHUNK_ELEMENTS // len(w)), codes)


def top_k(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and int64 indices of the k largest of each row of pre [N, F], in any order.

    Exact: if one of the k largest were outside the k blocks with the largest maxima, those k maxima
    would all be at least as large, and so make up an equal top k."""
    n, d_sae = pre.shape
    if d_sae % BLOCK or d_sae < 2 * BLOCK * k:
        values, indices = pre.topk(k, dim=-1, sorted=False)
        return values, indices
    num_blocks = d_sae // BLOCK
    blocks = pre.view(n, BLOCK, num_blocks)  # block i holds latents i, i + num_blocks, i + 2 * num_blocks ...
    best = blocks.amax(dim=1).topk(k, dim=-1, sorted=False).indices  # [N, k]
    finalists = blocks.gather(2, best.unsqueeze(1).expand(n, BLOCK, k)).view(n, BLOCK * k)
    values, place = finalists.topk(k, dim=-1, sorted=False)
    return values, place.div(k, rounding_mode="floor") * num_blocks + best.gather(1, place % k)


def gather_dot(rows: Tensor, indices: Tensor, weight: Tensor, offsets: Tensor | None = None) -> Tensor:
    _check_range(indices, len(weight))
    acc = accumulate_dtype(rows, weight)
    n = len(rows)
    if offsets is None:
        offsets = torch.arange(n + 1, dtype=torch.int32) * indices.shape[1]
    pattern = torch.sparse_csr_tensor(
        offsets.int(),
        indices.reshape(-1),
        torch.zeros(indices.numel(), dtype=acc),
        size=(n, len(weight)),
        check_invariants=False,  # a row's columns are neither sorted nor distinct, and need not be
    )
    out = torch.sparse.sampled_addmm(pattern, rows.to(acc), weight.to(acc).t(), beta=0.0)
    return out.values().view(indices.shape)


def segment_rows(
    values: Tensor, indices: Tensor, rows: Tensor, d_sae: int, offsets: Tensor | None = None
) -> Tensor:
    _check_range(indices, d_sae)
    acc = accumulate_dtype(values, rows)
    order, starts = slots_by_latent(values, indices, d_sae)
    order = order[: int(starts[-1])]  # without the empty slots
    return F.embedding_bag(
        row_of_slot(indices, offsets)[order],
        rows.to(acc).contiguous(),
        starts,
        per_sample_weights=values.to(acc).reshape(-1)[order],
        mode="sum",
        include_last_offset=True,
    )


def _check_range(indices: Tensor, d_sae: int) -> None:
    """The library calls behind this would read or drop memory out of range in silence; 11 us buy an error."""
    if indices.numel():
        least, most = (int(i) for i in indices.aminmax())
        if least < 0 or most >= d_sae:
            raise ValueError(f"indices run from {least} to {most}: expected 0 to {d_sae - 1}")
