"""How hard a sparsity penalty pushes: a number, or whatever number gives the wanted L0.

A coefficient says nothing about how sparse codes will be: that depends on the model, the layer, the width and
the length of the run. So the knob is `target_l0`, and the coefficient c is found while training:

    e = log(L0 of the batch / target_l0), cut to [-1, 1]        c <- c + gain e max(c, size / 4), once a step

A factor alone would change nothing where c is small: early in a run, when L0 is low whatever c is, c would
fall by powers of ten and need hundreds of steps to come back. So its steps are never smaller than those of a
quarter of `size`, which says how large a c is usual, and it falls to 0 and no further.

c is a tensor that never leaves the device, so nothing waits for it, and it is saved with the weights, so that
a run that goes on does so with the same bits.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sae_train.activations.base import ActivationConfig
from sae_train.errors import InputError

LARGEST_ERROR = 1.0
"""One batch changes c by at most the share `gain`, or that of size / 4, whatever is in it."""
CALM = 0.1
"""Last share of a run, over which gains fall to CALMEST of theirs: so that L0 in the end is not that of a few
batches. The learning rate is small by then, and there is little left to follow."""
CALMEST = 0.1
LATE = 0.2
"""Last share of a run, in which weights follow a penalty less and less."""


@dataclass
class PenaltyConfig(ActivationConfig):
    """What activations share whose codes are sparse because of a penalty."""

    target_l0: float | None = 32.0
    """Mean number of active latents per token at the end of training; 32 as the k of top-k. null: as many as
    `coefficient` leaves."""
    coefficient: float = 1.0
    """Weight of the penalty, where target_l0 does not find it."""
    warmup: float = 0.05
    """Share of the run over which the penalty rises from 0."""

    def __post_init__(self) -> None:
        if self.target_l0 is not None and not 0 < self.target_l0 < math.inf:
            raise InputError("sae.activation.target_l0", self.target_l0, "a number above 0, or null")
        if not 0 < self.coefficient < math.inf:
            raise InputError("sae.activation.coefficient", self.coefficient, "a finite number above 0")
        if not 0 <= self.warmup <= 1:
            raise InputError("sae.activation.warmup", self.warmup, "a share of the run, from 0 to 1")


class L0Control(nn.Module):
    """The coefficient of a penalty and, with a target, the loop that moves it.

    Attributes:
        coefficient: scalar float32 buffer c.
        size: scalar float32 buffer, how large a c is usual.
        warm: factor of the penalty in this step, 1 after warm-up; a function of (step, steps) alone.
        calm: factor of every gain, likewise; falls at the end of a run.
        late: whether the learning rate, by default, is falling.
        error: e of the latest batch, 0 without a target; not part of the state.
    """

    coefficient: Tensor
    size: Tensor

    def __init__(self, config: PenaltyConfig, d_sae: int) -> None:
        super().__init__()
        if config.target_l0 is not None and config.target_l0 > d_sae:
            raise InputError(
                "sae.activation.target_l0",
                config.target_l0,
                f"at most the number of latents, d_sae={d_sae}, or null",
            )
        self.config = config
        self.register_buffer("coefficient", torch.tensor(float(config.coefficient)))
        self.register_buffer("size", torch.tensor(float(config.coefficient)))
        self.warm = 1.0
        self.calm = 1.0
        self.late = False
        self.error: Tensor | float = 0.0
        self._due = True

    def begin_step(self, step: int, steps: int) -> None:
        warmup = self.config.warmup * steps
        self.warm = min(1.0, step / warmup) if warmup > 0 else 1.0
        left = 1 - step / steps
        self.calm = min(1.0, max(CALMEST, left / CALM))
        self.late = left <= LATE
        self._due = True

    @torch.no_grad()
    def observe(self, l0: Tensor, finite: Tensor, gain: float) -> None:
        """Note the mean L0 (scalar) of a batch. The first micro-batch of a step moves c, so that a gain is
        per step however it is cut up. Rows that are not finite (0-dim bool) move nothing."""
        if self.config.target_l0 is None:
            return
        error = (l0 / self.config.target_l0).log().clamp(-LARGEST_ERROR, LARGEST_ERROR)
        self.error = torch.where(finite, error, 0.0)
        if self._due:
            step = gain * self.calm * self.error * torch.maximum(self.coefficient, self.size / 4)
            self.coefficient.add_(step).clamp_(min=0)
            self._due = False

    @torch.no_grad()
    def begin(self, coefficient: Tensor | float, size: Tensor | float) -> None:
        """Start the loop there."""
        self.coefficient.fill_(coefficient)
        self.size.fill_(size)


def start_k(target_l0: float, d_sae: int) -> int:
    """Whole number of latents per row to begin with."""
    return max(1, min(round(target_l0), d_sae))
