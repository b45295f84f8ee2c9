"""The values of a few latents, out of codes of all."""

import torch
from torch import Tensor

from sae_train.codes import Codes


def values_of(codes: Codes, latents: Tensor) -> Tensor:
    """[N, L]: the values that latents [L] have in codes [N, K]; 0 where they are not active."""
    if codes.indices is None:
        return codes.values.index_select(1, latents)
    column = latents.new_full((codes.d_sae,), len(latents))
    column[latents] = torch.arange(len(latents), device=latents.device)
    found = codes.values.new_zeros(len(codes.values), len(latents) + 1)  # the last column is for all others
    found = found.scatter_add(1, column[codes.latents()], codes.values)
    return found.index_select(1, column[latents])  # a latent that was asked for twice has one column
