"""Steps through the language model: the rows' own loss plus the model's with the reconstruction in place.

    loss = rows + weight * (mse / model).detach() * model

The factor keeps both terms equally large from first step to last, so that one weight serves every model and
layer (Karvonen 2025, arXiv:2503.17272). The loss of rows keeps the SAE's own penalties and its dead latents.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from sae_train.batch import Batch, RowBatch
from sae_train.losses import Losses
from sae_train.places import Places
from sae_train.train.members import Member
from sae_train.train.stepper import AutogradStepper


class SplicedModel(Protocol):
    """What is needed of `harvest.end_to_end.EndToEnd`."""

    loss_name: str

    def read(self, windows: Any, places: Places) -> Any: ...

    def loss(self, read: Any, y_hat: Tensor, widths: tuple[int, ...]) -> Tensor: ...


class EndToEndStepper(AutogradStepper):
    """Autograd through the SAE and the layers of the model above it.

    Args:
        model: the frozen model.
        weight: of the model's loss, which is first made as large as the rows' error. 0 leaves it out.
        accumulate, autocast: as for `AutogradStepper`; micro-batches are windows.
    """

    def __init__(
        self,
        model: SplicedModel,
        weight: float,
        accumulate: int = 1,
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__(accumulate, autocast)
        self.model, self.weight = model, weight

    def take(self, member: Member, rows: RowBatch) -> Any:
        assert rows.windows is not None, "the source gives rows, not windows"
        return rows.windows

    def _micro_batches(self, member: Member, batch: Any) -> Iterator[tuple[Batch, Any, float]]:
        windows = batch
        size = len(windows.tokens) // self.accumulate
        for start in range(0, len(windows.tokens), size):
            part = slice(start, start + size)
            read = self.model.read(windows[part], member.places)
            yield read.batch, read, 1 / self.accumulate

    def _losses(self, member: Member, batch: Batch, read: Any) -> Losses:
        losses = member.sae.losses(batch, member.dead)
        if self.weight == 0:
            return losses
        loss = self.model.loss(read, losses.y_hat, member.sae.widths.outputs)
        tiny = torch.finfo(torch.float32).tiny
        ratio = (losses.terms["mse"] / loss.clamp_min(tiny)).detach()
        terms = losses.terms | {self.model.loss_name: self.weight * ratio * loss}
        return Losses(terms, losses.codes, losses.y_hat)
