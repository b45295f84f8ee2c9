"""`latent_step` on a CPU: the frame of `chunked_step` with sums that leave empty slots out.

Reading a tensor costs nothing here, so the number of slots that are not empty is known, and short
sums are taken by `segment_reduce`, which a GPU would have to be waited for.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sae_kernels.slots import row_of_slot


def sums_by_latent(
    x: Tensor,
    g: Tensor,
    dz: Tensor,
    values: Tensor,
    indices: Tensor,
    d_sae: int,
    scale: float,
    offsets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    order, starts = slots_by_latent(values, indices, d_sae)
    acc = dz.dtype
    rows = row_of_slot(indices, offsets)[order]
    values, dz = values.reshape(-1)[order].to(acc), dz.reshape(-1)[order]

    def bags(slots: Tensor, of: Tensor) -> Tensor:
        return F.embedding_bag(
            rows,
            of.to(acc).contiguous(),
            starts,
            per_sample_weights=slots,
            mode="sum",
            include_last_offset=True,
        )

    def sums(slots: Tensor) -> Tensor:
        return torch.segment_reduce(slots, "sum", offsets=starts, initial=0.0)

    return bags(dz, x), bags(values * scale, g), sums(dz), sums(values * dz), starts.diff() > 0


def slots_by_latent(values: Tensor, indices: Tensor, d_sae: int) -> tuple[Tensor, Tensor]:
    """As in `slots`, without the empty slots: order [M], starts [d_sae + 1]."""
    values, keys = values.reshape(-1), indices.reshape(-1)
    empty = values == 0
    if bool(empty.any()):
        keys = keys.masked_fill(empty, d_sae)
    counts = torch.bincount(keys, minlength=d_sae + 1)
    starts = counts.new_zeros(d_sae + 1)
    torch.cumsum(counts[:d_sae], 0, out=starts[1:])
    return keys.sort(stable=True).indices[: int(starts[-1])], starts
