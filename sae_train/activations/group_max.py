"""GroupMax: latents stand in k groups, and each group keeps its largest positive pre-activation.

Source: "groupmax" of sparsify (EleutherAI), whose groups these are: group i holds latents i F / k to
(i + 1) F / k - 1. The k winners are found without any selection over all F latents, and no two latents of a
group are ever active together.

Winners are found in chunks of rows and without gradients. Their values are then computed again, k products a
row, so that nothing of size [N, F] is kept, and the gradients are those of k latents instead of F.
"""

from dataclasses import dataclass

import torch
from sae_kernels import gather_dot
from torch import Tensor
from torch.nn import functional

from sae_train.activations.base import ACTIVATIONS, Activation, ActivationConfig
from sae_train.codes import Codes
from sae_train.errors import InputError
from sae_train.split import Split

CHUNK_ELEMENTS = 1 << 24
"""Pre-activations at a time: 64 MiB of float32."""


@dataclass
class GroupMaxConfig(ActivationConfig):
    """Keeps the largest activation of each of k groups of latents."""

    name: str = "group_max"
    k: int = 32
    """Groups, and with that the most latents active on a token; divides d_sae. As that of top-k."""

    def __post_init__(self) -> None:
        if self.k < 1:
            raise InputError("sae.activation.k", self.k, "a whole number of at least 1")


@ACTIVATIONS.register("group_max", GroupMaxConfig)
class GroupMax(Activation):
    """Slot i of a row is group i; a group without a positive pre-activation is an empty slot."""

    config: GroupMaxConfig

    def __init__(self, config: GroupMaxConfig, d_sae: int) -> None:
        if d_sae % config.k:
            raise InputError(
                "sae.activation.k", config.k, f"a divisor of the number of latents, d_sae={d_sae}"
            )
        super().__init__(config, d_sae)

    def encode(self, x: Tensor, w: Tensor, b: Tensor) -> Codes:
        with torch.no_grad():
            rows = x.split(max(1, CHUNK_ELEMENTS // len(w)))
            winners = torch.cat([self._winners(functional.linear(part, w, b))[1] for part in rows])
        # Indexing b would have a backward pass that adds in no fixed order on a GPU.
        values = gather_dot(x, winners, w) + gather_dot(x.new_ones(len(x), 1), winners, b[:, None])
        return Codes(torch.relu(values), winners, len(w))

    def forward(self, pre: Tensor) -> Codes:
        largest, winners = self._winners(pre)
        return Codes(torch.relu(largest), winners, pre.shape[-1])

    def split_(self, split: Split) -> None:
        if self.config.k % split.latents.size:
            raise InputError(
                "mesh.feature", split.latents.size, f"a divisor of the number of groups, k={self.config.k}"
            )
        super().split_(split)

    def _winners(self, pre: Tensor) -> tuple[Tensor, Tensor]:
        """Largest value of each group, and which latent it is: [N, k], [N, k] int32."""
        size = self.d_sae // self.config.k
        largest, place = pre.unflatten(-1, (-1, size)).max(dim=-1)
        first = torch.arange(0, pre.shape[-1], size, dtype=torch.int32, device=pre.device)
        return largest, place.int() + first
