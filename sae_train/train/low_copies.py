"""Copies of weight matrices in two bytes, for products: who writes the master writes its copy too."""

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sae_train.sae.base import LinearLatents
from sae_train.train.members import Member


@dataclass
class LowCopy:
    """A copy of a parameter, and the state (`state_of`) of what it is a copy of."""

    tensor: Tensor
    state: tuple[int, int, int]


class LowCopies:
    """The copies of members' w_enc and w_dec, by those names; of nothing where dtype is None."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        self.dtype = dtype
        self._of: WeakKeyDictionary[Member, dict[str, LowCopy]] = WeakKeyDictionary()

    def of(self, form: LinearLatents, member: Member) -> dict[str, LowCopy]:
        """As they should be: made, and made anew where someone else has written to the parameter."""
        if self.dtype is None:
            return {}
        copies = self._of.setdefault(member, {})
        for name, parameter in _matrices(form):
            now = state_of(parameter, member)
            if name not in copies:
                copies[name] = LowCopy(parameter.detach().to(self.dtype), now)
            elif copies[name].state != now:
                copies[name].tensor.copy_(parameter)
                copies[name].state = now
        return copies

    def remember(self, form: LinearLatents, member: Member) -> None:
        """The copies are up to date: a step has written to them what it wrote to the parameters."""
        for name, parameter in _matrices(form) if member in self._of else ():
            self._of[member][name].state = state_of(parameter, member)


def _matrices(form: LinearLatents) -> tuple[tuple[str, nn.Parameter], ...]:
    return ("w_enc", form.w_enc), ("w_dec", form.w_dec)


def state_of(parameter: nn.Parameter, member: Member) -> tuple[int, int, int]:
    """Changes whenever the parameter does: where it is, writes to it, steps of the schedule.

    torch counts writes to a tensor, but fused Adam's own are not among them; every step moves the schedule.
    Nor are writes through `parameter.data`, in place: they go unseen. Write to the parameter under no_grad.
    """
    return parameter.data_ptr(), parameter._version, member.schedule.last_epoch
