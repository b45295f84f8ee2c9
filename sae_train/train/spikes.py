"""The loss-spike guard: a step whose loss leaps far above the ones before it does not touch the weights.

A spike is a loss above the mean of the last `window` ones by more than `sds` of their standard deviations
(the rule of OLMo-core's SkipStepOptimizer). Spikes are not remembered, so one does not hide the next. Three
in a row at most: a loss that stays up (another kind of text, an annealed k) is no spike, and is trained on
and remembered from the fourth. Decided on the device, without waiting for it.
"""

from typing import Any

import torch
from torch import Tensor

MOST_IN_A_ROW = 3


class SpikeGuard:
    """Judges the losses of one SAE, one after the other.

    Args:
        sds: standard deviations above the mean from which a loss is a spike; 0 judges none.
        window: losses that are remembered; the first `window` ones are never spikes.
        device: of the losses.
    """

    def __init__(self, sds: float, window: int, device: torch.device) -> None:
        self.sds = sds
        self.losses = torch.zeros(window, dtype=torch.float32, device=device)
        self.seen = torch.zeros((), dtype=torch.int64, device=device)
        self.streak = torch.zeros((), dtype=torch.int64, device=device)
        """Losses in a row, up to the last, that were too high."""
        self.spikes = torch.zeros((), dtype=torch.int64, device=device)
        """How many there were."""

    def judge(self, loss: Tensor) -> Tensor:
        """Whether a loss (0-dim) is a spike, as a 0-dim bool. One that is not finite is none."""
        return judge(loss, self.sds, self.losses, self.seen, self.streak, self.spikes)

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self.losses, "seen": self.seen, "streak": self.streak, "spikes": self.spikes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses.copy_(state["losses"])
        self.seen.copy_(state["seen"])
        self.streak.copy_(state["streak"])
        self.spikes.copy_(state["spikes"])


def judge(loss: Tensor, sds: float, losses: Tensor, seen: Tensor, streak: Tensor, spikes: Tensor) -> Tensor:
    """What `SpikeGuard.judge` does to its state, [window] and 0-dim, or to that of M: [M, window] and [M]."""
    loss, window = loss.detach().float(), losses.shape[-1]
    finite = torch.isfinite(loss)
    # torch takes differences to the mean: a variance from sums of squares would be rounding noise here.
    high = finite & (loss > losses.mean(dim=-1) + sds * losses.std(dim=-1))
    high &= (seen >= window) & (sds > 0)
    streak.add_(high).mul_(high)
    spike = high & (streak <= MOST_IN_A_ROW)
    remembered = finite & ~spike
    place = (seen % window).unsqueeze(-1)
    kept = torch.where(remembered.unsqueeze(-1), loss.unsqueeze(-1), losses.gather(-1, place))
    losses.scatter_(-1, place, kept)
    seen += remembered
    spikes += spike
    return spike
