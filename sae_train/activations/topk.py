"""TopK: each row keeps its k largest positive pre-activations.

Source: Gao et al. 2024 (arXiv:2406.04093), after Makhzani & Frey 2013 (arXiv:1312.5663). Sparsity is
exact by construction, so there is no sparsity penalty to tune.

k may begin larger and fall to its value over the first part of a run, so that all latents learn something
first. With `multi` the same weights also have to reconstruct with 4 k latents (the multi-TopK of Gao et al.):
codes then stay meaningful where more latents are used than in training.
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
    k_start: int | None = None
    """k of the first step, from which it falls linearly to k. Unset: k."""
    k_steps: float = 0.2
    """Share of the run over which it falls."""
    multi: float = 0.0
    """Weight of the error with 4 k latents; 1/8 is Gao et al.'s. 0 is off."""

    def __post_init__(self) -> None:
        if self.k < 1:
            raise InputError("sae.activation.k", self.k, "a whole number of at least 1")
        if self.k_start is not None and self.k_start < self.k:
            raise InputError("sae.activation.k_start", self.k_start, f"null, or at least k={self.k}")
        if not 0 < self.k_steps <= 1:
            raise InputError(
                "sae.activation.k_steps", self.k_steps, "a share of the run, above 0 and at most 1"
            )
        if not 0 <= self.multi < float("inf"):
            raise InputError("sae.activation.multi", self.multi, "a number of at least 0")


MULTI = 4
"""How many times k the wider codes of `multi` have, as in Gao et al. 2024."""


@ACTIVATIONS.register("topk", TopKConfig)
class TopK(Activation):
    """Exact top-k; fewer than k positive pre-activations leave empty slots (value 0)."""

    config: TopKConfig

    def __init__(self, config: TopKConfig, d_sae: int) -> None:
        for key, k in (("k", config.k), ("k_start", config.k_start or 1)):
            if k > d_sae:
                raise InputError(f"sae.activation.{key}", k, f"at most the number of latents, d_sae={d_sae}")
        super().__init__(config, d_sae)
        self.k = config.k
        """Of the step that `begin_step` announced."""

    def begin_step(self, step: int, steps: int) -> None:
        self.k = annealed(self.config.k_start, self.config.k, step / (self.config.k_steps * steps))

    def encode(self, x: Tensor, w: Tensor, b: Tensor) -> Codes:
        values, indices = topk_encode(x, w, b, self.k)
        return Codes(values, indices, self.d_sae)

    def forward(self, pre: Tensor) -> Codes:
        values, indices = torch.relu(pre).topk(self.k, dim=-1, sorted=False)
        return Codes(values, indices.int(), self.d_sae)

    def also_reconstruct(self, x: Tensor, w: Tensor, b: Tensor) -> dict[str, tuple[float, Codes]]:
        if self.config.multi == 0:
            return {}
        values, indices = topk_encode(x, w, b, min(MULTI * self.k, self.d_sae))
        return {"multi_topk": (self.config.multi, Codes(values, indices, self.d_sae))}


def annealed(start: int | None, end: int, progress: float) -> int:
    """From start to end, linearly, as progress goes from 0 to 1; end without a start."""
    return end if start is None or progress >= 1 else round(start + (end - start) * progress)
