"""The gated SAE: one set of weights decides which latents are active, and how strongly, in two ways.

    g = (s x - c) W_enc^T + b_enc                  gate pre-activations; c is b_dec, or a transcoder's centre
    a = activation(g)                              gates: which latents are active
    z = relu(exp(r_mag) (g - b_enc) + b_mag)       where a is not zero, and 0 elsewhere

Sparsity is asked of the gates, and reconstruction of the magnitudes, so that a penalty on how much is active
does not shrink what is reconstructed. The gates learn which latents matter from a loss of their own, `gate`:
their codes have to reconstruct too, with decoder and bias held constant.

An activation's values are g where a latent is active, so magnitudes are made of them and of nothing else:
top-k codes stay [N, K].

Source: Rajamanoharan et al. 2024 (arXiv:2404.16014), there with a = relu(g) and an L1 penalty. AuxK, which is
not in the paper, opens the gates of dead latents; it leaves magnitudes alone.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sae_train.codes import Codes
from sae_train.ops import gather_dot
from sae_train.places import Widths
from sae_train.sae.base import SAES
from sae_train.sae.linear import LinearConfig, LinearSAE


@dataclass
class GatedConfig(LinearConfig):
    """A linear SAE whose activation decides which latents are active, while magnitudes have a scale of their
    own."""

    name: str = "gated"


@SAES.register("gated", GatedConfig)
class GatedSAE(LinearSAE):
    """The parameters of the linear SAE; r_mag [F], b_mag [F] of the magnitudes."""

    config: GatedConfig

    def __init__(self, config: GatedConfig, widths: Widths | int) -> None:
        super().__init__(config, widths)
        self.r_mag = nn.Parameter(torch.zeros(self.d_sae))
        self.b_mag = nn.Parameter(torch.zeros(self.d_sae))

    def magnitudes(self, active: Codes) -> Codes:
        # exp(r) (g - b) + b_mag = exp(r) g + (b_mag - exp(r) b)
        gain = self.r_mag.exp()
        offset = self.b_mag - gain * self.b_enc
        values = torch.relu(active.values * _of_slots(active, gain) + _of_slots(active, offset))
        return replace(active, values=torch.where(active.active(), values, 0))

    def _training_codes(self, x: Tensor, target: Tensor) -> tuple[Codes, dict[str, Tensor]]:
        gates, penalty = super()._training_codes(x, target)
        error = target.detach() - self._decoded(gates, self.w_dec.detach())
        return self.magnitudes(gates), {"gate": self._squared(error), **penalty}

    @torch.no_grad()
    def initialise(self, rows: Tensor, generator: torch.Generator, targets: Tensor | None = None) -> None:
        super().initialise(rows, generator, targets)
        self.r_mag.zero_()
        self.b_mag.copy_(self.b_enc)  # magnitudes start as what the gates let through

    @torch.no_grad()
    def fold_(self) -> None:
        if self.transcodes:  # magnitudes take b_enc off the gate, and with it the centre that it takes over
            self.b_mag.sub_(self.r_mag.exp() * (self.w_enc @ self.centre))
        self.b_mag.div_(self.code_scale)
        super().fold_()


def _of_slots(codes: Codes, of_latents: Tensor) -> Tensor:
    """[F] -> what each slot's latent has: [N, K], or [F] for dense codes."""
    if codes.indices is None:
        return of_latents
    # Indexing has a backward pass that adds in no fixed order on a GPU and with several threads.
    one = of_latents.new_ones(len(codes.values), 1)
    return gather_dot(one, codes.indices, of_latents[:, None])
