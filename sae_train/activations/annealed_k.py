"""A k that may begin larger and fall to its value over the first part of a run.

So all latents learn something before few of them may be active. What k is in a step is a function of the step
alone: a run that goes on needs no state for it.
"""

from dataclasses import dataclass

from sae_train.activations.base import Activation, ActivationConfig
from sae_train.errors import InputError


@dataclass
class AnnealedKConfig(ActivationConfig):
    """What activations share that are told how many latents to keep."""

    k: int = 32
    """Latents active on a token, at most or on average. 32 is the middle of the range that published SAEs use
    (16-128)."""
    k_start: int | None = None
    """k of the first step, from which it falls linearly to k. Unset: k."""
    k_steps: float = 0.2
    """Share of the run over which it falls."""

    def __post_init__(self) -> None:
        if self.k < 1:
            raise InputError("sae.activation.k", self.k, "a whole number of at least 1")
        if self.k_start is not None and self.k_start < self.k:
            raise InputError("sae.activation.k_start", self.k_start, f"null, or at least k={self.k}")
        if not 0 < self.k_steps <= 1:
            raise InputError(
                "sae.activation.k_steps", self.k_steps, "a share of the run, above 0 and at most 1"
            )


class AnnealedK(Activation):
    """Base of these activations.

    Attributes:
        k: of the step that `begin_step` announced; the configured one before any.
    """

    config: AnnealedKConfig

    def __init__(self, config: AnnealedKConfig, d_sae: int) -> None:
        for key, k in (("k", config.k), ("k_start", config.k_start or 1)):
            if k > d_sae:
                raise InputError(f"sae.activation.{key}", k, f"at most the number of latents, d_sae={d_sae}")
        super().__init__(config, d_sae)
        self.k = config.k

    def begin_step(self, step: int, steps: int) -> None:
        start, end = self.config.k_start, self.config.k
        progress = step / (self.config.k_steps * steps)
        self.k = end if start is None or progress >= 1 else round(start + (end - start) * progress)
