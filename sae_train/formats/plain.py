"""What an SAE computes, said with the fewest tensors, and every change of form that leaves it the same.

    h = (x - b_dec) W_enc^T + b_enc        x alone if there is no `pre_bias`
    z = h where the rule lets it through   relu(exp(r_mag) (h - b_enc) + b_mag) there, if there is a `gate`
    y = z W_dec + b_dec                    + x W_skip^T

This is the one place where an SAE is folded: scales, norms, the pre-bias, thresholds and gates. A format
writes the form that it can hold, and reads back into the form that it has.

    pre-bias     b_enc - W_enc b_dec in b_enc, and the same times exp(r_mag) in b_mag
    BatchTopK    its learned scalar as everybody's threshold
    Matryoshka   nothing: its prefixes matter in training only
    gates        a JumpReLU: h' = exp(r_mag) (h - b_enc) + b_mag, on where h > theta, which is where h' is
                 above b_mag - exp(r_mag) (b_enc - theta) (Rajamanoharan et al. 2024, arXiv:2404.16014)
    top-k        thresholds only by `calibrated`, on rows, and then the codes are other codes
"""

from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_train.activations.base import ActivationConfig
from sae_train.activations.batch_topk import BatchTopKConfig
from sae_train.activations.group_max import GroupMaxConfig
from sae_train.activations.jumprelu import JumpReLUConfig
from sae_train.activations.relu import ReLUConfig
from sae_train.activations.topk import TopKConfig
from sae_train.errors import InputError
from sae_train.formats.blocks import Matrix, TensorFile
from sae_train.places import Widths
from sae_train.registry import discover
from sae_train.sae.base import SAE, SAES, SAEConfig
from sae_train.sae.gated import GatedConfig
from sae_train.sae.io import CONFIG, WEIGHTS, skeleton
from sae_train.sae.linear import LinearConfig
from sae_train.sae.matryoshka import MatryoshkaConfig

UNIT = 1e-5
"""How far a norm may be from 1 to count as 1; other libraries warn above this."""


IN_WORDS = {"relu": "relu", "topk": "top-k", "group_max": "group-max", "threshold": "thresholds"}


@dataclass(frozen=True)
class Rule:
    """Which latents are active on a row.

    Attributes:
        name: relu (h > 0), topk (the k largest of relu(h)), group_max (the largest of each of k groups of
            relu(h)), threshold (h > threshold).
        k: of topk and group_max; of a threshold that BatchTopK learned, the mean number it was learned for.
        threshold: [F] float32, never negative.
    """

    name: str
    k: int | None = None
    threshold: Tensor | None = None

    @property
    def scalar(self) -> bool:
        """Whether one threshold serves all latents."""
        return self.threshold is not None and bool((self.threshold == self.threshold[0]).all())

    def level(self, d_sae: int) -> Tensor:
        """[F] what h has to exceed, of relu and threshold."""
        return self.threshold if self.threshold is not None else torch.zeros(d_sae)


@dataclass(frozen=True)
class Gate:
    """Magnitudes apart from the gates: both [F] float32."""

    r_mag: Tensor
    b_mag: Tensor


@dataclass(frozen=True)
class Plain:
    """An SAE that takes and gives raw rows.

    Attributes:
        kind: autoencoder, transcoder or crosscoder.
        widths: of the hooks; those of a crosscoder stand side by side.
        w_enc, w_dec: [F, d_in], [F, d_out]. b_enc [F], b_dec [d_out] float32.
        pre_bias: whether the encoder takes b_dec from its rows.
        w_skip: [d_out, d_in], of raw rows.
        prefixes: of a Matryoshka SAE, as its configuration writes them.
    """

    kind: str
    widths: Widths
    w_enc: Matrix
    b_enc: Tensor
    w_dec: Matrix
    b_dec: Tensor
    pre_bias: bool
    rule: Rule
    w_skip: Tensor | None = None
    gate: Gate | None = None
    prefixes: str | None = None

    @property
    def d_sae(self) -> int:
        return self.w_enc.shape[0]

    @property
    def d_in(self) -> int:
        return self.w_enc.shape[1]

    @property
    def d_out(self) -> int:
        return self.w_dec.shape[1]

    def describe(self) -> str:
        """In words, for messages."""
        gated = "gated " if self.gate else ""
        skip = "skip " if self.w_skip is not None else ""
        words = f"{gated}{skip}{self.kind}"
        return f"{'an' if words[0] == 'a' else 'a'} {words} with {IN_WORDS[self.rule.name]}"


def of_sae(sae: SAE) -> Plain:
    """An SAE of ours, in training or published form."""
    published = sae.folded()
    return _of_tensors(sae.config, sae.widths, dict(published.state_dict()))


def open_sae(folder: Path) -> Plain:
    """A published SAE of ours, its matrices left on disk.

    Raises:
        InputError: as `sae.io.load_sae` does; values that are not finite are found when they are read.
    """
    discover("sae_train.activations")
    discover("sae_train.sae")
    sae = skeleton(folder / CONFIG)
    file = TensorFile(folder / WEIGHTS)
    file.expect({name: tuple(tensor.shape) for name, tensor in sae.state_dict().items()})
    tensors: dict[str, Any] = {}
    for name in file.shapes:
        tensors[name] = file.matrix(name) if name in ("w_enc", "w_dec") else file.tensor(name)
    for name in ("input_scale", "output_scale"):
        if name in tensors and bool((tensors[name] != 1).any()):
            raise InputError(
                name, float(tensors[name].flatten()[0]), "1: a published SAE takes raw activations"
            )
    return _of_tensors(sae.config, sae.widths, tensors)


def _of_tensors(config: SAEConfig, widths: Widths, tensors: dict[str, Any]) -> Plain:
    if not isinstance(config, LinearConfig):
        raise InputError("sae.name", config.name, "linear, gated or matryoshka: others have no format yet")

    def matrix(name: str) -> Matrix:
        return tensors[name] if isinstance(tensors[name], Matrix) else Matrix.of(tensors[name].cpu())

    def vector(name: str) -> Tensor:
        found: Tensor = tensors[name].detach().float().cpu()
        return found

    gated = isinstance(config, GatedConfig)
    centre = vector("centre") if config.kind == "transcoder" else None
    assert centre is None or not bool(centre.any()), "a folded transcoder has no centre"
    return Plain(
        kind=config.kind,
        widths=widths,
        w_enc=matrix("w_enc"),
        b_enc=vector("b_enc"),
        w_dec=matrix("w_dec"),
        b_dec=vector("b_dec"),
        pre_bias=config.kind != "transcoder",
        rule=_rule_of(config.activation, tensors, len(tensors["b_enc"])),
        w_skip=vector("w_skip") if config.skip else None,
        gate=Gate(vector("r_mag"), vector("b_mag")) if gated else None,
        prefixes=config.prefixes if isinstance(config, MatryoshkaConfig) else None,
    )


def _rule_of(config: ActivationConfig, tensors: dict[str, Any], d_sae: int) -> Rule:
    if isinstance(config, TopKConfig):
        return Rule("topk", config.k)
    if isinstance(config, GroupMaxConfig):
        return Rule("group_max", config.k)
    if isinstance(config, ReLUConfig):
        return Rule("relu")
    if isinstance(config, JumpReLUConfig):
        scale = tensors["activation.control.coefficient"].float().cpu().sqrt()
        return Rule("threshold", None, tensors["activation.threshold"].float().cpu().clamp_min(0) * scale)
    if isinstance(config, BatchTopKConfig):
        level = tensors["activation.threshold"].float().cpu().clamp_min(0)
        return Rule("threshold", config.k, level.expand(d_sae).clone())
    wanted = "topk, group_max, relu, jumprelu or batch_topk: others have no format yet"
    raise InputError("sae.activation.name", config.name, wanted)


def to_sae(plain: Plain) -> SAE:
    """An SAE of ours that computes the same: what `load_sae` gives, in evaluation mode.

    Raises:
        InputError: the form is none that our SAEs have, or memory does not suffice.
    """
    discover("sae_train.activations")
    discover("sae_train.sae")
    transcodes = plain.kind == "transcoder"
    plain = without_pre_bias(plain) if transcodes else with_pre_bias(plain)
    activation, state = _activation_of(plain)
    options: dict[str, Any] = {"kind": plain.kind, "d_sae": plain.d_sae, "activation": activation}
    if plain.w_skip is not None:
        if not transcodes:
            raise InputError("skip", plain.kind, "a skip connection of a transcoder; ours have no other")
        options["skip"] = True
    if plain.gate is not None:
        config: SAEConfig = GatedConfig(**options)
        state |= {"r_mag": plain.gate.r_mag, "b_mag": plain.gate.b_mag}
    elif plain.prefixes is not None:
        config = MatryoshkaConfig(**options, prefixes=plain.prefixes)
    else:
        config = LinearConfig(**options)
    with torch.device("meta"):
        sae = SAES.build(config, plain.widths)
    state |= {"w_enc": plain.w_enc.whole(), "b_enc": plain.b_enc, "w_dec": plain.w_dec.whole()}
    state |= {"b_dec": plain.b_dec}
    if plain.w_skip is not None:
        state["w_skip"] = plain.w_skip
    for name, like in sae.state_dict().items():
        if name in ("input_scale", "output_scale"):
            state[name] = torch.ones(like.shape)
        elif name == "centre":
            state[name] = torch.zeros(like.shape)
    sae.load_state_dict(state, assign=True)
    return sae.eval().requires_grad_(False)


def _activation_of(plain: Plain) -> tuple[ActivationConfig, dict[str, Tensor]]:
    """Our activation of a rule, and its tensors."""
    rule = plain.rule
    if rule.name == "topk":
        assert rule.k is not None
        return TopKConfig(k=rule.k), {}
    if rule.name == "group_max":
        assert rule.k is not None
        return GroupMaxConfig(k=rule.k), {}
    control = {f"activation.control.{name}": torch.ones(()) for name in ("coefficient", "size")}
    if rule.name == "relu":
        return ReLUConfig(target_l0=None), control
    assert rule.threshold is not None
    if rule.k is not None and rule.scalar:
        state = {"activation.threshold": rule.threshold[0].clone()}
        return BatchTopKConfig(k=rule.k), state | {"activation.threshold_weight": torch.ones(())}
    return JumpReLUConfig(target_l0=None), control | {"activation.threshold": rule.threshold}


def prefixes_of(sizes: list[int]) -> str:
    """Sizes of consecutive groups of latents -> `prefixes` of a Matryoshka SAE."""
    total, ends = sum(sizes), [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return " ".join(str(Fraction(end, total)) for end in ends)


def without_pre_bias(plain: Plain) -> Plain:
    """The same, of an encoder that reads rows as they are."""
    return _moved(plain, -1.0, False) if plain.pre_bias else plain


def with_pre_bias(plain: Plain) -> Plain:
    """The same, of an encoder that takes b_dec from its rows; they must be as wide as what is decoded."""
    return plain if plain.pre_bias else _moved(plain, 1.0, True)


def _moved(plain: Plain, sign: float, pre_bias: bool) -> Plain:
    shift = sign * plain.w_enc.times(plain.b_dec)
    gate = plain.gate
    if gate is not None:
        gate = replace(gate, b_mag=(gate.b_mag.double() + gate.r_mag.double().exp() * shift).float())
    return replace(plain, b_enc=(plain.b_enc.double() + shift).float(), gate=gate, pre_bias=pre_bias)


def gates_only(plain: Plain) -> Plain:
    """The same gated SAE, its thresholds moved into the biases of its gates."""
    assert plain.gate is not None and plain.rule.name in ("relu", "threshold")
    return replace(plain, b_enc=plain.b_enc - plain.rule.level(plain.d_sae), rule=Rule("relu"))


def as_thresholds(plain: Plain) -> Plain:
    """The same as a JumpReLU: relu, thresholds and gates become thresholds.

    Raises:
        InputError: the rule compares latents with each other.
    """
    if plain.rule.name in ("topk", "group_max"):
        raise InputError("sae.activation.name", plain.rule.name, "a rule that looks at each latent alone")
    level = plain.rule.level(plain.d_sae)
    if plain.gate is None:
        return replace(plain, rule=replace(plain.rule, name="threshold", threshold=level))
    gain, b_mag = plain.gate.r_mag.double().exp(), plain.gate.b_mag
    moved = b_mag.double() - gain * (plain.b_enc.double() - level.double())
    return replace(
        plain,
        w_enc=plain.w_enc.scaled(gain.float()),
        b_enc=b_mag,
        rule=Rule("threshold", None, moved.clamp_min(0).float()),
        gate=None,
    )


def unit_decoder(plain: Plain) -> bool:
    """Whether all rows of the decoder are unit vectors."""
    return bool(((plain.w_dec.norms() - 1).abs() <= UNIT).all())
