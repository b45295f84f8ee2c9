"""The architecture axis: parameters, encode, decode, the loss, and the constraint after each step.

Weights are latent-major: `w_enc` and `w_dec` are both [F, D], one latent per contiguous row, so
sparse gathers and per-latent updates read rows and sharding latents is sharding dimension 0.

While it trains, an SAE works in scaled units: rows are multiplied by `input_scale` so that their
mean distance from `b_dec` is sqrt(D), which makes one learning rate serve every model and layer.
`fold()` moves the scale into the biases; a published SAE takes raw activations and has scale 1.
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor, nn

from sae_train.activations.base import ACTIVATIONS, ActivationConfig
from sae_train.activations.topk import TopKConfig
from sae_train.batch import Batch
from sae_train.codes import Codes
from sae_train.errors import InputError
from sae_train.losses import Losses
from sae_train.registry import Registry

MAX_LATENTS = 2**24
"""Sixteen times the widest SAE published so far; more is a slip of the keyboard or an attack on memory."""


@dataclass
class SAEConfig:
    """What every architecture needs; `name` picks the class from the registry."""

    name: str = "???"
    d_sae: int | None = None
    """Number of latents F. Unset: expansion times the width of the activations."""
    expansion: float = 8.0
    """Latents per activation dimension when d_sae is not set."""
    activation: ActivationConfig = field(default_factory=TopKConfig)
    b_dec_init: str = "geometric_median"
    """Where the decoder bias starts: geometric_median or mean of the first rows, or zeros."""
    input_scale: str = "sqrt_d"
    """sqrt_d scales rows so that their mean distance from b_dec is sqrt(D); none leaves them as they are."""
    auxk_coefficient: float = 1 / 32
    """Weight of the dead-latent loss, 0 is off; 1/32 is Gao et al.'s for a variance-normalised loss."""
    k_aux: int | None = None
    """Dead latents that explain the residual of a row. Unset: half the activation width."""
    dead_after_tokens: int = 10_000_000
    """A latent is dead after this many tokens without firing (never more than a tenth of the run)."""

    def __post_init__(self) -> None:
        if self.d_sae is not None and not 1 <= self.d_sae <= MAX_LATENTS:
            raise InputError("sae.d_sae", self.d_sae, f"a whole number from 1 to {MAX_LATENTS}, or null")
        if not (self.expansion > 0 and math.isfinite(self.expansion)):
            raise InputError("sae.expansion", self.expansion, "a positive number")
        if self.b_dec_init not in ("geometric_median", "mean", "zeros"):
            raise InputError("sae.b_dec_init", self.b_dec_init, "geometric_median, mean or zeros")
        if self.input_scale not in ("sqrt_d", "none"):
            raise InputError("sae.input_scale", self.input_scale, "sqrt_d or none")
        if not (self.auxk_coefficient >= 0 and math.isfinite(self.auxk_coefficient)):
            raise InputError("sae.auxk_coefficient", self.auxk_coefficient, "a number of at least 0")
        if self.k_aux is not None and self.k_aux < 1:
            raise InputError("sae.k_aux", self.k_aux, "a whole number of at least 1, or null")
        if self.dead_after_tokens < 1:
            raise InputError("sae.dead_after_tokens", self.dead_after_tokens, "a whole number of at least 1")

    def num_latents(self, d_in: int) -> int:
        """F for activations of width d_in."""
        latents = self.d_sae if self.d_sae is not None else round(self.expansion * d_in)
        if not 1 <= latents <= MAX_LATENTS:
            raise InputError("sae.expansion", self.expansion, f"1 to {MAX_LATENTS} latents at width {d_in}")
        return latents


@dataclass(frozen=True)
class LinearLatents:
    """An SAE whose whole training step has a closed form, described for whoever computes it.

        z = the k largest of relu(x w_enc^T + b_enc) in each row      s y_hat = z w_dec + b_dec

    with x the scaled rows, less b_dec if `centred`. Its loss is that of `losses`: the mean over rows and
    width of (s y - s y_hat)^2 plus, while latents are dead, `dead_loss`. These are all its parameters.

    Attributes:
        w_enc, w_dec: [F, D]. b_enc: [F]. b_dec: [D].
        k: slots per row.
        centred: the encoder reads s x - b_dec.
        unit_norm: rows of w_dec are unit vectors; before_step and after_step do what that takes, no more.
        dead_loss: (residual [N, D], x [N, D], then the dead latents' rows of w_enc, b_enc and w_dec) ->
            weighted scalar; None if there is no such term.
    """

    w_enc: nn.Parameter
    b_enc: nn.Parameter
    w_dec: nn.Parameter
    b_dec: nn.Parameter
    k: int
    centred: bool
    unit_norm: bool
    dead_loss: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor] | None


class SAE(nn.Module, ABC):
    """Base class of every architecture.

    Attributes:
        config: the architecture's configuration, activation included.
        d_in, d_sae: widths D and F.
        input_scale: scalar buffer; 1 in a published SAE.
    """

    input_scale: Tensor

    def __init__(self, config: SAEConfig, d_in: int) -> None:
        super().__init__()
        self.config = config
        self.d_in = d_in
        self.d_sae = config.num_latents(d_in)
        self.activation = ACTIVATIONS.build(config.activation, self.d_sae)
        self.register_buffer("input_scale", torch.ones(()))

    @abstractmethod
    def encode(self, x: Tensor) -> Codes:
        """x [N, D] raw activations -> codes of N rows."""

    @abstractmethod
    def decode(self, codes: Codes) -> Tensor:
        """Codes of N rows -> [N, D] reconstruction in the units of the raw activations."""

    def forward(self, x: Tensor) -> Tensor:
        """decode(encode(x))"""
        return self.decode(self.encode(x))

    @abstractmethod
    def preactivations(self, x: Tensor, features: Tensor | slice = slice(None)) -> Tensor:
        """x [N, D] -> [N, len(features)] pre-activations of the chosen latents only, in scaled units."""

    @abstractmethod
    def losses(self, batch: Batch, dead: Tensor) -> Losses:
        """The loss of a batch. dead [F_dead] int64 are the latents that count as dead now."""

    @abstractmethod
    def initialise(self, rows: Tensor, generator: torch.Generator) -> None:
        """Set the weights from rows [R, D] of real activations and a seeded CPU generator."""

    def latents(self) -> LinearLatents | None:
        """This SAE in the form that a fused step computes, or None if it has no such form."""
        return None

    def before_step(self) -> None:
        """Called when the gradients are complete and before they are clipped and used."""

    def after_step(self, skipped: Tensor | None = None) -> None:
        """Called after the optimizer's step: restores the architecture's constraints.

        Args:
            skipped: 0-dim bool, on the device; where it is true the step was left out and no bit may change.
        """

    @abstractmethod
    def fold_(self) -> None:
        """Move input_scale into the weights, in place; codes are divided by it, reconstructions unchanged."""

    def folded(self) -> Self:
        """A copy that takes raw activations: same support, same reconstruction, codes in raw units."""
        twin = copy.deepcopy(self)
        twin.fold_()
        return twin


SAES: Registry[SAE] = Registry("sae")
