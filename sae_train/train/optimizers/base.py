"""An optimizer made of others, which leaves out a step as fused Adam does.

A step whose gradients are not finite must change nothing. torch's fused Adam has a switch for that on the
device, `found_inf`, which `AutogradStepper` sets before every step; no other optimizer has one. Here it is
read on the host: the one synchronisation with the device per step that these optimizers cost.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Composed(torch.optim.Optimizer):
    """One or more optimizers, each with parameters of its own, under one list of groups and one state.

    Args:
        parts: the optimizers, not stepped yet. Their groups are copied, in order.
    """

    found_inf: Tensor | None = None
    """0-dim, set before a step: the step is left out where it is not 0."""
    grad_scale: Tensor | None = None
    """Set beside found_inf for Adam's sake; gradients are never scaled."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self._parts = [(part, len(part.param_groups)) for part in parts]
        self.left_out = False
        """Whether the last step was."""
        super().__init__([dict(group) for part in parts for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "losses are computed once, before the step"
        self.left_out = self.found_inf is not None and bool(self.found_inf)  # host synchronisation
        if self.left_out:
            return
        first = 0
        for part, count in self._parts:
            # Bound anew each time: loading a state replaces both.
            part.param_groups, part.state = self.param_groups[first : first + count], self.state
            self._step_part(part)
            first += count

    def _step_part(self, part: torch.optim.Optimizer) -> None:
        part.step()

    def unpack(self) -> None:
        """Called when `state` holds what `state_dict` gave, loaded: turns it into what steps work on."""

    @torch.no_grad()
    def restart_rows(self, parameter: Tensor, rows: Tensor) -> None:
        """Forget what is known of some rows [R] int64 of a parameter, which were set to something new."""
        for value in self.state.get(parameter, {}).values():
            if value.shape == parameter.shape:
                value.index_fill_(0, rows, 0)
