"""A published SAE on disk: `sae.safetensors` and `config.json`, and nothing executable.

The configuration is typed JSON: names are looked up in the registries, unknown keys are refused,
and every tensor must have the name and shape that the configuration implies before it is used.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from sae_train.activations.base import ACTIVATIONS
from sae_train.errors import InputError
from sae_train.files import read_json, read_tensors, write_json, write_tensors
from sae_train.registry import discover
from sae_train.sae.base import SAE, SAES, SAEConfig

FORMAT_VERSION = 1
MAX_CONFIG_BYTES = 1 << 20
WEIGHTS, CONFIG = "sae.safetensors", "config.json"


def save_sae(sae: SAE, folder: Path, meta: dict[str, Any]) -> None:
    """Write an SAE that takes raw activations (the scale is folded in a copy; `sae` is untouched).

    Args:
        sae: any architecture, in training or published form.
        folder: existing folder that receives sae.safetensors and config.json.
        meta: JSON-able description: model, revision, hook, tokens trained, ...
    """
    published = sae.folded()
    config = dataclasses.asdict(sae.config) | {"d_sae": sae.d_sae}
    write_tensors(folder / WEIGHTS, {name: t.detach().cpu() for name, t in published.state_dict().items()})
    write_json(
        folder / CONFIG,
        {"format_version": FORMAT_VERSION, "kind": "sae", "d_in": sae.d_in, "sae": config, "meta": meta},
    )


def load_sae(path: str | Path, device: str | torch.device = "cpu") -> SAE:
    """Load a published SAE folder: ready for `encode` and `decode` on raw activations.

    Args:
        path: a folder holding sae.safetensors and config.json, for example RUN/saes/main.
        device: where the weights go.

    Returns:
        The SAE in evaluation mode, float32, gradients off.

    Raises:
        InputError: not such a folder, unknown names or keys, tensors that do not fit the configuration.
    """
    discover("sae_train.activations")
    discover("sae_train.sae")
    folder = Path(path)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise InputError(
                "path", str(folder), f"a folder that holds {CONFIG} and {WEIGHTS} ({name} is missing)"
            )
    data = read_json(folder / CONFIG, MAX_CONFIG_BYTES)
    if not isinstance(data, dict) or data.get("kind") != "sae":
        raise InputError(str(folder / CONFIG), "kind", 'a configuration with "kind": "sae"')
    if data.get("format_version") != FORMAT_VERSION:
        raise InputError(
            "format_version", data.get("format_version"), f"{FORMAT_VERSION}, the version this release reads"
        )
    sae = SAES.build(sae_config(data.get("sae")), _whole(data.get("d_in"), "d_in"))
    tensors = read_tensors(folder / WEIGHTS)
    want = {name: tuple(t.shape) for name, t in sae.state_dict().items()}
    have = {name: tuple(t.shape) for name, t in tensors.items()}
    if want != have:
        wrong = sorted(set(want.items()) ^ set(have.items()))
        raise InputError(str(folder / WEIGHTS), wrong[0], f"tensors {want}")
    bad = [name for name, t in tensors.items() if not bool(torch.isfinite(t).all())]
    if bad:
        raise InputError(str(folder / WEIGHTS), bad, "finite weights")
    sae.load_state_dict(tensors)
    return sae.to(device).eval().requires_grad_(False)


def sae_config(data: Any) -> SAEConfig:
    """The typed configuration that a JSON object describes."""
    if not isinstance(data, dict):
        raise InputError("sae", data, "an object")
    fields = dict(data)
    activation = fields.pop("activation", None)
    if not isinstance(activation, dict):
        raise InputError("sae.activation", activation, "an object with a name")
    config_class = SAES.config(fields.get("name", ""))
    activation_class = ACTIVATIONS.config(activation.get("name", ""))
    _refuse_unknown("sae.activation", activation, activation_class)
    _refuse_unknown("sae", fields, config_class)
    return config_class(**fields, activation=activation_class(**activation))


def _refuse_unknown(where: str, data: dict[str, Any], config_class: type) -> None:
    known = {f.name: f for f in dataclasses.fields(config_class)}
    for key, value in data.items():
        if key not in known:
            raise InputError(f"{where}.{key}", value, f"one of {', '.join(sorted(known))}")
        if not isinstance(value, str | int | float | bool | type(None)):
            raise InputError(f"{where}.{key}", value, "a plain value")


def _whole(value: Any, key: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= 1 << 24:
        raise InputError(key, value, "a whole number from 1 to 2^24")
    return value
