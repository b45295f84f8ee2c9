"""The activation axis of an SAE: pre-activations in, `Codes` out.

An activation never knows which architecture holds it. `encode` is the seam for fused kernels: the
default forms the pre-activations, top-k overrides it so that they are never held for all latents.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional

from sae_train.codes import Codes
from sae_train.registry import Registry


@dataclass
class ActivationConfig:
    """Base of every activation's configuration; `name` picks the class from the registry."""

    name: str = "???"


class Activation(nn.Module, ABC):
    """Base class. `config.name` is the registry key."""

    def __init__(self, config: ActivationConfig, d_sae: int) -> None:
        super().__init__()
        self.config = config
        self.d_sae = d_sae

    def encode(self, x: Tensor, w: Tensor, b: Tensor) -> Codes:
        """x [N, D], w [F, D], b [F] -> codes of relu-like activations of x @ w.T + b."""
        return self(functional.linear(x, w, b))

    @abstractmethod
    def forward(self, pre: Tensor) -> Codes:
        """pre [N, F] -> codes."""

    def penalty(self, codes: Codes, dec_norm: Tensor) -> dict[str, Tensor]:
        """Sparsity terms of the loss by name; dec_norm [F] are the decoder rows' norms. Default: none."""
        return {}


ACTIVATIONS: Registry[Activation] = Registry("sae.activation")
