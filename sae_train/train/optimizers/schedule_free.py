"""Schedule-free AdamW: an average of weights in place of a decaying learning rate.

    y = (1 - beta1) z + beta1 x        gradients are taken at y, which is what the parameters hold
    z -= lr * Adam without a first moment                 x = running mean of z, evaluated and published

(Defazio et al. 2024, arXiv:2405.15682; the library schedulefree, without weight decay.) The library keeps y
and z and never x, so whatever changes y by itself changes x: an SAE's constraint, such as unit decoder rows,
has to be restored in x and in z, and y put between them again (`constrain`). Decoder rows at y are thus a
little shorter than 1: by beta1 (1 - beta1) a^2 / 2 for x and z an angle a apart.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sae_train.errors import InputError
from sae_train.train.optimizers.base import Composed


def imported() -> Any:
    """The class of the library.

    Raises:
        InputError: it is not installed.
    """
    try:
        from schedulefree import AdamWScheduleFree
    except ImportError as error:
        wanted = f"another optimizer, or pip install 'sae-train[optim]' ({error})"
        raise InputError("optim.name", "schedule_free", wanted) from None
    return AdamWScheduleFree


class ScheduleFree(Composed):
    """schedulefree.AdamWScheduleFree, always in its training mode: what x is is asked for, not switched to.

    Switching would change the last bits of y, and how often a run is evaluated must not change its weights.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, betas: tuple[float, float], eps: float
    ) -> None:
        super().__init__([imported()(params, lr=lr, betas=betas, eps=eps, weight_decay=0.0)])
        for group in self.param_groups:
            group["train_mode"] = True

    @torch.no_grad()
    def constrain(self, restore: Callable[[], None]) -> None:
        """Restore a constraint after a step, unless that was left out.

        Args:
            restore: restores it in the parameters, in place.
        """
        if self.left_out:
            return
        x = self._averages()
        with self._parameters_at(x):
            restore()
        with self._parameters_at({p: self.state[p]["z"] for p in x}):
            restore()
        for parameter, average in x.items():
            z, beta1 = self.state[parameter]["z"], self._beta1()
            torch.lerp(average, z, 1 - beta1, out=parameter.data)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it the parameters hold x; after it they hold y again, to the bit."""
        with self._parameters_at(self._averages()):
            yield

    @torch.no_grad()
    def restart_rows(self, parameter: Tensor, rows: Tensor) -> None:
        """As of every optimizer, but second moments become the mean of the other rows'.

        Without a first moment to hold it back, the next step would be 1 / sqrt(1 - beta2) = 32 times lr.
        """
        if (state := self.state.get(parameter)) is None:
            return
        state["z"][rows] = parameter.detach()[rows]  # where z is y, x is too
        others = torch.ones(len(parameter), dtype=torch.bool, device=parameter.device)
        others[rows] = False
        moments = state["exp_avg_sq"]
        moments[rows] = moments[others].mean(dim=0) if bool(others.any()) else torch.zeros_like(moments[0])

    @torch.no_grad()
    def _averages(self) -> dict[Tensor, Tensor]:
        """x of every parameter that has been stepped."""
        return {
            p: p.lerp(state["z"], 1 - 1 / self._beta1()) for p, state in self.state.items() if "z" in state
        }

    @contextmanager
    def _parameters_at(self, tensors: dict[Tensor, Tensor]) -> Iterator[None]:
        before = {parameter: parameter.data for parameter in tensors}
        for parameter, tensor in tensors.items():
            parameter.data = tensor
        try:
            yield
        finally:
            for parameter, tensor in before.items():
                parameter.data = tensor

    def _beta1(self) -> float:
        """One for all: there is one group."""
        return float(self.param_groups[0]["betas"][0])
