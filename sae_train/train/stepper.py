"""One training step of one member. A step is a strategy; the one here works for all and is the truth."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sae_train.batch import Batch
from sae_train.losses import Losses
from sae_train.train.members import Member


@dataclass(frozen=True, slots=True)
class Step:
    """What a step leaves behind for logging; all tensors stay on the device.

    With gradient accumulation `losses` and `batch` are those of the last micro-batch.
    """

    losses: Losses
    batch: Batch
    grad_norm: Tensor
    """Scalar, before clipping. NaN for a step that was left out because its loss was a spike."""


class Stepper(Protocol):
    """Runs forward, backward and update for one member on one batch."""

    def step(self, member: Member, batch: Batch) -> Step: ...


class AutogradStepper:
    """Plain autograd, torch's clipping and torch's optimizer.

    Args:
        accumulate: micro-batches per step; their gradients are averaged.
        autocast: dtype of the encoder's matrix products (masters stay float32), or None for float32.
    """

    def __init__(self, accumulate: int = 1, autocast: torch.dtype | None = None) -> None:
        self.accumulate = accumulate
        self.autocast = autocast

    def step(self, member: Member, batch: Batch) -> Step:
        sae, optimizer = member.sae, member.optimizer
        assert member.config.optim.beyond_adam() is None, "choose_stepper was not asked"
        optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=batch.x.device)
        for x, y in zip(batch.x.chunk(self.accumulate), batch.y.chunk(self.accumulate), strict=True):
            with torch.autocast(x.device.type, dtype=self.autocast, enabled=self.autocast is not None):
                losses = sae.losses(Batch(x, y), member.dead)
            share = losses.total * (len(x) / len(batch.x))
            share.backward()
            total += share.detach()
            member.stats.update(losses.codes)
        sae.before_step()
        clip = member.config.optim.clip
        parameters = [p for p in sae.parameters() if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip if clip is not None else torch.inf)
        norm = torch.where(member.spikes.judge(total), torch.nan, norm)
        self._skip_when_not_finite(member, norm)
        count_skipped(member, norm)
        optimizer.step()
        sae.after_step(skipped=~torch.isfinite(norm))
        member.schedule.step()
        if member.average is not None:
            member.average.update_parameters(sae)
        return Step(losses, Batch(x, y), norm)

    @staticmethod
    def _skip_when_not_finite(member: Member, norm: Tensor) -> None:
        """Tell fused Adam to leave weights and moments alone if the gradient is not finite.

        `found_inf` is the device-side switch that GradScaler uses; reading it on the host, which
        would stall the device at every step, is never needed.
        """
        member.optimizer.found_inf = (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]
        member.optimizer.grad_scale = None  # type: ignore[attr-defined]


def count_skipped(member: Member, norm: Tensor) -> None:
    """Count a step whose gradient norm (0-dim) was not finite, without waiting for the device."""
    bad = ~torch.isfinite(norm)
    member.skipped += bad
    member.skipped_in_a_row = (member.skipped_in_a_row + 1) * bad
