"""Optimizer and learning-rate schedule of one member: torch's own and well-kept libraries', configured.

Three options trade a little of Adam's exactness for memory or time. torch's Adam has none of them, so they
need fused steps (`fused.py`), and what they keep is part of the optimizer's state, saved as it is. Only Adam
has fused steps; the optimizers in `optimizers/` step through autograd.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from sae_train.errors import InputError
from sae_train.registry import nearest
from sae_train.sae.base import SAE
from sae_train.train.optimizers import adam8bit, schedule_free
from sae_train.train.optimizers.adam8bit import Adam8bit
from sae_train.train.optimizers.base import Composed
from sae_train.train.optimizers.muon import Muon
from sae_train.train.optimizers.schedule_free import ScheduleFree

REFERENCE_WIDTH = 2**14
"""Width at which `lr_base` holds; the 1/sqrt(F) rule is that of Gao et al. 2024 (arXiv:2406.04093)."""
REFERENCE_STEPS = 2**11
"""Length of a run at which `lr_base` holds. That the best rate falls with the number of steps to the power of
about a third is a law of Bjorck et al. 2024 (arXiv:2409.19913) for language models. What was best here at 784
and 1,568 steps agrees (docs/benchmarks.md), and it leads to the 2e-4 of published SAEs at their 244,000."""
LEAST_STEPS = 250
"""About the shortest run that was measured (234); what continues a training may be shorter."""

Build = Callable[[Iterable[nn.Parameter], float, tuple[float, float], float], torch.optim.Optimizer]
"""(parameters, lr, betas, eps) -> optimizer"""


def _adam(
    params: Iterable[nn.Parameter], lr: float, betas: tuple[float, float], eps: float
) -> torch.optim.Optimizer:
    """Fused Adam over fp32 master weights; it can skip a step on the device (see `stepper`)."""
    return torch.optim.Adam(params, lr=lr, betas=betas, eps=eps, fused=True)


OPTIMIZERS: dict[str, Build] = {
    "adam": _adam,
    "muon": Muon,
    "schedule_free": ScheduleFree,
    "adam8bit": Adam8bit,
}
IMPORTS = {"schedule_free": schedule_free.imported, "adam8bit": adam8bit.imported}
"""What imports the library of an optimizer that is not torch's; raises InputError if it is not installed."""


@dataclass
class OptimConfig:
    """Adam or another optimizer, with linear warm-up, a plateau, and linear decay to zero."""

    name: str = "adam"
    """adam (torch's, fused), muon (torch's, and Adam for what is no matrix), schedule_free or adam8bit; the
    last two need pip install 'sae-train[optim]'. optim=NAME sets the learning rate that suits it, too."""
    lr: float | None = None
    """Peak learning rate. Unset: lr_base * sqrt(2^14 / d_sae) * (2^11 / steps)^budget_power."""
    lr_base: float = 1e-3
    """Peak learning rate of an SAE with 2^14 latents in a run of 2^11 steps (docs/benchmarks.md)."""
    budget_power: float = 1 / 3
    """How fast the peak falls with the number of steps, of which 250 count at least; 0 leaves them out."""
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    """Added to the root of the second moment; adam8bit needs 1e-7."""
    warmup: float = 0.02
    """Share of the steps over which the learning rate rises from 0."""
    decay: float = 0.8
    """Share of the steps, at the end, over which it falls to 0; schedule_free takes 0 only. 0.8 bears a
    higher rate than 0.2: at the same rate a fifth of the latents that were silent (docs/benchmarks.md)."""
    clip: float | None = 1.0
    """Gradient norm above which gradients are scaled down; null is off."""
    clip_norm: str = "exact"
    """exact clips by this step's norm; lagged by that of the last step that was made (the first step by its
    own), which spares Triton a pass over the gradients and no other backend anything. Needs fused steps."""
    moments: str = "float32"
    """bfloat16 halves Adam's memory for both weight matrices: rounded stochastically, with noise that is a
    function of step and place alone; the biases' moments stay float32. Needs fused steps."""
    rows: str = "all"
    """active leaves latents without a gradient alone in a step and catches up their second moment when they
    next have one, which is the same Adam if beta1 is 0, and is refused if not. Needs fused steps."""

    def __post_init__(self) -> None:
        if self.name not in OPTIMIZERS:
            raise InputError("optim.name", self.name, nearest(str(self.name), list(OPTIMIZERS)))
        for key in ("lr", "lr_base", "eps", "clip"):
            value = getattr(self, key)
            if value is None and key in ("lr", "clip"):
                continue
            if not (isinstance(value, int | float) and value > 0 and math.isfinite(value)):
                raise InputError(f"optim.{key}", value, "a positive finite number")
        if not 0 <= self.budget_power <= 1:
            raise InputError("optim.budget_power", self.budget_power, "a number from 0 to 1")
        for key in ("beta1", "beta2"):
            if not 0 <= getattr(self, key) < 1:
                raise InputError(f"optim.{key}", getattr(self, key), "a number in [0, 1)")
        for key, accepted in CHOICES.items():
            if getattr(self, key) not in accepted:
                raise InputError(f"optim.{key}", getattr(self, key), " or ".join(accepted))
        if (asked := self.beyond_adam()) is not None and self.name != "adam":
            other = f"{CHOICES[asked][0]}, or optim.name=adam instead of {self.name}"
            raise InputError(f"optim.{asked}", getattr(self, asked), other)
        if self.clip_norm == "lagged" and self.clip is None:
            raise InputError("optim.clip_norm", self.clip_norm, "exact, or a number as optim.clip")
        if self.rows == "active" and self.beta1 != 0:
            raise InputError("optim.rows", self.rows, f"all, or optim.beta1=0 instead of {self.beta1}")
        if not (self.warmup >= 0 and self.decay >= 0 and self.warmup + self.decay <= 1):
            raise InputError(
                "optim.warmup+decay", (self.warmup, self.decay), "two shares that add up to at most 1"
            )
        if self.name == "schedule_free" and self.decay > 0:
            raise InputError(
                "optim.decay", self.decay, "0 with optim.name=schedule_free (optim=schedule_free sets it)"
            )
        if self.name == "adam8bit" and self.eps < adam8bit.LEAST_EPS:
            wanted = f"at least {adam8bit.LEAST_EPS} with optim.name=adam8bit (optim=adam8bit sets it)"
            raise InputError("optim.eps", self.eps, wanted)
        if self.name == "schedule_free" and self.beta1 == 0:
            raise InputError("optim.beta1", self.beta1, "above 0 with optim.name=schedule_free")

    def peak_lr(self, d_sae: int, steps: int) -> float:
        """The highest learning rate in a run of so many steps, for an SAE with d_sae latents."""
        if self.lr is not None:
            return self.lr
        budget = (REFERENCE_STEPS / max(steps, LEAST_STEPS)) ** self.budget_power
        return self.lr_base * math.sqrt(REFERENCE_WIDTH / d_sae) * budget

    def beyond_adam(self) -> str | None:
        """The first key, if any, that asks for what only fused steps can do."""
        return next((key for key, accepted in CHOICES.items() if getattr(self, key) != accepted[0]), None)

    def check_library(self) -> None:
        """Raises InputError if this optimizer is a library's that is not installed."""
        if self.name in IMPORTS:
            IMPORTS[self.name]()


CHOICES = {
    "clip_norm": ("exact", "lagged"),
    "moments": ("float32", "bfloat16"),
    "rows": ("all", "active"),
}
"""Of OptimConfig: first what torch's Adam does, then what needs fused steps."""


def build_optimizer(
    config: OptimConfig, params: Iterable[nn.Parameter], d_sae: int, steps: int
) -> torch.optim.Optimizer:
    """The optimizer that a configuration names, at its peak learning rate.

    Raises:
        InputError: its library is not installed.
    """
    betas = (config.beta1, config.beta2)
    return OPTIMIZERS[config.name](params, config.peak_lr(d_sae, steps), betas, config.eps)


LIKE_PARAMETER = ("exp_avg", "exp_avg_sq", "momentum_buffer", "z")
"""Parts of optimizer states that have a number for each number of a parameter."""


def load_optimizer(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """What `optimizer.load_state_dict` does, but every tensor of the state keeps the dtype it was saved in.

    torch casts state to the dtype of its parameter: bfloat16 moments would come back in twice the memory,
    and counts of steps as floats.
    """
    optimizer.load_state_dict({"state": {}, "param_groups": saved["param_groups"]})
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=True):
        if number in saved["state"]:
            state = saved["state"][number]
            for name in LIKE_PARAMETER:
                value = state.get(name)
                if isinstance(value, Tensor) and value.shape != parameter.shape:  # torch would not look
                    raise ValueError(f"{name} of a parameter {list(parameter.shape)} is {list(value.shape)}")
            optimizer.state[parameter] = {
                name: value.to(parameter.device) if isinstance(value, Tensor) else value
                for name, value in state.items()
            }
    if isinstance(optimizer, Composed):
        optimizer.unpack()


def constrain(sae: SAE, optimizer: torch.optim.Optimizer, skipped: Tensor) -> None:
    """Restore the architecture's constraints after a step, in everything that is a version of its weights.

    Args:
        skipped: 0-dim bool, on the device; where it is true the step was left out and no bit may change.
    """
    if isinstance(optimizer, ScheduleFree):
        optimizer.constrain(sae.after_step)
    else:
        sae.after_step(skipped=skipped)


def averages_weights(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the weights to evaluate and publish are others than those that gradients are taken at."""
    return isinstance(optimizer, ScheduleFree)


def published_weights(optimizer: torch.optim.Optimizer) -> contextlib.AbstractContextManager[None]:
    """Within it parameters hold what is evaluated and published; after it what they held before."""
    return optimizer.averaged() if isinstance(optimizer, ScheduleFree) else contextlib.nullcontext()


def restart_rows(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, rows: Tensor) -> None:
    """Forget what an optimizer knows of some rows [R] int64 of a parameter, which were set to something new.

    Moments become zero, and averages start from what the rows hold now.
    """
    if isinstance(optimizer, Composed):
        optimizer.restart_rows(parameter, rows)
        return
    for value in optimizer.state.get(parameter, {}).values():
        if value.shape == parameter.shape:
            value.index_fill_(0, rows, 0)


def build_schedule(config: OptimConfig, optimizer: torch.optim.Optimizer, steps: int) -> LambdaLR:
    """Warm-up over the first share of `steps`, plateau, linear decay that would reach 0 at step `steps`."""
    warmup, decay = config.warmup * steps, config.decay * steps

    def factor(step: int) -> float:
        rise = min(1.0, (step + 1) / warmup) if warmup >= 1 else 1.0
        fall = min(1.0, (steps - step) / decay) if decay >= 1 else 1.0
        return max(0.0, min(rise, fall))

    return LambdaLR(optimizer, factor)
