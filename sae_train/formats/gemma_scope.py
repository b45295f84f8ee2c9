"""Gemma Scope: JumpReLU without pre-bias, as `params.npz` (1) or `params.safetensors` and `config.json` (2).

Version 2 is written, which also has transcoders, with an affine map beside the latents stored as
[d_in, d_out]; both are read. Rules that are no thresholds do not exist in it.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
    text,
)
from sae_train.formats.blocks import Matrix, Stored, TensorFile, write_file
from sae_train.formats.numpy_file import read_npz
from sae_train.formats.plain import Plain, Rule, as_thresholds, without_pre_bias
from sae_train.places import Widths

CFG, WEIGHTS, ARRAYS = "config.json", "params.safetensors", "params.npz"
SKIP = "affine_skip_connection"


@FORMATS.register("gemma_scope", FormatConfig)
class GemmaScope(Format):
    files = (WEIGHTS,)
    thresholds_only = True

    def refusal(self, plain: Plain) -> str | None:
        return "Gemma Scope's crosscoders have a layout of their own" if plain.kind == "crosscoder" else None

    def write(self, saes: Sequence[tuple[Plain, About]], folder: Path, dtype: torch.dtype) -> None:
        ((plain, about),) = saes
        plain = without_pre_bias(as_thresholds(plain))
        assert plain.rule.threshold is not None
        tensors: dict[str, Tensor | Stored] = {"w_enc": Stored(plain.w_enc, transposed=True)}
        tensors |= {"w_dec": Stored(plain.w_dec), "b_enc": plain.b_enc, "b_dec": plain.b_dec}
        tensors["threshold"] = plain.rule.threshold
        if plain.w_skip is not None:
            tensors[SKIP] = plain.w_skip.T
        write_file(folder / WEIGHTS, tensors, dtype)
        config: dict[str, Any] = {
            "architecture": "jump_relu",
            "model_name": about.model,
            "hf_hook_point_in": hook_point(about.place),
            "width": plain.d_sae,
            "l0": about.l0,
            "training": about.facts,
        }
        if plain.kind == "transcoder":
            config["affine_connection"] = plain.w_skip is not None
            config["hf_hook_point_out"] = hook_point(about.outputs[0]) if about.outputs else None
        write_json(folder / CFG, {key: value for key, value in config.items() if value is not None})

    def read(self, folder: Path) -> list[Found]:
        if os.path.lexists(folder / ARRAYS) and not os.path.lexists(folder / WEIGHTS):
            return [read_arrays(folder / ARRAYS)]
        table = json_object(folder / CFG) if os.path.lexists(folder / CFG) else {}
        text(table.get("architecture", "jump_relu"), "architecture", ("jump_relu",))
        file = TensorFile(folder / WEIGHTS)
        d_in, d_sae = file.shape("w_enc", 2)
        d_out = file.shape("w_dec", 2)[1]
        shapes: dict[str, tuple[int, ...]] = {"w_enc": (d_in, d_sae), "w_dec": (d_sae, d_out)}
        shapes |= {"b_enc": (d_sae,), "b_dec": (d_out,), "threshold": (d_sae,)}
        if SKIP in file.shapes:
            shapes[SKIP] = (d_in, d_out)
        file.expect(shapes)
        hooks = [optional_text(table.get(f"hf_hook_point_{side}")) for side in ("in", "out")]
        # Version 2 names a second hook, and whether there is a skip connection, in transcoders only.
        transcodes = hooks[1] is not None or "affine_connection" in table or SKIP in shapes or d_in != d_out
        if "affine_connection" in table:
            flag(table, "affine_connection", False)
        plain = Plain(
            kind="transcoder" if transcodes else "autoencoder",
            widths=Widths((d_in,), (d_out,) if transcodes else ()),
            w_enc=file.matrix("w_enc", transposed=True),
            b_enc=file.tensor("b_enc"),
            w_dec=file.matrix("w_dec"),
            b_dec=file.tensor("b_dec"),
            pre_bias=False,
            rule=Rule("threshold", None, file.tensor("threshold").clamp_min(0)),
            w_skip=file.tensor(SKIP).T.contiguous() if SKIP in shapes else None,
        )
        hook, target = map(_module, hooks)
        return [Found("main", plain, hook, target, optional_text(table.get("model_name")))]


def hook_point(place: Place) -> str:
    """As Gemma Scope 2 writes it: "model.layers.12.output"."""
    return f"{place.module}.{place.side}put" if place.module else place.key


def _module(point: str | None) -> str | None:
    """The same as a hook of ours: the module, with ":in" for its input."""
    if point is None:
        return None
    return point.removesuffix(".input") + ":in" if point.endswith(".input") else point.removesuffix(".output")


def read_arrays(path: Path) -> Found:
    """Version 1, which says nothing about model and hook."""
    arrays = read_npz(path, {"W_enc": 2, "W_dec": 2, "b_enc": 1, "b_dec": 1, "threshold": 1})
    d_in, d_sae = arrays["W_enc"].shape
    d_out = arrays["W_dec"].shape[1]
    arrays.expect({"W_dec": (d_sae, d_out), "b_enc": (d_sae,), "b_dec": (d_out,), "threshold": (d_sae,)})
    return Found(
        "main",
        Plain(
            kind="transcoder" if d_in != d_out else "autoencoder",
            widths=Widths((d_in,), (d_out,) if d_in != d_out else ()),
            w_enc=Matrix.of(arrays["W_enc"].T),
            b_enc=arrays["b_enc"],
            w_dec=Matrix.of(arrays["W_dec"]),
            b_dec=arrays["b_dec"],
            pre_bias=False,
            rule=Rule("threshold", None, arrays["threshold"].clamp_min(0)),
        ),
    )
