"""SAELens 6: `cfg.json`, `sae_weights.safetensors`, `sparsity.safetensors`; what most tools read.

Rules compared here with its own code: `k` is 100 where the file has none; without `sae_lens_version` in the
metadata an older reader runs, which forgets hooks and defaults; `apply_b_dec_to_input` is true by default and
an error in a transcoder; a top-k SAE whose `rescale_acts_by_decoder_norm` is false cannot be opened by
dashboards, and true changes nothing if decoder rows are unit vectors; a scale of the input is ignored when a
folder is loaded from disk, so there is none here. There is no class for top-k transcoders or crosscoders.
Matrices are [d_in, F] and [F, d_out], all tensors of one dtype. Folders of earlier releases are read as 6
reads them: many published SAEs are of those.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

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
    flag,
    json_object,
    object_at,
    optional_text,
    shown,
    text,
    unit,
)
from sae_train.formats.blocks import NAMES, Matrix, Stored, TensorFile, write_file
from sae_train.formats.plain import Gate, Plain, Rule, as_thresholds, gates_only, unit_decoder
from sae_train.places import Widths

VERSION = "6.54.12"
"""That was tested. Any of 6 reads it; one below 6.0.0, or none, would be read by other rules."""
CFG, WEIGHTS, SPARSITY = "cfg.json", "sae_weights.safetensors", "sparsity.safetensors"
TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
ARCHITECTURES = ("standard", "topk", "jumprelu", "gated", *TRANSCODERS)
RENAMED = {"hook_point": "hook_name", "activation_fn_str": "activation_fn"}
"""What a key was called before release 6."""
DESCRIBED = ("model_name", "hook_name", "hook_name_out")
"""Keys that lay beside the others then, and that are of use here."""
ONES = "scaling_factor"
"""A tensor that some of those releases wrote, of ones."""
DTYPES = {dtype: str(dtype).removeprefix("torch.") for dtype in NAMES}


@FORMATS.register("saelens", FormatConfig)
class SAELens(Format):
    files = (CFG, WEIGHTS)

    def refusal(self, plain: Plain) -> str | None:
        return refusal(plain)

    def write(self, saes: Sequence[tuple[Plain, About]], folder: Path, dtype: torch.dtype) -> None:
        ((plain, about),) = saes
        config = write_weights(plain, about, folder, dtype)
        write_json(folder / CFG, config)

    def read(self, folder: Path) -> list[Found]:
        return [read(folder)]


def refusal(plain: Plain) -> str | None:
    if plain.kind == "crosscoder":
        return "SAELens has no class for crosscoders"
    if plain.rule.name == "group_max":
        return "SAELens has no group-max"
    if plain.rule.name == "topk" and plain.gate is not None:
        return "SAELens' gated SAEs have no top-k"
    if plain.rule.name == "topk" and plain.kind == "transcoder":
        return "SAELens has no top-k transcoder"
    return None


def write_weights(plain: Plain, about: About, folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Write the tensors and return the configuration."""
    config: dict[str, Any] = {"d_in": plain.d_in, "d_sae": plain.d_sae, "dtype": DTYPES[dtype]}
    transcodes = plain.kind == "transcoder"
    if plain.gate is not None:
        plain = as_thresholds(plain) if transcodes else gates_only(plain)
    tensors: dict[str, Tensor | Stored] = {"W_enc": Stored(plain.w_enc, transposed=True)}
    tensors |= {"W_dec": Stored(plain.w_dec), "b_dec": plain.b_dec}
    if plain.gate is not None:
        tensors |= {"b_gate": plain.b_enc, "r_mag": plain.gate.r_mag, "b_mag": plain.gate.b_mag}
        architecture = "gated"
    else:
        tensors["b_enc"] = plain.b_enc
        architecture = {"relu": "standard", "topk": "topk", "threshold": "jumprelu"}[plain.rule.name]
    if plain.rule.threshold is not None:
        tensors["threshold"] = plain.rule.threshold
    if transcodes:
        skip = "" if plain.w_skip is None else "skip_"
        architecture = ("jumprelu_" if plain.rule.name == "threshold" else "") + skip + "transcoder"
        config["d_out"] = plain.d_out
        if plain.w_skip is not None:
            tensors["W_skip"] = plain.w_skip
    if plain.rule.name == "topk":
        config |= {"k": plain.rule.k, "rescale_acts_by_decoder_norm": unit_decoder(plain)}
    write_file(folder / WEIGHTS, tensors, dtype)
    if about.density is not None:
        log10 = (about.density.double() + 1e-10).log10().clamp(max=0).float()
        write_file(folder / SPARSITY, {"sparsity": log10}, torch.float32)
    return config | {
        "architecture": architecture,
        "apply_b_dec_to_input": plain.pre_bias,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "device": "cpu",
        "metadata": metadata(about, transcodes),
    }


def metadata(about: About, transcodes: bool) -> dict[str, Any]:
    """What dashboards and evaluations read, in the names that they know."""
    place = about.place
    out = {
        "sae_lens_version": VERSION,
        "model_name": about.model,
        "model_class_name": "AutoModelForCausalLM",
        "hook_name": place.tl or place.module or place.key,
        "hf_hook_name": place.module,
        "hook_head_index": None,
        "prepend_bos": True,
        "context_size": about.context_length,
        "dataset_path": about.corpus,
        "l0": about.l0,
        "training": about.facts,
    }
    if transcodes and about.outputs:
        target = about.outputs[0]
        out["hook_name_out"] = target.tl or target.module or target.key
        out["hf_hook_name_out"] = target.module
    return {key: value for key, value in out.items() if value is not None or key == "hook_head_index"}


def read(folder: Path) -> Found:
    table = as_of_6(json_object(folder / CFG))
    architecture = text(table.get("architecture"), "architecture", ARCHITECTURES)
    d_in, d_sae = (unit(table.get(key), key) for key in ("d_in", "d_sae"))
    described = object_at(table.get("metadata", {}), "metadata")
    text(table.get("normalize_activations", "none"), "normalize_activations", ("none",))
    transcodes = architecture in TRANSCODERS
    pre_bias = flag(table, "apply_b_dec_to_input", not transcodes)
    if transcodes and pre_bias:
        raise InputError("apply_b_dec_to_input", True, "false in a transcoder")
    d_out = unit(table.get("d_out", 768), "d_out") if transcodes else d_in
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_out), "b_dec": (d_out,)}
    biases = ("b_gate", "b_mag", "r_mag") if architecture == "gated" else ("b_enc",)
    shapes |= {name: (d_sae,) for name in biases}
    if architecture.startswith("jumprelu"):
        shapes["threshold"] = (d_sae,)
    if "skip" in architecture:
        shapes["W_skip"] = (d_out, d_in)
    file = TensorFile(folder / WEIGHTS)
    if ONES in file.shapes:
        shapes[ONES] = (d_sae,)
    file.expect(shapes)
    if ONES in shapes and bool((file.tensor(ONES) != 1).any()):
        raise InputError(ONES, str(file.path), "ones: others were to be folded before an SAE was published")
    rule = Rule("relu")
    if architecture == "topk":
        rule = Rule("topk", unit(table.get("k", 100), "k", most=d_sae))
    elif architecture.startswith("jumprelu"):
        rule = Rule("threshold", None, file.tensor("threshold").clamp_min(0))
    gated = architecture == "gated"
    plain = Plain(
        kind="transcoder" if transcodes else "autoencoder",
        widths=Widths((d_in,), (d_out,) if transcodes else ()),
        w_enc=file.matrix("W_enc", transposed=True),
        b_enc=file.tensor("b_gate" if gated else "b_enc"),
        w_dec=file.matrix("W_dec"),
        b_dec=file.tensor("b_dec"),
        pre_bias=pre_bias,
        rule=rule,
        w_skip=file.tensor("W_skip") if "W_skip" in shapes else None,
        gate=Gate(file.tensor("r_mag"), file.tensor("b_mag")) if gated else None,
    )
    if architecture == "topk" and flag(table, "rescale_acts_by_decoder_norm", False):
        plain = _by_decoder_norm(plain)
    hook, target = (optional_text(described.get(key)) for key in ("hook_name", "hook_name_out"))
    model = optional_text(described.get("model_name"))
    return Found("main", plain, hook, target if transcodes else None, model)


def as_of_6(table: dict[str, Any]) -> dict[str, Any]:
    """A configuration of release 6 as it is, one of an earlier release as 6 understands it.

    Raises:
        InputError: one of its keys is of another type, or an option is on that 6 has no more.
    """
    version = table.get("sae_lens_version")
    if version is None:
        version = object_at(table.get("metadata", {}), "metadata").get("sae_lens_version")
    if version is not None:
        first = text(version, "sae_lens_version").split(".")[0]
        if not first.isascii() or not first.isdigit():
            raise InputError("sae_lens_version", shown(version), "a version such as 6.0.0")
        if int(first[:4]) >= 6:
            return table
    old = {RENAMED.get(key, key): value for key, value in table.items()}
    if flag(old, "finetuning_scaling_factor", False):
        raise InputError("finetuning_scaling_factor", True, "false")
    made = {"architecture": "standard", "apply_b_dec_to_input": True} | old
    if text(old.get("activation_fn", "relu"), "activation_fn", ("relu", "topk")) == "topk":
        made |= {"architecture": "topk"}
    if made["architecture"] == "topk":
        more = object_at(old.get("activation_fn_kwargs") or {}, "activation_fn_kwargs")
        made["k"] = more.get("k", old.get("k"))
    scaled = old.get("normalize_activations")
    if scaled is None or isinstance(scaled, bool):
        made["normalize_activations"] = "expected_average_only_in" if scaled else "none"
    return made | {"metadata": {key: old[key] for key in DESCRIBED if key in old}}


def _by_decoder_norm(plain: Plain) -> Plain:
    """Pre-activations times the norm of the decoder's rows, which are unit vectors then."""
    norm = plain.w_dec.norms()
    if bool((norm == 0).any()):
        raise InputError("rescale_acts_by_decoder_norm", True, "false: a row of the decoder is zero")
    w_dec: Matrix = plain.w_dec.scaled(1 / norm)
    return replace(plain, w_enc=plain.w_enc.scaled(norm), b_enc=plain.b_enc * norm, w_dec=w_dec)
