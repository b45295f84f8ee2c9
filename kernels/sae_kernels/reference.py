"""The definition of every op: readable, any device, differentiated by plain autograd.

The other backends are held equal to this file by test, forward and gradient. It may build
[N, F] and [N, K, D] tensors on the way; use it to check numbers, not to train at size. On a GPU
its sums over latents use float atomics, so two runs differ in the last bits.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sae_kernels.contracts import accumulate_dtype, product_dtype


def supports(op: str, *tensors: Tensor) -> str | None:
    """Everything, everywhere."""
    return None


def topk_encode(x: Tensor, w: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    acc, rounded = accumulate_dtype(x, w, b), product_dtype(x, w)
    with torch.autocast(x.device.type, enabled=False):
        pre = F.linear(x.to(acc), w.to(acc), b.to(acc))  # [N, F]
        if rounded != acc:  # selects and returns the rounded product, with the gradient of the exact one
            low = F.linear(x.detach().to(rounded).to(acc), w.detach().to(rounded).to(acc), b.detach().to(acc))
            pre = pre + (low - pre.detach())
    # A stable sort keeps the order of equal values: of a tie, the smaller index comes first.
    values, indices = pre.relu().sort(dim=-1, descending=True, stable=True)
    return values[:, :k], indices[:, :k].int()


def sparse_decode(values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    acc = accumulate_dtype(values, weight)
    rows = weight[indices.long()].to(acc)  # [N, K, D]
    return (values.to(acc).unsqueeze(-1) * rows).sum(dim=1).to(weight.dtype)


def gather_dot(rows: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    acc = accumulate_dtype(rows, weight)
    return (rows.to(acc).unsqueeze(1) * weight[indices.long()].to(acc)).sum(dim=-1)


def segment_rows(values: Tensor, indices: Tensor, rows: Tensor, d_sae: int) -> Tensor:
    acc = accumulate_dtype(values, rows)
    parts = values.to(acc).unsqueeze(-1) * rows.to(acc).unsqueeze(1)  # [N, K, D]
    out = parts.new_zeros(d_sae, rows.shape[-1])
    return out.index_add(0, indices.flatten().long(), parts.flatten(0, 1))
