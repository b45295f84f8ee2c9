"""circuit-tracer: `config.yaml` and a transcoder of every layer, `layer_0.safetensors` and on.

A set is complete or it cannot be loaded: layers from 0 without a gap, all of one width, all at the same place
in their layer. Both matrices are [F, d]; there is no pre-bias; the file has thresholds (JumpReLU) or none
(relu), never a top-k. Hooks are named as inside TransformerLens' blocks.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from torch import Tensor

from sae_train.errors import InputError
from sae_train.files import write_bytes
from sae_train.formats.base import (
    FORMATS,
    About,
    Format,
    FormatConfig,
    Found,
    object_at,
    optional_text,
    regular_size,
    text,
)
from sae_train.formats.blocks import Stored, TensorFile, write_file
from sae_train.formats.plain import Plain, Rule, as_thresholds
from sae_train.places import Widths

CFG = "config.yaml"
LEVEL = "activation_function.threshold"
MAX_LAYERS = 1024
MAX_YAML_BYTES = 1 << 16
"""Reading a number such as 1:1:1:... takes the square of its length: a MiB of it took three minutes."""


@FORMATS.register("circuit_tracer", FormatConfig)
class CircuitTracer(Format):
    files = (CFG, "layer_0.safetensors")
    whole_set = True
    thresholds_only = True

    def refusal(self, plain: Plain) -> str | None:
        if plain.kind != "transcoder":
            return "circuit-tracer has transcoders only"
        if plain.d_in != plain.d_out:
            return "circuit-tracer's rows and targets are of one width"
        return None

    def write(self, saes: Sequence[tuple[Plain, About]], folder: Path, dtype: torch.dtype) -> None:
        by_layer, hooks = in_layers(saes)
        for layer, (plain, _) in by_layer.items():
            assert plain.kind == "transcoder" and not plain.pre_bias
            if plain.gate is not None or plain.rule.name == "threshold":
                plain = as_thresholds(plain)
            tensors: dict[str, Tensor | Stored] = {"W_enc": Stored(plain.w_enc), "W_dec": Stored(plain.w_dec)}
            tensors |= {"b_enc": plain.b_enc, "b_dec": plain.b_dec}
            if plain.w_skip is not None:
                tensors["W_skip"] = plain.w_skip
            if plain.rule.threshold is not None:
                tensors[LEVEL] = plain.rule.threshold
            write_file(folder / f"layer_{layer}.safetensors", tensors, dtype)
        about = by_layer[0][1]
        config = {
            "model_name": about.model or "unknown",
            "model_kind": "transcoder_set",
            "feature_input_hook": hooks[0],
            "feature_output_hook": hooks[1],
            "scan": None,
        }
        write_bytes(folder / CFG, yaml.safe_dump(config, sort_keys=False).encode())

    def read(self, folder: Path) -> list[Found]:
        table = _config(folder / CFG)
        text(table.get("model_kind"), "model_kind", ("transcoder_set",))
        if table.get("transcoders") is not None:
            raise InputError("transcoders", "...", "a set whose layers lie in its own folder")
        names = [
            text(table.get(f"feature_{side}_hook"), f"feature_{side}_hook") for side in ("input", "output")
        ]
        found: list[Found] = []
        path = folder / "layer_0.safetensors"
        while os.path.lexists(path) and len(found) < MAX_LAYERS:
            hook, target = (optional_text(f"blocks.{len(found)}.{name}") for name in names)
            model = optional_text(table.get("model_name"))
            found.append(Found(path.stem, _read(path), hook, target, model))
            path = folder / f"layer_{len(found)}.safetensors"
        if not found:
            raise InputError("path", str(folder), "a set that begins with layer_0.safetensors")
        widths = [(one.plain.d_in, one.plain.d_sae) for one in found]
        if len(set(widths)) > 1:
            raise InputError("path", str(folder), "transcoders of one width in all layers")
        return found


def in_layers(
    saes: Sequence[tuple[Plain, About]], layers: int | None = None
) -> tuple[dict[int, tuple[Plain, About]], tuple[str, str]]:
    """The set by layer, rising, and the hooks inside a layer that all of them read and reconstruct.

    Args:
        saes: what a run trained. layers: how many the model has, if that is known.

    Raises:
        InputError: a hook outside of layers, two in one layer, none in another, several widths or places.
    """
    by_layer: dict[int, tuple[Plain, About]] = {}
    places = set()
    for plain, about in saes:
        hooks = [(p.tl or "") for p in (about.place, about.outputs[0] if about.outputs else about.place)]
        split = [re.fullmatch(r"blocks\.(\d+)\.(.+)", hook) for hook in hooks]
        if split[0] is None or split[1] is None or split[0][1] != split[1][1]:
            wanted = "transcoders within a layer, such as hook=mlp_in.3 target=mlp_out.3"
            raise InputError("hook", about.place.key, wanted)
        layer = int(split[0][1])
        if layer in by_layer:
            raise InputError(
                "hook", about.place.key, f"one transcoder of each layer; there are two of {layer}"
            )
        by_layer[layer] = (plain, about)
        places.add((split[0][2], split[1][2]))
    if len(places) > 1 or len({plain.d_sae for plain, _ in saes}) > 1:
        raise InputError(
            "format", "circuit_tracer", "transcoders of one width, at the same place of each layer"
        )
    count = layers if layers is not None else max(by_layer) + 1
    missing = [str(layer) for layer in range(count) if layer not in by_layer]
    if missing:
        wanted = f"transcoders of all {count} layers; the run has none of {', '.join(missing)}"
        raise InputError("format", "circuit_tracer", wanted)
    return dict(sorted(by_layer.items())), places.pop()


def _config(path: Path) -> dict[str, object]:
    if regular_size(path) > MAX_YAML_BYTES:
        raise InputError("path", str(path), f"at most {MAX_YAML_BYTES} bytes of YAML")
    try:
        body = path.read_text()
        if "&" in body and "*" in body:  # an alias of an alias of ... takes any amount of memory
            raise ValueError("no anchors")
        return object_at(yaml.safe_load(body), path.name)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = ascii(str(error))[1:-1][:200]
        raise InputError("path", str(path), f"a configuration in YAML ({reason})") from error


def _read(path: Path) -> Plain:
    file = TensorFile(path)
    d_sae, d = file.shape("W_enc", 2)
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (d_sae, d), "W_dec": (d_sae, d)}
    shapes |= {"b_enc": (d_sae,), "b_dec": (d,)}
    shapes |= {name: shape for name, shape in (("W_skip", (d, d)), (LEVEL, (d_sae,))) if name in file.shapes}
    file.expect(shapes)
    level = file.tensor(LEVEL).clamp_min(0) if LEVEL in shapes else None
    return Plain(
        kind="transcoder",
        widths=Widths((d,), (d,)),
        w_enc=file.matrix("W_enc"),
        b_enc=file.tensor("b_enc"),
        w_dec=file.matrix("W_dec"),
        b_dec=file.tensor("b_dec"),
        pre_bias=False,
        rule=Rule("relu") if level is None else Rule("threshold", None, level),
        w_skip=file.tensor("W_skip") if "W_skip" in shapes else None,
    )
