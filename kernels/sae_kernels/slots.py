"""Slots of codes: which row a slot belongs to, and slots in the order of their latents.

Codes have one of two layouts. With K slots in every row, values and indices are [N, K]. With a
number of slots that differs from row to row they are [M], and `offsets` [N + 1] says where each
row's slots begin: row n has slots offsets[n] to offsets[n + 1] (compressed sparse rows).
"""

import torch
from torch import Tensor


def num_rows(indices: Tensor, offsets: Tensor | None) -> int:
    """N, without waiting for a device."""
    return len(indices) if offsets is None else len(offsets) - 1


def row_of_slot(indices: Tensor, offsets: Tensor | None) -> Tensor:
    """[M] int64: the row of each slot, in the order of `indices.reshape(-1)`."""
    if offsets is None:
        slots = torch.arange(indices.numel(), device=indices.device)
        return slots.div_(max(1, indices.shape[1]), rounding_mode="floor")
    rows = torch.arange(len(offsets) - 1, device=indices.device)
    return rows.repeat_interleave(offsets.diff(), output_size=len(indices))


def offsets_of(counts: Tensor) -> Tensor:
    """counts [N] int64 of slots per row -> offsets [N + 1] int64."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def slots_by_latent(values: Tensor, indices: Tensor, d_sae: int) -> tuple[Tensor, Tensor]:
    """Slots in the order of their latents, rows in order within each, empty slots after all others.

    Args:
        values, indices: [N, K] or [M].

    Returns:
        order [M] int64: numbers of slots in `indices.reshape(-1)`.
        starts [d_sae + 1] int64: where in `order` each latent's slots begin, then where the empty ones do."""
    keys = indices.masked_fill(values == 0, d_sae).reshape(-1)
    keys, order = keys.sort(stable=True)
    return order, torch.searchsorted(keys, torch.arange(d_sae + 1, dtype=keys.dtype, device=keys.device))
