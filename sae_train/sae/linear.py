"""The linear SAE: one affine map in, one affine map out; alone, between two places, or across several hooks.

    autoencoder   h = (s x - b_dec) W_enc^T + b_enc       z = activation(h)       s x_hat = z W_dec + b_dec
    transcoder    h = (s x - c) W_enc^T + b_enc           z = activation(h)       t y_hat = z W_dec + b_dec
    crosscoder    the autoencoder on the rows of several hooks side by side, each hook with its own s

Decoder rows have unit norm (a crosscoder's over all hooks together): after each step they are renormalised,
and before it the part of their gradient that only stretches them is removed, so that Adam's moments see the
direction alone (Bricken et al. 2023, "Towards Monosemanticity", appendix). An encoder starts as the decoder's
transpose (Gao et al. 2024, arXiv:2406.04093), which leaves few latents dead. A transcoder's decoder starts
as what the target does on average where a latent is active, and its encoder is scaled by the one number
with which that explains most, so that even the first step is better than none at all.

c is the centre of a transcoder's rows, fixed; with `skip` it adds (s x - c) W_skip^T to its output (Paulo,
Shabalin & Belrose 2025, arXiv:2501.18823). Transcoders: Dunefsky et al. 2024 (arXiv:2406.11944). Crosscoders:
Lindsey et al. 2024, "Sparse Crosscoders for Cross-Layer Features and Model Diffing".
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from sae_train.activations.topk import TopK
from sae_train.batch import Batch
from sae_train.codes import Codes
from sae_train.errors import InputError
from sae_train.losses import Losses, auxk, dead_reconstruction
from sae_train.places import Widths
from sae_train.sae.base import SAE, SAES, LinearLatents, SAEConfig, one_per_hook, per_column
from sae_train.sae.inference import values_of
from sae_train.sae.init import geometric_median, mean_targets, unit_rows

FIT_ROWS = 1024
"""Rows on which a transcoder's encoder is scaled; enough for one number."""


@dataclass
class LinearConfig(SAEConfig):
    """Plain encoder and decoder with a shared bias (the standard SAE)."""

    name: str = "linear"
    skip: bool = False
    """A linear map from rows to targets beside the latents; transcoders only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.skip and self.kind != "transcoder":
            raise InputError("sae.skip", self.skip, f"false, or sae.kind=transcoder instead of {self.kind}")


@SAES.register("linear", LinearConfig)
class LinearSAE(SAE):
    """w_enc [F, d_in], b_enc [F], w_dec [F, d_out] with unit rows, b_dec [d_out], w_skip [d_out, d_in]."""

    config: LinearConfig
    output_scale: Tensor
    centre: Tensor

    def __init__(self, config: LinearConfig, widths: Widths | int) -> None:
        super().__init__(config, widths)
        self.w_enc = nn.Parameter(torch.zeros(self.d_sae, self.d_in))
        self.b_enc = nn.Parameter(torch.zeros(self.d_sae))
        self.w_dec = nn.Parameter(torch.zeros(self.d_sae, self.d_out))
        self.b_dec = nn.Parameter(torch.zeros(self.d_out))
        self.transcodes = config.kind == "transcoder"
        if self.transcodes:
            self.register_buffer("output_scale", one_per_hook(self.widths.outputs))
            self.register_buffer("centre", torch.zeros(self.d_in))
        if config.skip:
            self.w_skip = nn.Parameter(torch.zeros(self.d_out, self.d_in))

    @property
    def code_scale(self) -> Tensor:
        scale = self.output_scale if self.transcodes else self.input_scale
        return scale if scale.dim() == 0 else scale.log().mean().exp()  # the inverse scales give its inverse

    def encode_rows(self, x: Tensor) -> Codes:
        x = self._read(x)
        # Weights are float32 and no copy is made, unless somebody has cast them.
        w, b = self.w_enc.to(x.dtype), self.b_enc.to(x.dtype)
        if torch.compiler.is_compiling():
            return self.magnitudes(self.activation.encode_traced(x, w, b))
        return self.magnitudes(self.activation.encode(x, w, b))

    def encode_latent_rows(self, x: Tensor, latents: Tensor) -> Tensor:
        level = self.activation.own_threshold(latents)
        if level is None:
            return values_of(self.encode_rows(x), latents)
        x = self._read(x)
        w, b = (of_all.index_select(0, latents).to(x.dtype) for of_all in (self.w_enc, self.b_enc))
        pre = functional.linear(x, w, b)
        active = Codes(torch.where(pre > level, pre, 0), latents.int().expand(len(x), -1), self.d_sae)
        return self.magnitudes(active).values

    def decode(self, codes: Codes) -> Tensor:
        made = (self.usable(codes).decode(self.w_dec) + self.b_dec) / self.scale_out()
        return made.to(codes.values.dtype)

    def reconstruct(self, x: Tensor, codes: Codes) -> Tensor:
        if not self.config.skip:
            return self.decode(codes)
        beside = self._base(self._read(self.taken(x)))
        made = (self.usable(codes).decode(self.w_dec) + beside) / self.scale_out()
        return made.to(codes.values.dtype)

    def directions(self, latents: Tensor | Sequence[int]) -> Tensor:
        return self.w_dec.index_select(0, self.chosen(latents)) / self.scale_out()

    def preactivations(self, x: Tensor, features: Tensor | slice = slice(None)) -> Tensor:
        return functional.linear(self._read(x), self.w_enc[features], self.b_enc[features])

    def losses(self, batch: Batch, dead: Tensor) -> Losses:
        x, y = self._read(batch.x), batch.y.float() * self.scale_out()
        target = y - self._base(x)
        codes, terms = self._training_codes(x, target)
        residual = target - self._decoded(codes, self.w_dec)
        terms = {"mse": self._error(codes, residual), **terms}
        for name, (weight, active) in self.activation.also_reconstruct(x, self.w_enc, self.b_enc).items():
            others = self.magnitudes(active)
            terms[name] = weight * self._squared(target - self._decoded(others, self.w_dec))
        if self.config.auxk_coefficient > 0 and max(self.split.counts(len(dead))) > 0:
            rows = (self.w_enc[dead], self.b_enc[dead], self.w_dec[dead])
            terms["auxk"] = self._dead_loss(residual, x, *rows)
        return Losses(terms, codes, (y - residual) / self.scale_out())

    def inputs_and_targets(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """[N, d_in] what the encoder reads; [N, d_out] what the latents shall add up to in training."""
        x = self._read(batch.x)
        return x, batch.y.float() * self.scale_out() - self._base(x)

    def _decoded(self, codes: Codes, w_dec: Tensor) -> Tensor:
        """[N, d_out]: what all latents add up to, of which this process may have a slice."""
        return self.split.total(codes.decode(w_dec))

    def _base(self, x: Tensor) -> Tensor:
        """Encoder inputs x -> the scaled reconstruction without latents: [d_out]; with a skip [N, d_out]."""
        if not self.config.skip:
            return self.b_dec
        return self.b_dec + functional.linear(x, self.w_skip.to(x.dtype))

    def _training_codes(self, x: Tensor, target: Tensor) -> tuple[Codes, dict[str, Tensor]]:
        """Codes of encoder inputs x, and loss terms of the encoder's own.

        Args:
            x: [N, d_in]. target: [N, d_out] what the latents shall add up to.
        """
        codes = self.activation.encode_training(x, self.w_enc, self.b_enc)
        return codes, self.activation.penalty(codes, self.decoder_norms())

    def _error(self, codes: Codes, residual: Tensor) -> Tensor:
        """The main loss; residual [N, d_out] is what is left of the target without all latents' share."""
        return self._squared(residual)

    def _squared(self, error: Tensor) -> Tensor:
        """Close to the FVU: in scaled units a row's mean squared distance from b_dec is about D."""
        return self.split.mean(error.square().sum(dim=-1).mean() / self.d_out)

    def decoder_norms(self) -> Tensor:
        """[F] norms of decoder rows, summed over hooks: what a latent that several hooks share costs."""
        return torch.stack([part.norm(dim=-1) for part in self.w_dec.split(self.widths.outputs, dim=-1)]).sum(
            0
        )

    def _dead_loss(self, residual: Tensor, x: Tensor, w_enc: Tensor, b_enc: Tensor, w_dec: Tensor) -> Tensor:
        k_aux = self.config.k_aux or max(self.d_out // 2, 1)
        explained = dead_reconstruction(x, w_enc, b_enc, w_dec, k_aux, self.split)
        return self.config.auxk_coefficient * auxk(residual, explained, self.split)

    def latents(self) -> LinearLatents | None:
        # A subclass of either may compute something else.
        if type(self) is not LinearSAE or type(self.activation) is not TopK:
            return None
        if self.activation.config.multi > 0 or self.config.skip or self.d_in != self.d_out:
            return None
        return LinearLatents(
            w_enc=self.w_enc,
            b_enc=self.b_enc,
            w_dec=self.w_dec,
            b_dec=self.b_dec,
            k=self.activation.k,
            scale_in=self._scale_in(),
            scale_out=self.scale_out(),
            centre=self._centre(),
            centred=not self.transcodes,
            unit_norm=True,
            dead_loss=self._dead_loss if self.config.auxk_coefficient > 0 else None,
        )

    @torch.no_grad()
    def initialise(self, rows: Tensor, generator: torch.Generator, targets: Tensor | None = None) -> None:
        centre, scale = self._centre_and_scale(rows, self.widths.inputs)
        self.input_scale.copy_(scale)
        self.w_dec.copy_(unit_rows(self.d_sae, self.d_out, generator))
        self.b_enc.zero_()
        if self.transcodes:
            assert targets is not None, "a transcoder starts from rows and their targets"
            self.centre.copy_(centre * self._scale_in())
            self.w_enc.copy_(unit_rows(self.d_sae, self.d_in, generator))
            self._fit(self._read(rows), targets)
        else:
            self.b_dec.copy_(centre * self._scale_in())
            self.w_enc.copy_(self.w_dec)
        self.activation.initialise(self._read(rows), self.w_enc, self.b_enc)

    def _fit(self, x: Tensor, targets: Tensor) -> None:
        """Start a transcoder's decoder from encoder inputs x and raw targets, and scale its encoder to it."""
        centre, scale = self._centre_and_scale(targets, self.widths.outputs)
        self.output_scale.copy_(scale)
        self.b_dec.copy_(centre * self.scale_out())
        y = targets.float() * self.scale_out() - self.b_dec
        found = mean_targets(x, y, self.w_enc)
        self.w_dec.copy_(torch.where(found.norm(dim=-1, keepdim=True) > 0, found, self.w_dec))
        self.after_step()
        # Decoder rows are unit vectors, and many of them are alike at first, so that together they overshoot
        # by far. How much is enough is a matter of least squares, of a few rows: they are in random order.
        self.activation.initialise(x, self.w_enc, self.b_enc)
        x, y = x[:FIT_ROWS], y[:FIT_ROWS]
        made = self.activation.encode(x, self.w_enc, self.b_enc).decode(self.w_dec)
        share = (made * y).double().sum() / made.double().square().sum()
        self.w_enc.mul_(torch.where((share > 0) & torch.isfinite(share), share, 1.0))
        self.b_enc.zero_()  # an activation may have moved it

    def _centre_and_scale(self, rows: Tensor, widths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """[sum of widths] centre of raw rows, and the number that each hook's rows are multiplied by."""
        rows, centres, scales = rows.float(), [], []
        for part in rows.split(widths, dim=-1):
            if self.config.b_dec_init == "geometric_median":
                centres.append(geometric_median(part))
            elif self.config.b_dec_init == "mean":
                centres.append(part.mean(dim=0))
            else:
                centres.append(torch.zeros_like(part[0]))
            # In float64: squares overflow float32 from 1e19.
            mean_norm = torch.linalg.vector_norm(part - centres[-1], dim=-1, dtype=torch.float64).mean()
            scaled = self.config.input_scale == "sqrt_d" and mean_norm > torch.finfo(torch.float32).tiny
            scales.append(part.shape[-1] ** 0.5 / mean_norm if scaled else torch.ones_like(mean_norm))
        return torch.cat(centres), torch.stack(scales).squeeze() if len(scales) == 1 else torch.stack(scales)

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
        # Codes shrink, so that unit decoder rows stay unit: with one hook the factors of the weights are 1.
        code, scale_in, scale_out = self.code_scale.clone(), self._scale_in(), self.scale_out()
        if self.config.skip:
            self.b_dec.sub_(self.w_skip @ self.centre)
            self.w_skip.mul_(scale_in).div_(scale_out.expand(self.d_out)[:, None])
        if self.transcodes:
            self.b_enc.sub_(self.w_enc @ self.centre)
            self.centre.zero_()
        self.w_enc.mul_(scale_in / code)
        self.w_dec.mul_(code / scale_out)
        self.b_enc.div_(code)
        self.b_dec.div_(scale_out)
        self.activation.fold_(code)
        self.input_scale.fill_(1.0)
        if self.transcodes:
            self.output_scale.fill_(1.0)

    def _scale_in(self) -> Tensor:
        return per_column(self.input_scale, self.widths.inputs)

    def scale_out(self) -> Tensor:
        """What raw targets and reconstructions are multiplied by in training: a scalar, or [d_out]."""
        return per_column(self.output_scale, self.widths.outputs) if self.transcodes else self._scale_in()

    def _read(self, rows: Tensor) -> Tensor:
        """Raw rows as the encoder takes them: scaled and centred."""
        return rows.float() * self._scale_in() - self.split.enter(self._centre())

    def _centre(self) -> Tensor:
        return self.centre if self.transcodes else self.b_dec
