"""sparsify (EleutherAI), which delphi reads: `cfg.json` and `sae.safetensors` in a folder named by the hook.

Only top-k and group-max fit, rows and targets are of one width, and an unknown tensor is an error. The
encoder takes b_dec from its rows unless `transcode` is set; the skip connection reads raw rows.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_train.errors import InputError
from sae_train.files import write_json
from sae_train.formats.base import FORMATS, About, Format, FormatConfig, Found, flag, json_object, text, unit
from sae_train.formats.blocks import Stored, TensorFile, write_file
from sae_train.formats.plain import Plain, Rule
from sae_train.places import Widths

CFG, WEIGHTS = "cfg.json", "sae.safetensors"
ACTIVATIONS = {"topk": "topk", "group_max": "groupmax"}


@FORMATS.register("sparsify", FormatConfig)
class Sparsify(Format):
    files = (CFG, WEIGHTS)

    def refusal(self, plain: Plain) -> str | None:
        return refusal(plain)

    def write(self, saes: Sequence[tuple[Plain, About]], folder: Path, dtype: torch.dtype) -> None:
        ((plain, about),) = saes
        write_json(folder / CFG, write_weights(plain, about, folder, dtype))

    def read(self, folder: Path) -> list[Found]:
        return [read(folder)]


def refusal(plain: Plain) -> str | None:
    if plain.kind == "crosscoder":
        return "sparsify has no crosscoders"
    if plain.gate is not None:
        return "sparsify has no gated SAEs"
    if plain.rule.name not in ACTIVATIONS:
        return "sparsify has top-k and group-max only"
    if plain.d_in != plain.d_out:
        return "sparsify's rows and targets are of one width"
    return None


def write_weights(plain: Plain, about: About, folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Write the tensors and return the configuration."""
    tensors: dict[str, Tensor | Stored] = {"encoder.weight": Stored(plain.w_enc), "encoder.bias": plain.b_enc}
    tensors |= {"W_dec": Stored(plain.w_dec), "b_dec": plain.b_dec}
    if plain.w_skip is not None:
        tensors["W_skip"] = plain.w_skip
    write_file(folder / WEIGHTS, tensors, dtype)
    return {
        "d_in": plain.d_in,
        "num_latents": plain.d_sae,
        "expansion_factor": max(1, plain.d_sae // plain.d_in),
        "k": plain.rule.k,
        "activation": ACTIVATIONS[plain.rule.name],
        "normalize_decoder": True,
        "multi_topk": False,
        "skip_connection": plain.w_skip is not None,
        "transcode": plain.kind == "transcoder",
        "hookpoint": about.place.below_base,
    }


def read(folder: Path) -> Found:
    table = json_object(folder / CFG)
    d_in = unit(table.get("d_in"), "d_in")
    count = unit(table.get("num_latents", 0), "num_latents", least=0)
    d_sae = count or unit(d_in * unit(table.get("expansion_factor", 32), "expansion_factor"), "num_latents")
    k = unit(table.get("k", 32), "k", most=d_sae)
    activation = text(table.get("activation", "topk"), "activation", tuple(ACTIVATIONS.values()))
    if activation == "groupmax" and d_sae % k:
        raise InputError("k", k, f"a divisor of the number of latents, {d_sae}")
    skip, transcodes = flag(table, "skip_connection", False), flag(table, "transcode", False)
    shapes: dict[str, tuple[int, ...]] = {"encoder.weight": (d_sae, d_in), "encoder.bias": (d_sae,)}
    shapes |= {"W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    if skip:
        shapes["W_skip"] = (d_in, d_in)
    file = TensorFile(folder / WEIGHTS)
    file.expect(shapes)
    rule = Rule(next(ours for ours, theirs in ACTIVATIONS.items() if theirs == activation), k)
    plain = Plain(
        kind="transcoder" if transcodes else "autoencoder",
        widths=Widths((d_in,), (d_in,) if transcodes else ()),
        w_enc=file.matrix("encoder.weight"),
        b_enc=file.tensor("encoder.bias"),
        w_dec=file.matrix("W_dec"),
        b_dec=file.tensor("b_dec"),
        pre_bias=not transcodes,
        rule=rule,
        w_skip=file.tensor("W_skip") if skip else None,
    )
    return Found("main", plain)
