"""The ops in plain torch at training size, on CUDA and CPU: bounded temporaries, no float atomics.

This is what `auto` takes on a GPU without a faster backend. Its parts are also the frame of the
CPU backend, which replaces what a CPU does better in another way.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sae_kernels.contracts import accumulate_dtype
from sae_kernels.slots import row_of_slot, slots_by_latent

DEVICES = ("cpu", "cuda")
# Elements of the largest temporary: 256 MiB of float32 preactivations or of gathered weight rows.
CHUNK_ELEMENTS = 64 << 20


def supports(op: str, *tensors: Tensor) -> str | None:
    for tensor in tensors:
        if tensor.device.type not in DEVICES:
            return f"a tensor is on {tensor.device}, and it is written for {' and '.join(DEVICES)}"
    return None


def topk_encode(x: Tensor, w: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    acc = accumulate_dtype(x, w, b)
    b = b.to(acc)

    def codes(part: Tensor) -> tuple[Tensor, Tensor]:
        pre = F.linear(part, w, b) if w.dtype == acc else F.linear(part, w).to(acc).add_(b)
        values, indices = pre.topk(k, dim=-1, sorted=False)
        return values, indices

    return encode_in_chunks(x, k, acc, max(1, CHUNK_ELEMENTS // len(w)), codes)


def encode_in_chunks(
    x: Tensor, k: int, acc: torch.dtype, max_rows: int, codes: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Codes of x [N, D] from the top k pre-activations of at most max_rows rows at a time."""
    values = torch.empty(len(x), k, dtype=acc, device=x.device)
    indices = torch.empty(len(x), k, dtype=torch.int32, device=x.device)
    num_chunks = max(1, -(-len(x) // max_rows))
    rows = max(1, -(-len(x) // num_chunks))  # of equal size: a small last chunk would waste its product
    for start in range(0, len(x), rows):
        part = slice(start, start + rows)
        top, indices[part] = codes(x[part])
        values[part] = top.relu_()  # after the selection: positive pre-activations come first either way
    return values, indices


def sparse_decode(values: Tensor, indices: Tensor, weight: Tensor, offsets: Tensor | None = None) -> Tensor:
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
