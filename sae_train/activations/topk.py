"""TopK: each row keeps its k largest positive pre-activations.

Source: Gao et al. 2024 (arXiv:2406.04093), after Makhzani & Frey 2013 (arXiv:1312.5663). Sparsity is
exact by construction, so there is no sparsity penalty to tune.

With `multi` the same weights also have to reconstruct with 4 k latents (the multi-TopK of Gao et al.):
codes then stay meaningful where more latents are used than in training.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sae_train.activations.annealed_k import AnnealedK, AnnealedKConfig
from sae_train.activations.base import ACTIVATIONS
from sae_train.codes import Codes
from sae_train.errors import InputError


@dataclass
class TopKConfig(AnnealedKConfig):
    """Keeps the k largest activations of each token."""

    name: str = "topk"
    multi: float = 0.0
    """Weight of the error with 4 k latents; 1/8 is Gao et al.'s. 0 is off."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.multi < float("inf"):
            raise InputError("sae.activation.multi", self.multi, "a number of at least 0")


MULTI = 4
"""How many times k the wider codes of `multi` have, as in Gao et al. 2024."""


@ACTIVATIONS.register("topk", TopKConfig)
class TopK(AnnealedK):
    """Exact top-k; fewer than k positive pre-activations leave empty slots (value 0)."""

    config: TopKConfig

    def encode(self, x: Tensor, w: Tensor, b: Tensor) -> Codes:
        values, indices = self.split.topk_encode(x, w, b, self.k)
        return Codes(values, indices, len(w))

    def encode_traced(self, x: Tensor, w: Tensor, b: Tensor) -> Codes:
        return self.encode(x, w, b)

    def forward(self, pre: Tensor) -> Codes:
        values, indices = torch.relu(pre).topk(self.k, dim=-1, sorted=False)
        return Codes(values, indices.int(), pre.shape[-1])

    def also_reconstruct(self, x: Tensor, w: Tensor, b: Tensor) -> dict[str, tuple[float, Codes]]:
        if self.config.multi == 0:
            return {}
        values, indices = self.split.topk_encode(x, w, b, min(MULTI * self.k, self.d_sae))
        return {"multi_topk": (self.config.multi, Codes(values, indices, len(w)))}
