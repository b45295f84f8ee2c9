"""The activation axis of an SAE: pre-activations in, `Codes` out.

An activation never knows which architecture holds it. `encode` is the seam for fused kernels: the
default forms the pre-activations, top-k overrides it so that they are never held for all latents. All
see scaled rows, of a mean norm of about sqrt(D), until `fold_` puts them in the units of raw activations.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional

from sae_train.codes import Codes
from sae_train.registry import Registry
from sae_train.split import WHOLE, Split


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
        self.split = WHOLE
        """How the latents are divided; the weights that `encode` gets are those of this process's."""

    def encode(self, x: Tensor, w: Tensor, b: Tensor) -> Codes:
        """Codes as a published SAE gives them: each row by itself.

        Args:
            x: [N, D]. w: [F, D]. b: [F].

        Returns:
            Codes of relu-like activations of x @ w.T + b.
        """
        return self(functional.linear(x, w, b))

    def encode_traced(self, x: Tensor, w: Tensor, b: Tensor) -> Codes:
        """`encode` in a form that torch.compile takes whole, without a break in the graph.

        Where the number of active latents differs from row to row, no graph knows the shape of sparse codes
        before it runs. So the default is dense, and so is the product that decodes it.
        """
        return self(functional.linear(x, w, b))

    def own_threshold(self, latents: Tensor) -> Tensor | None:
        """The pre-activation above which a latent is active, with that value, whatever the others do.

        Args:
            latents: [L] int64.

        Returns:
            [L] or a scalar, never negative; None (the default) where latents compete.
        """
        return None

    def encode_training(self, x: Tensor, w: Tensor, b: Tensor) -> Codes:
        """Codes while training, where a batch may be looked at as a whole and what is learned about
        thresholds is noted. Default: those of `encode`."""
        return self.encode(x, w, b)

    @abstractmethod
    def forward(self, pre: Tensor) -> Codes:
        """pre [N, F] -> codes, as `encode` gives them."""

    def penalty(self, codes: Codes, dec_norm: Tensor) -> dict[str, Tensor]:
        """Sparsity terms of the loss, by name and weighted. Default: none.

        Args:
            codes: of `encode_training`.
            dec_norm: [F] norms of the decoder rows, summed over hooks.
        """
        return {}

    def also_reconstruct(self, x: Tensor, w: Tensor, b: Tensor) -> dict[str, tuple[float, Codes]]:
        """Other codes of the same rows that shall reconstruct the target too: name -> (weight, codes)."""
        return {}

    def begin_step(self, step: int, steps: int) -> None:
        """Called before step `step` of `steps`: what changes over a run is set here, from these alone."""

    def initialise(self, x: Tensor, w: Tensor, b: Tensor) -> None:
        """Called once when the weights are set, with encoder inputs x [R, D] of real rows; may change b."""

    def split_(self, split: Split) -> None:
        """The weights that are encoded with are one slice of the latents from now on, the rows a part of a
        batch. Raises InputError where that cannot be."""
        self.split = split

    def fold_(self, scale: Tensor) -> None:
        """Codes and pre-activations are divided by `scale` (a positive scalar) from now on."""


ACTIVATIONS: Registry[Activation] = Registry("sae.activation")
