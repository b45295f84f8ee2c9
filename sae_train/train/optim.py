"""Optimizer and learning-rate schedule of one member: torch's own, configured.

Three options trade a little of Adam's exactness for memory or time. torch's Adam has none of them, so they
need fused steps (`fused.py`), and what they keep is part of the optimizer's state, saved as it is.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from sae_train.errors import InputError

REFERENCE_WIDTH = 2**14
"""Width at which `lr_base` holds; the 1/sqrt(F) rule is that of Gao et al. 2024 (arXiv:2406.04093)."""


@dataclass
class OptimConfig:
    """Adam with linear warm-up, a plateau, and linear decay to zero."""

    name: str = "adam"
    """adam (torch.optim.Adam, fused)."""
    lr: float | None = None
    """Peak learning rate. Unset: lr_base * sqrt(2^14 / d_sae)."""
    lr_base: float = 1e-3
    """Peak learning rate of an SAE with 2^14 latents. 1e-3 was best or near it in runs of 0.2 to 1 M tokens
    (docs/benchmarks.md); published recipes for 100 M tokens and more use 2e-4 to 4e-4."""
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    warmup: float = 0.02
    """Share of the steps over which the learning rate rises from 0."""
    decay: float = 0.2
    """Share of the steps, at the end, over which it falls to 0."""
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
        if self.name != "adam":
            raise InputError("optim.name", self.name, "adam")
        for key in ("lr", "lr_base", "eps", "clip"):
            value = getattr(self, key)
            if value is None and key in ("lr", "clip"):
                continue
            if not (isinstance(value, int | float) and value > 0 and math.isfinite(value)):
                raise InputError(f"optim.{key}", value, "a positive finite number")
        for key in ("beta1", "beta2"):
            if not 0 <= getattr(self, key) < 1:
                raise InputError(f"optim.{key}", getattr(self, key), "a number in [0, 1)")
        for key, accepted in CHOICES.items():
            if getattr(self, key) not in accepted:
                raise InputError(f"optim.{key}", getattr(self, key), " or ".join(accepted))
        if self.clip_norm == "lagged" and self.clip is None:
            raise InputError("optim.clip_norm", self.clip_norm, "exact, or a number as optim.clip")
        if self.rows == "active" and self.beta1 != 0:
            raise InputError("optim.rows", self.rows, f"all, or optim.beta1=0 instead of {self.beta1}")
        if not (self.warmup >= 0 and self.decay >= 0 and self.warmup + self.decay <= 1):
            raise InputError(
                "optim.warmup+decay", (self.warmup, self.decay), "two shares that add up to at most 1"
            )

    def peak_lr(self, d_sae: int) -> float:
        """Learning rate on the plateau for an SAE with d_sae latents."""
        return self.lr if self.lr is not None else self.lr_base * math.sqrt(REFERENCE_WIDTH / d_sae)

    def beyond_adam(self) -> str | None:
        """The first key, if any, that asks for what only fused steps can do."""
        return next((key for key, accepted in CHOICES.items() if getattr(self, key) != accepted[0]), None)


CHOICES = {
    "clip_norm": ("exact", "lagged"),
    "moments": ("float32", "bfloat16"),
    "rows": ("all", "active"),
}
"""Of OptimConfig: first what torch's Adam does, then what needs fused steps."""


def build_optimizer(config: OptimConfig, params: Iterable[nn.Parameter], d_sae: int) -> torch.optim.Optimizer:
    """Fused Adam over fp32 master weights; it can skip a step on the device (see `stepper`)."""
    return torch.optim.Adam(
        params, lr=config.peak_lr(d_sae), betas=(config.beta1, config.beta2), eps=config.eps, fused=True
    )


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
            for name in ("exp_avg", "exp_avg_sq"):
                if (shape := saved["state"][number][name].shape) != parameter.shape:  # torch would not look
                    raise ValueError(f"{name} of a parameter {list(parameter.shape)} is {list(shape)}")
            optimizer.state[parameter] = {
                name: value.to(parameter.device) if isinstance(value, Tensor) else value
                for name, value in saved["state"][number].items()
            }


def build_schedule(config: OptimConfig, optimizer: torch.optim.Optimizer, steps: int) -> LambdaLR:
    """Warm-up over the first share of `steps`, plateau, linear decay that would reach 0 at step `steps`."""
    warmup, decay = config.warmup * steps, config.decay * steps

    def factor(step: int) -> float:
        rise = min(1.0, (step + 1) / warmup) if warmup >= 1 else 1.0
        fall = min(1.0, (steps - step) / decay) if decay >= 1 else 1.0
        return max(0.0, min(rise, fall))

    return LambdaLR(optimizer, factor)
