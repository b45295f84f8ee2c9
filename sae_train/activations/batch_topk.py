"""BatchTopK: a batch keeps its k N largest positive pre-activations, so that its rows share a budget.

Source: Bussmann, Leask & Nanda 2024 (arXiv:2412.06410). A row with much in it gets more latents, one with
little gets fewer, and k is only their mean.

The codes of a row must not depend on the rows beside it once the SAE is used: then it keeps what is above one
threshold, the mean over the latest batches of the smallest pre-activation that a batch kept. That is an
exponential average, freed of the bias of its start, learned in `encode_training` and published:

    weight <- d weight + (1 - d)        threshold <- threshold + (1 - d) / weight (smallest kept - threshold)
"""

from dataclasses import dataclass

import torch
from sae_kernels import threshold_encode
from torch import Tensor
from torch.distributed import ReduceOp

from sae_train.activations.annealed_k import AnnealedK, AnnealedKConfig
from sae_train.activations.base import ACTIVATIONS
from sae_train.activations.rectangle import rectangle
from sae_train.codes import Codes
from sae_train.errors import InputError


@dataclass
class BatchTopKConfig(AnnealedKConfig):
    """Keeps the N * k largest activations of the batch, so tokens share the budget."""

    name: str = "batch_topk"
    threshold_decay: float = 0.95
    """Of the threshold's average, per batch; 0 takes the last batch alone. The smallest of thousands that a
    batch keeps is known well, so a long memory lags more than it averages."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.threshold_decay < 1:
            raise InputError(
                "sae.activation.threshold_decay", self.threshold_decay, "a number from 0 to below 1"
            )


@ACTIVATIONS.register("batch_topk", BatchTopKConfig)
class BatchTopK(AnnealedK):
    """The largest of a batch while training, what is above a threshold afterwards.

    Attributes:
        threshold: scalar buffer, in the units of pre-activations; 0 (all that is positive) before training.
        threshold_weight: scalar buffer, the share of the average that comes from batches: 0 to 1.
    """

    config: BatchTopKConfig
    threshold: Tensor
    threshold_weight: Tensor

    def __init__(self, config: BatchTopKConfig, d_sae: int) -> None:
        super().__init__(config, d_sae)
        self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("threshold_weight", torch.zeros(()))

    def encode(self, x: Tensor, w: Tensor, b: Tensor) -> Codes:
        return rectangle(*threshold_encode(x, w, b, self.threshold), len(w))

    def own_threshold(self, latents: Tensor) -> Tensor:
        return self.threshold.clamp_min(0)

    def encode_training(self, x: Tensor, w: Tensor, b: Tensor) -> Codes:
        values, indices, offsets = self.split.batch_topk_encode(x, w, b, self.k)
        self._learn(values.detach())
        return rectangle(values, indices, offsets, len(w))

    def forward(self, pre: Tensor) -> Codes:
        return Codes(torch.where(pre > self.threshold, torch.relu(pre), 0), None, pre.shape[-1])

    @torch.no_grad()
    def _learn(self, kept: Tensor) -> None:
        """Take the smallest of what a batch kept into the threshold. Zeros are empty slots; a batch of
        nothing else, or with a value that is not finite, teaches nothing."""
        none = kept.new_full((1,), torch.inf)  # a process may have none of the slots
        smallest = torch.cat([torch.where(kept > 0, kept, torch.inf), none]).amin()
        smallest = self.split.all.sum(smallest, ReduceOp.MIN)
        good = torch.isfinite(smallest) & self.split.all.all(torch.isfinite(kept).all())
        share = 1 - self.config.threshold_decay
        weight = self.threshold_weight + share * (1 - self.threshold_weight)
        moved = self.threshold + share / weight * (smallest - self.threshold)
        self.threshold.copy_(torch.where(good, moved, self.threshold))
        self.threshold_weight.copy_(torch.where(good, weight, self.threshold_weight))

    @torch.no_grad()
    def fold_(self, scale: Tensor) -> None:
        self.threshold.div_(scale)
