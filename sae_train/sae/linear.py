"""The linear SAE: one affine map in, one affine map out.

    h = (s x - b_dec) W_enc^T + b_enc        z = activation(h)        s x_hat = z W_dec + b_dec

Decoder rows have unit norm: after each step they are renormalised, and before it the part of their
gradient that only stretches them is removed, so that Adam's moments see the direction alone
(Bricken et al. 2023, "Towards Monosemanticity", appendix). The encoder starts as the decoder's
transpose (Gao et al. 2024, arXiv:2406.04093), which leaves few latents dead.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from sae_train.activations.topk import TopK
from sae_train.batch import Batch
from sae_train.codes import Codes
from sae_train.losses import Losses, auxk, dead_reconstruction
from sae_train.sae.base import SAE, SAES, LinearLatents, SAEConfig
from sae_train.sae.init import geometric_median, unit_rows


@dataclass
class LinearConfig(SAEConfig):
    """Plain encoder and decoder with a shared bias (the standard SAE)."""

    name: str = "linear"


@SAES.register("linear", LinearConfig)
class LinearSAE(SAE):
    """w_enc [F, D], b_enc [F], w_dec [F, D] with unit rows, b_dec [D]."""

    config: LinearConfig

    def __init__(self, config: LinearConfig, d_in: int) -> None:
        super().__init__(config, d_in)
        self.w_enc = nn.Parameter(torch.zeros(self.d_sae, d_in))
        self.b_enc = nn.Parameter(torch.zeros(self.d_sae))
        self.w_dec = nn.Parameter(torch.zeros(self.d_sae, d_in))
        self.b_dec = nn.Parameter(torch.zeros(d_in))

    def encode(self, x: Tensor) -> Codes:
        return self.activation.encode(self._scaled(x) - self.b_dec, self.w_enc, self.b_enc)

    def decode(self, codes: Codes) -> Tensor:
        return (codes.decode(self.w_dec) + self.b_dec) / self.input_scale

    def preactivations(self, x: Tensor, features: Tensor | slice = slice(None)) -> Tensor:
        return functional.linear(self._scaled(x) - self.b_dec, self.w_enc[features], self.b_enc[features])

    def losses(self, batch: Batch, dead: Tensor) -> Losses:
        x = self._scaled(batch.x) - self.b_dec
        codes = self.activation.encode(x, self.w_enc, self.b_enc)
        scaled_y_hat = codes.decode(self.w_dec) + self.b_dec
        residual = self._scaled(batch.y) - scaled_y_hat
        # In scaled units a row's mean squared distance from b_dec is about D, so this is close to the FVU.
        terms = {"mse": residual.square().sum(dim=-1).mean() / self.d_in}
        terms |= self.activation.penalty(codes, self.w_dec.norm(dim=-1))
        if self.config.auxk_coefficient > 0 and len(dead) > 0:
            rows = (self.w_enc[dead], self.b_enc[dead], self.w_dec[dead])
            terms["auxk"] = self._dead_loss(residual, x, *rows)
        return Losses(terms, codes, scaled_y_hat / self.input_scale)

    def _dead_loss(self, residual: Tensor, x: Tensor, w_enc: Tensor, b_enc: Tensor, w_dec: Tensor) -> Tensor:
        k_aux = self.config.k_aux or max(self.d_in // 2, 1)
        explained = dead_reconstruction(x, w_enc, b_enc, w_dec, k_aux)
        return self.config.auxk_coefficient * auxk(residual, explained)

    def latents(self) -> LinearLatents | None:
        if type(self) is not LinearSAE or type(self.activation) is not TopK:
            return None  # a subclass may compute something else: it says itself what
        return LinearLatents(
            w_enc=self.w_enc,
            b_enc=self.b_enc,
            w_dec=self.w_dec,
            b_dec=self.b_dec,
            k=self.activation.config.k,
            centred=True,
            unit_norm=True,
            dead_loss=self._dead_loss if self.config.auxk_coefficient > 0 else None,
        )

    @torch.no_grad()
    def initialise(self, rows: Tensor, generator: torch.Generator) -> None:
        rows = rows.float()
        if self.config.b_dec_init == "geometric_median":
            centre = geometric_median(rows)
        elif self.config.b_dec_init == "mean":
            centre = rows.mean(dim=0)
        else:
            centre = torch.zeros_like(rows[0])
        if self.config.input_scale == "sqrt_d":
            # In float64: squares overflow float32 from 1e19.
            mean_norm = torch.linalg.vector_norm(rows - centre, dim=-1, dtype=torch.float64).mean()
            if mean_norm > torch.finfo(torch.float32).tiny:
                self.input_scale.copy_(self.d_in**0.5 / mean_norm)
        self.b_dec.copy_(centre * self.input_scale)
        self.w_dec.copy_(unit_rows(self.d_sae, self.d_in, generator))
        self.w_enc.copy_(self.w_dec)
        self.b_enc.zero_()

    @torch.no_grad()
    def before_step(self) -> None:
        if self.w_dec.grad is not None:
            parallel = (self.w_dec.grad * self.w_dec).sum(dim=-1, keepdim=True)
            self.w_dec.grad.addcmul_(parallel, self.w_dec, value=-1)

    @torch.no_grad()
    def after_step(self, skipped: Tensor | None = None) -> None:
        norm = self.w_dec.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        self.w_dec.div_(norm if skipped is None else torch.where(skipped, 1.0, norm))

    @torch.no_grad()
    def fold_(self) -> None:
        # Unit decoder rows stay unit: codes shrink instead, so w_enc needs no change at all.
        self.b_enc.div_(self.input_scale)
        self.b_dec.div_(self.input_scale)
        self.input_scale.fill_(1.0)

    def _scaled(self, rows: Tensor) -> Tensor:
        return rows.float() * self.input_scale
