"""The ops in plain torch at training size, on CUDA and CPU: bounded temporaries, no float atomics.

This is what `auto` takes on a GPU without a faster backend. Its parts are also the frame of the
CPU backend, which replaces what a CPU does better in another way.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from sae_kernels.chunked_step import latent_step, settle, sparse_grad_with, sums_by_latent
from sae_kernels.contracts import accumulate_dtype
from sae_kernels.slots import num_rows, row_of_slot, slots_by_latent

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

DEVICES = ("cpu", "cuda")
# Elements of the largest temporary: 256 MiB of float32 preactivations or of gathered weight rows.
CHUNK_ELEMENTS = 64 << 20
TILE_ROWS = 16
"""Rows of a chunk are a multiple of this: of 683 rows a CPU's product of bfloat16 takes a tenth longer."""


def supports(op: str, *tensors: Tensor) -> str | None:
    for tensor in tensors:
        if tensor.device.type not in DEVICES:
            return f"a tensor is on {tensor.device}, and it is written for {' and '.join(DEVICES)}"
    return None


def topk_encode(x: Tensor, w: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    acc = accumulate_dtype(x, w, b)
    product = preactivations(w, b, acc)

    def codes(part: Tensor) -> tuple[Tensor, Tensor]:
        values, indices = product(part).topk(k, dim=-1, sorted=False)
        return values, indices

    return encode_in_chunks(x, k, acc, max(1, CHUNK_ELEMENTS // len(w)), codes)


def preactivations(w: Tensor, b: Tensor, acc: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Rows -> their pre-activations in acc, which are new memory."""
    b, narrow = b.to(acc), w.dtype != acc
    if narrow and (acc == torch.float64 or not w.is_cuda):  # without a product into a wider dtype
        w, narrow = w.to(acc), False

    def product(part: Tensor) -> Tensor:
        if not narrow:
            return F.linear(part.to(acc), w, b)
        if torch.version.hip is not None:  # nor is there one here: it is rounded
            return F.linear(part, w).to(acc).add_(b)
        return torch.mm(part, w.t(), out_dtype=acc).add_(b)

    return product


def encode_in_chunks(
    x: Tensor, k: int, acc: torch.dtype, max_rows: int, codes: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Codes of x [N, D] from the top k pre-activations of at most max_rows rows at a time."""
    values = torch.empty(len(x), k, dtype=acc, device=x.device)
    indices = torch.empty(len(x), k, dtype=torch.int32, device=x.device)
    num_chunks = max(1, -(-len(x) // max_rows))
    # Nearly of equal size: a small last chunk would waste its product.
    rows = TILE_ROWS * max(1, -(-len(x) // (num_chunks * TILE_ROWS)))
    for start in range(0, len(x), rows):
        part = slice(start, start + rows)
        top, indices[part] = codes(x[part])
        values[part] = top.relu_()  # after the selection: positive pre-activations come first either way
    return values, indices


def batch_topk_encode(x: Tensor, w: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """A chunk of rows at a time competes with the best so far; all sizes are known to the host.

    Candidates stay in the order of (row, latent), so that of a tie the first are kept."""
    acc = accumulate_dtype(x, w, b)
    product = preactivations(w, b, acc)
    n, d_sae, budget = len(x), len(w), len(x) * k
    values = torch.empty(0, dtype=acc, device=x.device)
    places = torch.empty(0, dtype=torch.int64, device=x.device)  # row * F + latent
    step = max(1, CHUNK_ELEMENTS // 4 // d_sae)  # beside each candidate there are two or three int64 numbers
    for start in range(0, n, step):
        acts = product(x[start : start + step]).relu_().flatten()
        here = torch.arange(start * d_sae, start * d_sae + len(acts), device=x.device)
        values, places = torch.cat([values, acts]), torch.cat([places, here])
        if len(values) > budget:
            keep = first_largest(values, budget)
            slot = torch.where(keep, keep.cumsum(0) - 1, budget)  # what is not kept goes past the end
            values = values.new_empty(budget + 1).scatter_(0, slot, values)[:budget]
            places = places.new_empty(budget + 1).scatter_(0, slot, places)[:budget]
    return compressed(values, places, n, d_sae)


def first_largest(values: Tensor, count: int) -> Tensor:
    """Mask of the `count` largest of values [M]; the first of equal ones. NaN is largest, as for topk."""
    values = values.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    least = values.topk(count, sorted=False).values.amin()
    above, equal = values > least, values == least
    return above | (equal & (equal.cumsum(0) <= count - above.sum()))


def compressed(values: Tensor, places: Tensor, n: int, d_sae: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes with offsets from ascending places row * F + latent."""
    ends = torch.arange(n + 1, device=places.device) * d_sae
    return values, (places % d_sae).int(), torch.searchsorted(places, ends)


def threshold_encode(x: Tensor, w: Tensor, b: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    acc = accumulate_dtype(x, w, b)
    product = preactivations(w, b, acc)
    rows = max(1, CHUNK_ELEMENTS // max(1, len(w)))
    return threshold_in_chunks(
        x, len(w), acc, rows, product, threshold, lambda mask: mask.nonzero().squeeze(1)
    )


def threshold_in_chunks(
    x: Tensor,
    d_sae: int,
    acc: torch.dtype,
    max_rows: int,
    product: Callable[[Tensor], Tensor],
    threshold: Tensor,
    true_places: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """The host waits once for each chunk, unless all rows fit in one."""
    values = [torch.empty(0, dtype=acc, device=x.device)]
    places = [torch.empty(0, dtype=torch.int64, device=x.device)]
    least = threshold.to(acc).clamp_min(0)
    for start in range(0, len(x), max_rows):
        pre = product(x[start : start + max_rows])
        found = true_places((pre > least).flatten())
        values.append(pre.flatten()[found])
        places.append(found + start * d_sae)
    return compressed(torch.cat(values), torch.cat(places), len(x), d_sae)


def dead_encode(x: Tensor, w: Tensor, b: Tensor, k: int) -> Tensor:
    return keep_top_k(preactivations(w, b, accumulate_dtype(x, w, b))(x).relu_(), k)


def keep_top_k(acts: Tensor, k: int) -> Tensor:
    """Zero all but the k largest of each row, in place."""
    if k >= acts.shape[1]:
        return acts
    values, indices = acts.topk(k, dim=-1, sorted=False)
    return acts.zero_().scatter_(1, indices, values)


def sparse_decode(values: Tensor, indices: Tensor, weight: Tensor, offsets: Tensor | None = None) -> Tensor:
    if indices.numel() == 0 or weight.shape[1] == 0:  # embedding_bag takes no rows of length zero
        return weight.new_zeros(num_rows(indices, offsets), weight.shape[1])
    acc = accumulate_dtype(values, weight)
    bags = F.embedding_bag(
        indices.contiguous(),
        weight.to(acc).contiguous(),
        None if offsets is None else offsets.to(indices.dtype),
        per_sample_weights=values.to(acc).contiguous(),
        mode="sum",
        include_last_offset=offsets is not None,
    )
    return bags.to(weight.dtype)


def decode_residual_with(
    gather_dot: Callable[..., Tensor],
    values: Tensor,
    indices: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`decode_residual` with a backend's own products of rows."""
    acc = accumulate_dtype(values, weight, bias, target)
    weight = weight.to(acc)
    out = sparse_decode(values, indices, weight, offsets).add_(bias.to(acc))
    exact = torch.sub(target.to(acc), out, out=out)
    residual = exact.to(target.dtype)
    return residual, torch.linalg.vecdot(exact, exact), gather_dot(residual, indices, weight, offsets)


def gather_dot(rows: Tensor, indices: Tensor, weight: Tensor, offsets: Tensor | None = None) -> Tensor:
    acc = accumulate_dtype(rows, weight)
    rows = rows.to(acc)
    out = torch.empty(indices.shape, dtype=acc, device=rows.device)
    if offsets is not None:
        row = row_of_slot(indices, offsets)
        step = max(1, CHUNK_ELEMENTS // max(1, weight.shape[1]))
        for start in range(0, len(indices), step):
            part = slice(start, start + step)
            out[part] = (weight[indices[part]].to(acc) * rows[row[part]]).sum(dim=-1)  # [step, D]
        return out
    step = max(1, CHUNK_ELEMENTS // max(1, indices.shape[1] * weight.shape[1]))
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        gathered = weight[indices[part]].to(acc)  # [step, K, D]
        out[part] = torch.bmm(gathered, rows[part].unsqueeze(-1)).squeeze(-1)
    return out


decode_residual = partial(decode_residual_with, gather_dot)


def segment_rows(
    values: Tensor, indices: Tensor, rows: Tensor, d_sae: int, offsets: Tensor | None = None
) -> Tensor:
    acc = accumulate_dtype(values, rows)
    order, starts = slots_by_latent(values, indices, d_sae)
    # The empty slots form one more bag. Cutting them off would wait for the device to say how many they are.
    starts = torch.cat([starts, starts.new_full((1,), values.numel())])
    bags = F.embedding_bag(
        row_of_slot(indices, offsets)[order],
        rows.to(acc).contiguous(),
        starts,
        per_sample_weights=values.to(acc).reshape(-1)[order],
        mode="sum",
        include_last_offset=True,
    )
    return bags[:d_sae]


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
