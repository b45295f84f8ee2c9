"""OpenMOSS (llamascopium, once lm-saes): `config.json` and `sae_weights.safetensors`, SAELens' file name.

No pre-bias. Thresholds are stored as logarithms; a latent without one gets that of the smallest float32. The
number of latents is int(d_model * expansion_factor), so the factor is chosen such that this comes out right.
`norm_activation` is "inference", for scales are folded, and `sparsity_include_decoder_norm` false. A sparse
autoencoder may read one hook and write another, but has no skip connection. Its crosscoders select latents
for each hook by the norm of that hook's decoder row, which equals ours for a relu only.
"""

import math
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
    Place,
    flag,
    json_object,
    optional_text,
    shown,
    text,
    unit,
)
from sae_train.formats.blocks import Matrix, Stored, TensorFile, side_by_side, write_file
from sae_train.formats.plain import Plain, Rule, as_thresholds, without_pre_bias
from sae_train.places import Widths

CFG, WEIGHTS = "config.json", "sae_weights.safetensors"
LEVEL = "activation_function.log_jumprelu_threshold"
NORM = "dataset_average_activation_norm."
MAX_HOOKS = 1024
SMALLEST = torch.finfo(torch.float32).tiny
RULES = {"relu": "relu", "topk": "topk", "threshold": "jumprelu"}


@FORMATS.register("openmoss", FormatConfig)
class OpenMOSS(Format):
    files = (CFG, WEIGHTS)

    def refusal(self, plain: Plain) -> str | None:
        if plain.rule.name == "group_max":
            return "OpenMOSS has no group-max"
        if plain.gate is not None and plain.rule.name == "topk":
            return "OpenMOSS has no gated SAEs, and gates with top-k are no thresholds"
        if plain.kind == "crosscoder":
            if len({*plain.widths.inputs}) > 1:
                return "OpenMOSS' crosscoders read hooks of one width"
            if plain.rule.name != "relu" or plain.gate is not None:
                return "OpenMOSS' crosscoders select latents for each hook apart, which only relu survives"
        if plain.w_skip is not None:
            return "OpenMOSS has no skip connections"
        if plain.kind == "transcoder" and plain.d_in != plain.d_out:
            return "OpenMOSS' rows and targets are of one width"
        return None

    def write(self, saes: Sequence[tuple[Plain, About]], folder: Path, dtype: torch.dtype) -> None:
        ((plain, about),) = saes
        plain = without_pre_bias(as_thresholds(plain) if plain.gate is not None else plain)
        hooks, width = len(plain.widths.inputs), plain.widths.inputs[0]
        config: dict[str, Any] = {
            "sae_type": "crosscoder" if plain.kind == "crosscoder" else "sae",
            "d_model": width,
            "expansion_factor": factor(plain.d_sae, width),
            "use_decoder_bias": True,
            "act_fn": RULES[plain.rule.name],
            "norm_activation": "inference",
            "sparsity_include_decoder_norm": False,
            "training": about.facts,
        }
        if plain.rule.name == "topk":
            config["top_k"] = plain.rule.k
        if plain.kind == "crosscoder":
            parts = plain.w_dec.whole().view(plain.d_sae, hooks, width).transpose(0, 1)
            tensors: dict[str, Tensor | Stored] = {
                "W_E": plain.w_enc.whole().T.view(hooks, width, plain.d_sae),
                "b_E": torch.cat([plain.b_enc[None], torch.zeros(hooks - 1, plain.d_sae)]),
                "W_D": parts,
                "b_D": plain.b_dec.view(hooks, width),
            }
            config |= {
                "hook_points": [_hook(place) for place in about.inputs],
                "sparsity_include_decoder_norm": True,
            }
        else:
            tensors = {"W_E": Stored(plain.w_enc, transposed=True), "b_E": plain.b_enc}
            tensors |= {"W_D": Stored(plain.w_dec), "b_D": plain.b_dec}
            config["hook_point_in"] = _hook(about.place)
            config["hook_point_out"] = _hook(about.outputs[0] if about.outputs else about.place)
        if plain.rule.threshold is not None:
            tensors[LEVEL] = plain.rule.threshold.clamp_min(SMALLEST).log()
        write_file(folder / WEIGHTS, tensors, dtype)
        write_json(folder / CFG, config)

    def read(self, folder: Path) -> list[Found]:
        table = json_object(folder / CFG)
        kind = text(table.get("sae_type"), "sae_type", ("sae", "crosscoder"))
        width = unit(table.get("d_model"), "d_model")
        times = table.get("expansion_factor")
        if not isinstance(times, int | float) or isinstance(times, bool) or not 0 < times < 2**24:
            raise InputError("expansion_factor", shown(times), "a number above 0")
        d_sae = unit(int(width * times), "expansion_factor")
        rule_name = text(table.get("act_fn", "relu"), "act_fn", tuple(RULES.values()))
        text(table.get("norm_activation", "dataset-wise"), "norm_activation", ("inference",))
        if flag(table, "use_glu_encoder", False):
            raise InputError("use_glu_encoder", True, "false")
        bias = flag(table, "use_decoder_bias", True)
        by_norm = flag(table, "sparsity_include_decoder_norm", True)
        file = TensorFile(folder / WEIGHTS)
        scales: dict[str, tuple[int, ...]] = {name: () for name in file.shapes if name.startswith(NORM)}
        if len(scales) > MAX_HOOKS:
            raise InputError(str(file.path), len(scales), f"at most {MAX_HOOKS} hooks")
        if kind == "crosscoder":
            return [_crosscoder(file, table, width, d_sae, rule_name, bias, scales)]
        shapes: dict[str, tuple[int, ...]] = {"W_E": (width, d_sae), "b_E": (d_sae,), "W_D": (d_sae, width)}
        shapes |= scales | ({"b_D": (width,)} if bias else {})
        shapes |= {LEVEL: (d_sae,)} if rule_name == "jumprelu" else {}
        file.expect(shapes)
        names = [optional_text(table.get(f"hook_point_{side}")) for side in ("in", "out")]
        transcodes = names[0] != names[1]
        plain = Plain(
            kind="transcoder" if transcodes else "autoencoder",
            widths=Widths((width,), (width,) if transcodes else ()),
            w_enc=file.matrix("W_E", transposed=True),
            b_enc=file.tensor("b_E"),
            w_dec=file.matrix("W_D"),
            b_dec=file.tensor("b_D") if bias else torch.zeros(width),
            pre_bias=False,
            rule=_rule(rule_name, file, table, d_sae),
        )
        if by_norm and rule_name != "relu":
            # Selected by h |d|, with codes h: the same as thresholds over |d|, but no top-k of ours.
            norm = plain.w_dec.norms()
            if plain.rule.threshold is None:
                if not bool(((norm - 1).abs() < 1e-5).all()):
                    raise InputError("sparsity_include_decoder_norm", True, "unit decoder rows with top-k")
            else:
                level = plain.rule.threshold / norm.clamp_min(SMALLEST)
                plain = replace(plain, rule=replace(plain.rule, threshold=level.clamp_max(3e38)))
        return [Found("main", plain, names[0], names[1] if transcodes else None)]


def factor(d_sae: int, d_model: int) -> float:
    """The expansion factor of which int(d_model * factor) makes d_sae."""
    found = d_sae / d_model
    while int(d_model * found) < d_sae:
        found = math.nextafter(found, math.inf)
    return found


def _hook(place: Place) -> str:
    return place.tl or place.key


def _rule(name: str, file: TensorFile, table: dict[str, Any], d_sae: int) -> Rule:
    if name == "topk":
        return Rule("topk", unit(table.get("top_k", 50), "top_k", most=d_sae))
    if name == "relu":
        return Rule("relu")
    level = file.tensor(LEVEL).exp()
    if not bool(torch.isfinite(level).all()):
        raise InputError(LEVEL, str(file.path), "logarithms of finite thresholds")
    return Rule("threshold", None, level)


def _crosscoder(
    file: TensorFile,
    table: dict[str, Any],
    width: int,
    d_sae: int,
    rule_name: str,
    bias: bool,
    scales: dict[str, tuple[int, ...]],
) -> Found:
    names = table.get("hook_points")
    if not isinstance(names, list) or not 2 <= len(names) <= MAX_HOOKS:
        raise InputError("hook_points", shown(names), f"a list of 2 to {MAX_HOOKS} hooks")
    text(rule_name, "act_fn", ("relu",))
    hooks = len(names)
    shapes: dict[str, tuple[int, ...]] = {"W_E": (hooks, width, d_sae), "b_E": (hooks, d_sae)}
    shapes |= {"W_D": (hooks, d_sae, width)} | ({"b_D": (hooks, width)} if bias else {})
    file.expect(shapes | scales)
    if math.prod(shapes["W_E"]) > 2**40:
        raise InputError("hook_points", hooks, "fewer hooks")
    w_enc: Matrix = side_by_side([file.matrix("W_E", transposed=True, index=i) for i in range(hooks)])
    plain = Plain(
        kind="crosscoder",
        widths=Widths((width,) * hooks),
        w_enc=w_enc,
        b_enc=file.tensor("b_E").sum(dim=0),
        w_dec=side_by_side([file.matrix("W_D", index=i) for i in range(hooks)]),
        b_dec=file.tensor("b_D").flatten() if bias else torch.zeros(hooks * width),
        pre_bias=False,
        rule=Rule("relu"),
    )
    spelt = [optional_text(name) for name in names]
    return Found("main", plain, "+".join(name or "?" for name in spelt))
