"""dictionary_learning: `ae.pt`, a pickled state dict, and `config.json`, whose `dict_class` says what it is.

Its `k` stands in both and has to agree. AutoEncoder.from_pretrained gives decoder rows unit norm and
multiplies codes accordingly, so that is done here when reading. BatchTopK's threshold is a scalar, -1 where
none was learned; AutoEncoder's `bias` is pre-bias and output bias in one; JumpReLU has no pre-bias.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from sae_train.errors import InputError
from sae_train.files import write_json
from sae_train.formats.base import (
    FORMATS,
    About,
    Format,
    FormatConfig,
    Found,
    json_object,
    object_at,
    optional_text,
    text,
    unit,
)
from sae_train.formats.blocks import Matrix
from sae_train.formats.plain import Gate, Plain, Rule, gates_only, prefixes_of, unit_decoder, without_pre_bias
from sae_train.formats.torch_file import State, read_state
from sae_train.places import Widths

CFG, WEIGHTS = "config.json", "ae.pt"
LINEAR = ("encoder.weight", "encoder.bias", "decoder.weight")
CLASSES = (
    *("AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "AutoEncoderTopK", "BatchTopKSAE"),
    *("MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder"),
)
MAX_GROUPS = 64


@FORMATS.register("dictionary_learning", FormatConfig)
class DictionaryLearning(Format):
    files = (CFG, WEIGHTS)

    def refusal(self, plain: Plain) -> str | None:
        if plain.kind != "autoencoder":
            return "dictionary_learning has autoencoders only"
        if plain.rule.name == "group_max":
            return "dictionary_learning has no group-max"
        if plain.rule.name == "topk" and plain.gate is not None:
            return "dictionary_learning's gated SAEs have no top-k"
        return None

    def write(self, saes: Sequence[tuple[Plain, About]], folder: Path, dtype: torch.dtype) -> None:
        ((plain, about),) = saes
        name, tensors = _state(plain)
        whole = {key: t.to(dtype).contiguous() if t.is_floating_point() else t for key, t in tensors.items()}
        torch.save(whole, folder / WEIGHTS)
        place = about.place
        trainer = {
            "dict_class": name,
            "activation_dim": plain.d_in,
            "dict_size": plain.d_sae,
            "k": plain.rule.k,
            "layer": place.layer,
            "lm_name": about.model,
            "submodule_name": place.module or place.key,
        }
        buffer = {"d_submodule": plain.d_in, "io": place.side, "ctx_len": about.context_length}
        table = {"trainer": {key: value for key, value in trainer.items() if value is not None}}
        write_json(folder / CFG, table | {"buffer": buffer, "training": about.facts})

    def read(self, folder: Path) -> list[Found]:
        trainer = object_at(json_object(folder / CFG).get("trainer"), "trainer")
        name = text(trainer.get("dict_class"), "trainer.dict_class", CLASSES)
        d_in = unit(trainer.get("activation_dim"), "trainer.activation_dim")
        d_sae = unit(trainer.get("dict_size"), "trainer.dict_size")
        k = unit(trainer.get("k"), "trainer.k", most=d_sae) if _has_k(name) else None
        state = read_state(folder / WEIGHTS)
        if k is not None and state.whole("k") != k:
            raise InputError("trainer.k", k, f"the k of {WEIGHTS}, {state.whole('k')}")
        plain = _plain(name, state, d_in, d_sae, k)
        submodule, model = (optional_text(trainer.get(key)) for key in ("submodule_name", "lm_name"))
        return [Found("main", plain, submodule, None, model)]


def _has_k(name: str) -> bool:
    return "TopK" in name


def _state(plain: Plain) -> tuple[str, dict[str, Tensor]]:
    """Class and tensors."""
    decoder = plain.w_dec.whole()
    if plain.gate is not None:
        plain = gates_only(plain)
        assert plain.gate is not None
        tensors = {"encoder.weight": plain.w_enc.whole(), "decoder.weight": decoder.T}
        tensors |= {"decoder_bias": plain.b_dec, "gate_bias": plain.b_enc}
        return "GatedAutoEncoder", tensors | {"r_mag": plain.gate.r_mag, "mag_bias": plain.gate.b_mag}
    if plain.rule.name == "threshold" and not (plain.rule.scalar and plain.rule.k):
        plain = without_pre_bias(plain)
        assert plain.rule.threshold is not None
        tensors = {"W_enc": plain.w_enc.whole().T, "b_enc": plain.b_enc, "W_dec": decoder}
        return "JumpReluAutoEncoder", tensors | {"b_dec": plain.b_dec, "threshold": plain.rule.threshold}
    tensors = dict(zip(LINEAR, (plain.w_enc.whole(), plain.b_enc, decoder.T), strict=True))
    if plain.rule.name == "relu":
        return "AutoEncoder", tensors | {"bias": plain.b_dec}
    assert plain.rule.k is not None
    level = -1.0 if plain.rule.threshold is None else float(plain.rule.threshold[0])
    tensors |= {"b_dec": plain.b_dec, "k": torch.tensor(plain.rule.k, dtype=torch.int32)}
    name = "AutoEncoderTopK" if plain.rule.name == "topk" else "BatchTopKSAE"
    return name, tensors | {"threshold": torch.tensor(level)}


def _plain(name: str, state: State, d_in: int, d_sae: int, k: int | None) -> Plain:
    linear: dict[str, tuple[int, ...]]
    linear = dict(zip(LINEAR, ((d_sae, d_in), (d_sae,), (d_in, d_sae)), strict=True))
    own: dict[str, tuple[int, ...]] = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_in)}
    own["b_dec"] = (d_in,)
    scalars: dict[str, tuple[int, ...]] = {"k": (), "threshold": ()}
    gate: Gate | None = None
    rule, prefixes = Rule("relu"), None
    names = ("encoder.weight", "encoder.bias", "decoder.weight", "b_dec")
    if name == "AutoEncoder":
        state.expect(linear | {"bias": (d_in,)})
        names = (*LINEAR, "bias")
    elif name == "AutoEncoderNew":
        state.expect(linear | {"decoder.bias": (d_in,)})
        names = (*LINEAR, "decoder.bias")
    elif name == "GatedAutoEncoder":
        vectors = {key: (d_sae,) for key in ("gate_bias", "r_mag", "mag_bias")}
        weights = {key: linear[key] for key in ("encoder.weight", "decoder.weight")}
        state.expect({**weights, **vectors, "decoder_bias": (d_in,)})
        names = ("encoder.weight", "gate_bias", "decoder.weight", "decoder_bias")
        gate = Gate(state.weights("r_mag"), state.weights("mag_bias"))
    elif name == "JumpReluAutoEncoder":
        state.expect(own | {"threshold": (d_sae,)})
        rule = Rule("threshold", None, state.weights("threshold").clamp_min(0))
    elif name == "MatryoshkaBatchTopKSAE":
        sizes = state.tensors.get("group_sizes", torch.zeros(0))
        if sizes.dim() != 1 or not 1 <= len(sizes) <= MAX_GROUPS or sizes.is_floating_point():
            raise InputError("group_sizes", str(list(sizes.shape)), f"1 to {MAX_GROUPS} whole numbers")
        groups = [int(size) for size in sizes]
        if min(groups) < 1 or sum(groups) != d_sae:
            raise InputError("group_sizes", str(groups)[:80], f"numbers of latents that add up to {d_sae}")
        state.expect(own | scalars | {"group_sizes": (len(groups),)})
        prefixes = prefixes_of(groups)
    else:
        state.expect(linear | {"b_dec": (d_in,)} | scalars)
    if name in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        level = state.weights("threshold").clamp_min(0)
        rule = Rule("threshold", k, level.expand(d_sae).clone())
    elif name == "AutoEncoderTopK":
        rule = Rule("topk", k)
    if name in ("JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE"):
        w_enc, w_dec = state.weights("W_enc").T, state.weights("W_dec")
        b_enc, b_dec = state.weights("b_enc"), state.weights("b_dec")
    else:
        w_enc, b_enc, w_dec, b_dec = (state.weights(key) for key in names)
        w_dec = w_dec.T
    plain = Plain(
        kind="autoencoder",
        widths=Widths((d_in,)),
        w_enc=Matrix.of(w_enc),
        b_enc=b_enc,
        w_dec=Matrix.of(w_dec),
        b_dec=b_dec,
        pre_bias=name not in ("AutoEncoderNew", "JumpReluAutoEncoder"),
        rule=rule,
        gate=gate,
        prefixes=prefixes,
    )
    if name == "AutoEncoder" and not unit_decoder(plain):
        norm = plain.w_dec.norms()
        if bool((norm == 0).any()):
            raise InputError("decoder.weight", WEIGHTS, "rows that are not zero: the library divides by them")
        w_enc_unit, w_dec_unit = plain.w_enc.scaled(norm), plain.w_dec.scaled(1 / norm)
        plain = replace(plain, w_enc=w_enc_unit, b_enc=plain.b_enc * norm, w_dec=w_dec_unit)
    return plain
