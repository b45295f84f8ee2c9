"""TopK: each row keeps its k largest positive pre-activations.

Source: Gao et al. 2024 (arXiv:2406.04093), after Makhzani & Frey 2013 (arXiv:1312.5663). Sparsity is
exact by construction, so there is no sparsity penalty to tune.
"""

from dataclasses import dataclass

import torch
from sae_kernels import topk_encode
from torch import Tensor

from sae_train.activations.base import ACTIVATIONS, Activation, ActivationConfig
from sae_train.codes import Codes
from sae_train.errors import InputError


@dataclass
class TopKConfig(ActivationConfig):
    """Keeps the k largest activations of each token."""

    name: str = "topk"
    k: int = 32
    """Most latents active on a token. 32 is the middle of the range that published SAEs use (16-128)."""

    def __post_init__(self) -> None:
        if self.k < 1:
            raise InputError("sae.activation.k", self.k, "a whole number of at least 1")


@ACTIVATIONS.register("topk", TopKConfig)
class TopK(Activation):
    """Exact top-k; fewer than k positive pre-activations leave empty slots (value 0)."""

    config: TopKConfig

    def __init__(self, config: TopKConfig, d_sae: int) -> None:
        if config.k > d_sae:
            raise InputError("sae.activation.k", config.k, f"at most the number of latents, d_sae={d_sae}")
        super().__init__(config, d_sae)

    def encode(self, x: Tensor, w: Tensor, b: Tensor) -> Codes:
        values, indices = topk_encode(x, w, b, self.config.k)
        return Codes(values, indices, self.d_sae)

    def forward(self, pre: Tensor) -> Codes:
        values, indices = torch.relu(pre).topk(self.config.k, dim=-1, sorted=False)
        return Codes(values, indices.int(), self.d_sae)
