"""JumpReLU: every latent has a threshold of its own, below which it is off.

    z = pre H(pre - theta)       theta = threshold sqrt(c), c the price of an active latent

Source: Rajamanoharan et al. 2024 (arXiv:2407.14435). H has no derivative, so thresholds learn from that of
the expected loss, estimated with a rectangle of full width `bandwidth` around each pre-activation:

    dz / dtheta = -theta / bandwidth,  dH / dtheta = -1 / bandwidth,    where |pre - theta| < bandwidth / 2

on both sides of the threshold. Weights get no gradient through H: with it FVU was 0.31 instead of 0.18, on
300,000 synthetic rows (d 64, F 512, batch 512, L0 4). Penalties, with L0 the mean of sum_i H:

    step        c / D * L0                                         Rajamanoharan et al.
    tanh        c / D * mean of sum_i tanh(4 pre_i |d_i|) H        Anthropic's update of January 2025
    quadratic   coefficient * (L0 / target_l0 - 1)^2               the same, appendix; Gemma Scope 2

A latent pays for itself where the error that it saves, about z^2 / D, is more than its price c / D, so that
thresholds go with sqrt(c), and are kept in units of it. With `target_l0` a loop (`target_l0.py`) finds c and
moves the price and, in the same moment, all thresholds: L0 is on target all along, and gradients only decide
where thresholds differ. Where a price alone acts, thresholds follow as slowly as Adam's noisy steps: after
500 steps L0 was 5.3 instead of 4. The quadratic penalty is a loop of its own, through the learning rate; c
is only a unit there, which the other loop moves while that rate falls to 0: after 234 steps on a language
model's rows held-out L0 was 33.4 for a target of 32, and 33.9 without.
"""

from dataclasses import dataclass
from typing import Any

import torch
from sae_kernels import batch_topk_encode, threshold_encode
from torch import Tensor, nn
from torch.nn import functional

from sae_train.activations.base import ACTIVATIONS, Activation
from sae_train.activations.rectangle import rectangle
from sae_train.activations.target_l0 import L0Control, PenaltyConfig, start_k
from sae_train.codes import Codes
from sae_train.errors import InputError

PENALTIES = ("step", "tanh", "quadratic")
GAIN = 0.3
"""Of the loop. After 300 steps of 192 rows (d 48, F 192) held-out L0 was within 1.5 % of targets of 4 to 64,
with 0.2 within 4.4 %, with 0.1 within 13 %."""
START = 1 / 3
"""Thresholds at first, in units of sqrt(c): FVU was 0.16 on the rows above, with 1 it was 0.17."""
TANH_SCALE = 4.0
"""Of pre-activations, as in Anthropic's update of January 2025."""


@dataclass
class JumpReLUConfig(PenaltyConfig):
    """Keeps what is above a learned threshold of its latent."""

    name: str = "jumprelu"
    coefficient: float = 10.0
    """Weight of the quadratic penalty: on the rows above L0 ended 6 % above a target of 4 with 1, 1.6 % with
    3, 0.4 % with 10. If target_l0 is null, the price c: the loop found 3 for an L0 of 4 there."""
    penalty: str = "step"
    """step, tanh or quadratic."""
    bandwidth: float = 1.0
    """Full width of the rectangle around a threshold, in units of pre-activations, of which a random
    direction has variance 1. FVU on the rows above: 0.159, 0.158 and 0.165 with 0.5, 1 and Anthropic's 2; on
    rows of a language model all the same."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.penalty not in PENALTIES:
            raise InputError("sae.activation.penalty", self.penalty, " or ".join(PENALTIES))
        if not 0 < self.bandwidth < float("inf"):
            raise InputError("sae.activation.bandwidth", self.bandwidth, "a finite number above 0")
        if self.penalty == "quadratic" and self.target_l0 is None:
            raise InputError("sae.activation.target_l0", None, "a number: the quadratic penalty has no other")


@ACTIVATIONS.register("jumprelu", JumpReLUConfig)
class JumpReLU(Activation):
    """Sparse codes with a threshold per latent; dense while training, where the kernel has to see all.

    Attributes:
        threshold: [F] float32 parameter, in units of the square root of `control.coefficient`, which `fold_`
            makes 1: a published SAE has its thresholds in the units of pre-activations.
    """

    config: JumpReLUConfig

    def __init__(self, config: JumpReLUConfig, d_sae: int) -> None:
        super().__init__(config, d_sae)
        # Where c is no price, its root is no more than the unit of thresholds, and of their steps.
        self.start = 1.0 if config.penalty == "quadratic" else START
        self.threshold = nn.Parameter(torch.full((d_sae,), self.start))
        self.control = L0Control(config, d_sae)
        self.width = 1
        """D of the rows encoded last."""

    def begin_step(self, step: int, steps: int) -> None:
        self.control.begin_step(step, steps)

    def level(self) -> Tensor:
        """[F] thresholds in the units of pre-activations, never negative."""
        return self.threshold.clamp_min(0) * self.control.coefficient.sqrt()

    def encode(self, x: Tensor, w: Tensor, b: Tensor) -> Codes:
        return rectangle(*threshold_encode(x, w, b, self.level().detach()), len(w))

    def own_threshold(self, latents: Tensor) -> Tensor:
        return self.level().detach().index_select(0, latents)

    def encode_training(self, x: Tensor, w: Tensor, b: Tensor) -> Codes:
        with torch.no_grad():
            self.threshold.clamp_(min=0)  # what fell further would take as long to come back
        pre = functional.linear(x, w, b).float()
        self.width = x.shape[-1]
        if self.config.penalty != "quadratic" or self.control.late:
            l0 = (pre > self.level()).sum() / max(1, len(x))
            self.control.observe(self._over_batch(l0), self.split.finite(x), GAIN)
        return Codes(_JumpReLU.apply(pre, self.level(), self.config.bandwidth), None, len(w), pre)

    def forward(self, pre: Tensor) -> Codes:
        return Codes(torch.where(pre > self.level(), pre, 0), None, pre.shape[-1])

    def penalty(self, codes: Codes, dec_norm: Tensor) -> dict[str, Tensor]:
        assert codes.pre is not None, "codes of encode_training"
        level = self.level()
        on = _Step.apply(codes.pre, level, self.config.bandwidth)
        if self.config.penalty == "tanh":
            # The jump is as high as the penalty at the threshold.
            height = torch.tanh(TANH_SCALE * level * dec_norm).detach()
            paid = torch.tanh(TANH_SCALE * codes.pre * dec_norm)
            on = paid * on.detach() + height * (on - on.detach())
        l0 = self._over_batch(on.sum() / max(1, len(on)))
        if self.config.penalty == "quadratic":
            assert self.config.target_l0 is not None, "the configuration was checked"
            term = self.config.coefficient * (l0 / self.config.target_l0 - 1).square()
        else:
            term = self.control.coefficient.clone() * l0 / self.width
        return {"sparsity": self.control.warm * term}

    def _over_batch(self, own: Tensor) -> Tensor:
        return self.split.mean(self.split.total(own))

    @torch.no_grad()
    def initialise(self, x: Tensor, w: Tensor, b: Tensor) -> None:
        self.threshold.fill_(self.start)
        if self.config.target_l0 is not None:
            values, _, _ = batch_topk_encode(x, w, b, start_k(self.config.target_l0, self.d_sae))
            least = values.amin()
            # With fewer positive pre-activations than wanted there is no size to be had from them.
            size = torch.where(least > 0, least.square(), self.config.coefficient)
            self.control.begin((least / self.start).square(), size)

    @torch.no_grad()
    def fold_(self, scale: Tensor) -> None:
        self.threshold.copy_(self.level() / scale)
        self.control.begin(1.0, 1.0)


class _JumpReLU(torch.autograd.Function):
    """pre [N, F] where it is above threshold [F] (not negative), else 0."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return torch.where(pre > threshold, pre, 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        d_threshold = _near(grad, pre, threshold, ctx.bandwidth) * threshold
        return torch.where(pre > threshold, grad, 0), d_threshold, None


class _Step(torch.autograd.Function):
    """1 where pre [N, F] is above threshold [F], else 0; differentiable in the threshold alone."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        return None, _near(grad, pre, threshold, ctx.bandwidth), None


def _near(grad: Tensor, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """[F]: minus the density-weighted sum of grad [N, F] at the threshold, by the rectangle kernel."""
    return torch.where((pre - threshold).abs() < bandwidth / 2, grad, 0).sum(dim=0) / -bandwidth
