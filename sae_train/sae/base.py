"""The architecture axis: parameters, encode, decode, the loss, and the constraint after each step.

Weights are latent-major: `w_enc` and `w_dec` are both [F, D], one latent per contiguous row, so
sparse gathers and per-latent updates read rows and sharding latents is sharding dimension 0.

While it trains, an SAE works in scaled units: the rows of each hook are multiplied by a number, so that
their mean distance from their centre is sqrt(D), which makes one learning rate serve every model and layer.
`folded()` moves the scales into the weights; a published SAE takes raw activations and has scales of 1.

`encode`, `decode` and `forward` take activations as a model has them: `[..., D]`, of any floating dtype, on
any device. An architecture computes with rows, [N, D], in float32.
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from sae_train.activations.base import ACTIVATIONS, ActivationConfig
from sae_train.activations.topk import TopKConfig
from sae_train.batch import Batch
from sae_train.codes import Codes
from sae_train.errors import InputError
from sae_train.losses import Losses
from sae_train.places import Widths
from sae_train.registry import Registry
from sae_train.split import WHOLE, Split

MAX_LATENTS = 2**24
"""Sixteen times the widest SAE published so far; more is a slip of the keyboard or an attack on memory."""

OF_ROWS = ("b_dec", "w_skip", "centre", "input_scale", "output_scale")
"""Tensors of an SAE that have a number for each column of rows or targets, or each hook, however many latents
there are."""

KINDS = {
    "autoencoder": "reconstructs the one hook it reads: hook=NAME",
    "transcoder": "reads one place and reconstructs another: hook=NAME target=NAME",
    "crosscoder": "reads several hooks and reconstructs all of them: hook=NAME+NAME",
}


UNSET: Any = "???"
"""What OmegaConf takes for no value: one activation can take another's place only where none is yet."""


@dataclass
class SAEConfig:
    """What every architecture needs; `name` picks the class from the registry."""

    name: str = "???"
    kind: str = "autoencoder"
    """autoencoder reconstructs its one hook, transcoder another (`target`), crosscoder several (hook=A+B)."""
    d_sae: int | None = None
    """Number of latents F. Unset: expansion times the width of the activations."""
    expansion: float = 8.0
    """Latents per activation dimension when d_sae is not set."""
    activation: ActivationConfig = UNSET
    b_dec_init: str = "geometric_median"
    """Where the decoder bias starts: geometric_median or mean of the first rows, or zeros."""
    input_scale: str = "sqrt_d"
    """sqrt_d scales the rows of each hook so that their mean distance from their centre is sqrt(D); none
    leaves them as they are."""
    auxk_coefficient: float = 1 / 32
    """Weight of the dead-latent loss, 0 is off; 1/32 is Gao et al.'s for a variance-normalised loss."""
    k_aux: int | None = None
    """Dead latents that explain the residual of a row. Unset: half the activation width."""
    dead_after_tokens: int = 10_000_000
    """A latent is dead after this many tokens without firing (never more than a tenth of the run)."""

    def __post_init__(self) -> None:
        if self.activation == UNSET:
            self.activation = TopKConfig()
        if self.kind not in KINDS:
            raise InputError("sae.kind", self.kind, ", ".join(KINDS))
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

    def check_hooks(self, widths: Widths) -> None:
        """Raises InputError unless an SAE of this kind has such hooks."""
        several = len(widths.inputs) > 1
        fits = {
            "autoencoder": not several and not widths.targets,
            "transcoder": bool(widths.targets),
            "crosscoder": several and not widths.targets,
        }
        if not fits[self.kind]:
            other = next((kind for kind, fit in fits.items() if fit), self.kind)
            wanted = f"{other} with these hooks ({KINDS[other]}); {self.kind} {KINDS[self.kind]}"
            raise InputError("sae.kind", self.kind, wanted)


@dataclass(frozen=True)
class LinearLatents:
    """An SAE whose whole training step has a closed form, described for whoever computes it.

        z = the k largest of relu(x w_enc^T + b_enc) in each row      t y_hat = z w_dec + b_dec

    with x the rows times `scale_in`, less `centre`. Its loss is that of `losses`: the mean over rows and
    width of (t y - t y_hat)^2 plus, while latents are dead, `dead_loss`. It has no other parameters.

    Attributes:
        w_enc: [F, D]. b_enc: [F]. w_dec: [F, D]. b_dec: [D]. Rows and targets have the same width D.
        k: slots per row.
        scale_in, scale_out: s and t, what rows and targets are multiplied by; scalars or [D].
        centre: [D] what the encoder takes from scaled rows.
        centred: that is b_dec, which has a gradient through it; if not, `centre` is a constant.
        unit_norm: rows of w_dec are unit vectors; before_step and after_step do what that takes, no more.
        dead_loss: (residual [N, D], x [N, D], then the dead latents' rows of w_enc, b_enc and w_dec) ->
            weighted scalar; None if there is no such term.
    """

    w_enc: nn.Parameter
    b_enc: nn.Parameter
    w_dec: nn.Parameter
    b_dec: nn.Parameter
    k: int
    scale_in: Tensor
    scale_out: Tensor
    centre: Tensor
    centred: bool
    unit_norm: bool
    dead_loss: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor] | None


class SAE(nn.Module, ABC):
    """Base class of every architecture.

    Attributes:
        config: the architecture's configuration, activation included.
        widths: of every hook it reads and reconstructs.
        d_in, d_out, d_sae: widths of a row, of a target, and the number of latents F.
        split: how it is divided among processes while it trains; `d_sae` counts the latents of all.
        input_scale: buffer, scalar or one number per hook that is read; 1 in a published SAE.
    """

    input_scale: Tensor

    def __init__(self, config: SAEConfig, widths: Widths | int) -> None:
        super().__init__()
        self.config = config
        self.widths = Widths((widths,)) if isinstance(widths, int) else widths
        config.check_hooks(self.widths)
        self.d_in, self.d_out = sum(self.widths.inputs), sum(self.widths.outputs)
        self.d_sae = config.num_latents(self.widths.inputs[0])
        self.activation = ACTIVATIONS.build(config.activation, self.d_sae)
        self.split = WHOLE
        self.register_buffer("input_scale", one_per_hook(self.widths.inputs))

    @property
    @abstractmethod
    def code_scale(self) -> Tensor:
        """Scalar by which `folded()` divides codes."""

    def encode(self, x: Tensor) -> Codes:
        """The codes of raw activations.

        Args:
            x: [..., d_in], floating; on another device than the weights it is copied to theirs.

        Returns:
            Codes whose rows stand as those of x, `values` [..., K] in float32, on the device of the weights.

        Raises:
            InputError: x is not floating, or not d_in wide.
        """
        codes = self.encode_rows(self.taken(x).reshape(-1, self.d_in))
        return codes if x.dim() == 2 else codes.reshape(x.shape[:-1])

    def encode_latents(self, x: Tensor, latents: Tensor | Sequence[int]) -> Tensor:
        """Activations of a few latents only, as they are in the codes of all.

        Where a latent is active whatever the others do (ReLU, thresholds) only these latents are computed, so
        values are those of `encode` to rounding. Where latents compete all have to be looked at, as `encode`
        does, a bounded number of pre-activations at a time, and values are those of `encode` to the bit.

        Args:
            x: as in `encode`.
            latents: [L] whole numbers from 0 to d_sae - 1, in any order.

        Returns:
            [..., L] float32, 0 where a latent is not active; on the device of the weights.

        Raises:
            InputError: as `encode`; or latents are not such numbers.
        """
        chosen = self.chosen(latents)
        values = self.encode_latent_rows(self.taken(x).reshape(-1, self.d_in), chosen)
        return values.reshape(*x.shape[:-1], len(chosen))

    @abstractmethod
    def decode(self, codes: Codes) -> Tensor:
        """Codes -> [..., d_out] reconstruction in the units of the raw activations.

        It is computed in float32 and given in the dtype of `codes.values`: float32, as `encode` makes them.
        What a skip connection adds is not in it; `reconstruct` and `forward` have that too.

        Raises:
            InputError: codes of another number of latents.
        """

    def reconstruct(self, x: Tensor, codes: Codes) -> Tensor:
        """Activations [..., d_in] and their codes -> what `decode` gives, and what a skip connection adds."""
        return self.decode(codes)

    def first_latents(self) -> list[int]:
        """How many latents, counted from the first, have learned to reconstruct alone; none in most SAEs."""
        return []

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d_in] -> [..., d_out], its reconstruction or a transcoder's guess of the target.

        Computed in float32, then given in the dtype of x and on its device. Raises InputError as `encode`.
        """
        return self.reconstruct(x, self.encode(x)).to(x)

    @abstractmethod
    def directions(self, latents: Tensor | Sequence[int]) -> Tensor:
        """latents [L] -> [L, d_out]: what a unit of each adds to a reconstruction, in raw units.

        Raises:
            InputError: as `encode_latents`.
        """

    @abstractmethod
    def encode_rows(self, x: Tensor) -> Codes:
        """What `encode` does with rows: x [N, d_in] -> codes [N, K]."""

    @abstractmethod
    def encode_latent_rows(self, x: Tensor, latents: Tensor) -> Tensor:
        """What `encode_latents` does with rows: x [N, d_in], latents [L] int64 in range -> [N, L]."""

    def magnitudes(self, active: Codes) -> Codes:
        """What the activation makes of pre-activations -> codes: the same, unless values are set apart."""
        return active

    def taken(self, x: Tensor) -> Tensor:
        """Raw activations, found to be [..., d_in] and floating, on the device of the weights."""
        if not x.is_floating_point() or x.shape[-1:] != (self.d_in,):
            found = f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
            raise InputError("x", found, f"floating point activations of shape [..., {self.d_in}]")
        return x.to(self.input_scale.device)

    def chosen(self, latents: Tensor | Sequence[int]) -> Tensor:
        """[L] int64 on the device of the weights, once they are found to be numbers of latents."""
        wanted = f"a list of whole numbers from 0 to {self.d_sae - 1}"
        try:
            found = torch.as_tensor(latents, device=self.input_scale.device)
        except (TypeError, ValueError, RuntimeError):
            raise InputError("latents", str(latents)[:80], wanted) from None
        found = found if found.numel() > 0 else found.long()
        if found.dim() != 1 or found.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
            raise InputError(
                "latents", f"{str(found.dtype).removeprefix('torch.')} {list(found.shape)}", wanted
            )
        outside = found[(found < 0) | (found >= self.d_sae)]
        if len(outside):
            raise InputError("latents", int(outside[0]), wanted)
        return found.long()

    def usable(self, codes: Codes) -> Codes:
        """Codes that this SAE's latents can have, their values at least float32."""
        if codes.d_sae != self.d_sae:
            raise InputError("codes", f"{codes.d_sae} latents", f"codes of {self.d_sae} latents")
        wide = torch.promote_types(codes.values.dtype, torch.float32)
        return codes if codes.values.dtype == wide else replace(codes, values=codes.values.to(wide))

    @abstractmethod
    def preactivations(self, x: Tensor, features: Tensor | slice = slice(None)) -> Tensor:
        """x [N, D] -> [N, len(features)] pre-activations of the chosen latents only, in scaled units."""

    @abstractmethod
    def losses(self, batch: Batch, dead: Tensor) -> Losses:
        """The loss of a batch. dead [F_dead] int64 are the latents that count as dead now."""

    @abstractmethod
    def initialise(self, rows: Tensor, generator: torch.Generator, targets: Tensor | None = None) -> None:
        """Set the weights from real activations.

        Args:
            rows: [R, d_in]. generator: seeded, on the CPU.
            targets: [R, d_out] of the same tokens; None for what reconstructs its rows.
        """

    def of_latents(self) -> set[str]:
        """Names of the tensors of its state that have a row for each latent."""
        state = self.state_dict(keep_vars=True)
        return {name for name, x in state.items() if x.ndim > 0 and name not in OF_ROWS}

    @torch.no_grad()
    def split_(self, split: Split) -> None:
        """Keep this process's latents only. Called once, before anything else works with the weights.

        Raises:
            InputError: they cannot be divided so.
        """
        if self.d_sae % split.latents.size:
            wanted = f"a divisor of the number of latents, d_sae={self.d_sae}"
            raise InputError("mesh.feature", split.latents.size, wanted)
        for name in sorted(self.of_latents()):
            path, _, last = name.rpartition(".")
            module = self.get_submodule(path)
            tensor = split.cut(getattr(module, last).detach())
            setattr(module, last, nn.Parameter(tensor) if last in module._parameters else tensor)
        self.split = split
        self.activation.split_(split)

    def begin_step(self, step: int, steps: int) -> None:
        """Called before step `step` of `steps`. What changes over a run is a function of the two alone."""
        self.activation.begin_step(step, steps)

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
        """Move the scales into the weights, in place: codes are divided by `code_scale`, which keeps the same
        latents, and reconstructions stay."""

    def folded(self) -> Self:
        """A copy that takes raw activations: same support, same reconstruction, codes in raw units."""
        twin = copy.deepcopy(self)
        twin.fold_()
        return twin


def one_per_hook(widths: Sequence[int]) -> Tensor:
    """Ones to scale rows with: a scalar for one hook, else one number for each."""
    return torch.ones(() if len(widths) == 1 else len(widths))


def per_column(scale: Tensor, widths: Sequence[int]) -> Tensor:
    """A number per hook -> what rows of all hooks side by side are multiplied by."""
    if len(widths) == 1:
        return scale
    return torch.cat([one.expand(width) for one, width in zip(scale, widths, strict=True)])


SAES: Registry[SAE] = Registry("sae")
