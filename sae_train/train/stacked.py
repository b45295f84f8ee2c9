"""Tensors of several owners one after the other in memory, so that one op works on all of them.

An owner keeps what it had, as a view of the stack: who reads, writes, saves or loads it sees no difference.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Stacks:
    """Stacks by name, made where the owners' tensors do not lie in one yet."""

    def __init__(self) -> None:
        self._made: dict[str, Tensor] = {}

    def of(self, name: str, own: Sequence[Tensor], put: Callable[[int, Tensor], None]) -> Tensor:
        """[M, ...], whose parts are the tensors of M owners.

        Args:
            name: of the stack.
            own: what each owner has now; one shape and dtype.
            put: called with an owner's number and what it shall have instead: the same numbers in the stack.
        """
        if len(own) == 1:
            return own[0].unsqueeze(0)
        stack = self._made.get(name)
        if stack is None or not _made_of(stack, own):
            stack = self._made[name] = torch.stack(list(own))
            for number, view in enumerate(stack):
                put(number, view)
        return stack


def _made_of(stack: Tensor, own: Sequence[Tensor]) -> bool:
    if len(stack) != len(own):
        return False
    first, step = stack.data_ptr(), stack.stride(0) * stack.element_size()
    return all(t.data_ptr() == first + number * step for number, t in enumerate(own))
