"""One training step of one member. A step is a strategy; the one here works for all and is the truth."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from sae_train.batch import Batch, RowBatch
from sae_train.losses import Losses
from sae_train.train.members import Member
from sae_train.train.optim import constrain, published_weights


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

    def take(self, member: Member, rows: RowBatch) -> Any:
        """What `step` works on, out of the rows of all hooks."""

    def step(self, member: Member, batch: Any) -> Step: ...

    def units(self, members: Sequence[Member]) -> list[list[Member]]:
        """All members, with those together that `step_together` takes at once."""

    def step_together(self, members: Sequence[Member], batches: Sequence[Any]) -> list[Step]:
        """One step of each of a unit, on what `take` gave for it."""


class AutogradStepper:
    """Plain autograd, torch's clipping and torch's optimizer.

    Args:
        accumulate: micro-batches per step; their gradients are averaged.
        autocast: dtype of the encoder's matrix products (masters stay float32), or None for float32.
    """

    def __init__(self, accumulate: int = 1, autocast: torch.dtype | None = None) -> None:
        self.accumulate = accumulate
        self.autocast = autocast

    def take(self, member: Member, rows: RowBatch) -> Any:
        return member.batch(rows)

    def units(self, members: Sequence[Member]) -> list[list[Member]]:
        return [[member] for member in members]

    def step_together(self, members: Sequence[Member], batches: Sequence[Any]) -> list[Step]:
        return [self.step(member, batch) for member, batch in zip(members, batches, strict=True)]

    def step(self, member: Member, batch: Any) -> Step:
        sae, optimizer = member.sae, member.optimizer
        assert member.config.optim.beyond_adam() is None, "choose_stepper was not asked"
        optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=sae.input_scale.device)
        for part, context, weight in self._micro_batches(member, batch):
            with autocast(total.device, self.autocast):
                losses = self._losses(member, part, context)
            share = losses.total * weight
            share.backward()
            total += share.detach()
            member.stats.update(losses.codes, member.split.rows)
        self._share_gradients(member)
        sae.before_step()
        clip = member.config.optim.clip
        parameters = [p for p in sae.parameters() if p.grad is not None]
        norm = self._grad_norm(member)
        torch.nn.utils.clip_grads_with_norm_(parameters, clip if clip is not None else torch.inf, norm)
        norm = torch.where(member.spikes.judge(total), torch.nan, norm)
        self._skip_when_not_finite(member, norm)
        count_skipped(member.skipped, member.skipped_in_a_row, norm)
        optimizer.step()
        constrain(sae, optimizer, skipped=~torch.isfinite(norm))
        member.schedule.step()
        if member.average is not None:
            with published_weights(optimizer):
                member.average.update_parameters(sae)
        return Step(losses, part, norm)

    def _micro_batches(self, member: Member, batch: Any) -> Iterator[tuple[Batch, Any, float]]:
        """Parts of what `take` gave: rows, what else their loss needs, and their share of the step."""
        for x, y in zip(batch.x.chunk(self.accumulate), batch.y.chunk(self.accumulate), strict=True):
            yield Batch(x, y), None, len(x) / len(batch.x)

    def _losses(self, member: Member, batch: Batch, context: Any) -> Losses:
        return member.sae.losses(batch, member.dead)

    @staticmethod
    def _share_gradients(member: Member) -> None:
        """Those of the whole batch, and where processes have the same weights the same bits."""
        split, cut = member.split, member.cut
        for name, parameter in member.sae.named_parameters() if not split.whole else ():
            if parameter.grad is not None:
                parameter.grad = split.rows.sum(parameter.grad).div_(split.rows.size)
                if name not in cut:
                    split.latents.spread_(parameter.grad)

    @staticmethod
    def _grad_norm(member: Member) -> Tensor:
        """Of the gradients of all parameters, wherever they are."""
        named = {name: p.grad for name, p in member.sae.named_parameters() if p.grad is not None}
        if member.split.latents.size == 1:
            return torch.nn.utils.get_total_norm(list(named.values()))
        own = torch.nn.utils.get_total_norm([grad for name, grad in named.items() if name in member.cut])
        shared = torch.nn.utils.get_total_norm([g for name, g in named.items() if name not in member.cut])
        return (member.split.latents.sum(own.square()) + shared.square()).sqrt()

    @staticmethod
    def _skip_when_not_finite(member: Member, norm: Tensor) -> None:
        """Tell the optimizer to leave weights and moments alone if the gradient is not finite.

        `found_inf` is the device-side switch of fused Adam, which GradScaler uses; reading it on the
        host would stall the device at every step. Optimizers without one do (`optimizers/base.py`).
        """
        member.optimizer.found_inf = (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]
        member.optimizer.grad_scale = None  # type: ignore[attr-defined]


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Matrix products in dtype; None leaves them alone. Casts are not kept for a second use: the store of
    them is one for all threads, and what one SAE's step finds there would depend on another's."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None, cache_enabled=False)


def count_skipped(skipped: Tensor, in_a_row: Tensor, norm: Tensor) -> None:
    """Count a step whose gradient norm was not finite, without waiting for the device; 0-dim, or [M] each."""
    bad = ~torch.isfinite(norm)
    skipped += bad
    in_a_row.add_(1).mul_(bad)
