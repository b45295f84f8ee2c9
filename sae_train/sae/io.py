"""A published SAE on disk: `sae.safetensors` and `config.json`, and nothing executable.

Such a folder may come from anyone, so nothing in it is believed. The configuration is typed JSON:
names are looked up in the registries, unknown keys and values of another type are refused. The
architecture is built without memory (torch's meta device) and compared with the header of the
weights, so a refusal costs neither the widths that were claimed nor the bytes that were sent.
"""

import dataclasses
import math
import os
import stat
import typing
from pathlib import Path
from types import NoneType
from typing import Any

import psutil
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sae_train.activations.base import ACTIVATIONS
from sae_train.errors import InputError
from sae_train.files import MAX_HEADER_BYTES, CorruptFile, check_header, read_json, write_json, write_tensors
from sae_train.places import Widths
from sae_train.redact import redact
from sae_train.registry import Registry, discover
from sae_train.sae.base import SAE, SAES, SAEConfig

FORMAT_VERSION = 1
KEYS = ("format_version", "kind", "d_in", "widths", "sae", "meta")
MAX_CONFIG_BYTES = 1 << 20
MAX_WIDTH = 1 << 24
MAX_HOOKS = 1024
DTYPES = ("F32", "F16", "BF16", "F64")
WEIGHTS, CONFIG = "sae.safetensors", "config.json"
TYPE_WORDS = {
    bool: "true or false",
    int: "a whole number of at most 64 bits",
    float: "a finite number",
    str: "a string",
    NoneType: "null",
}


def save_sae(sae: SAE, folder: Path, meta: dict[str, Any]) -> None:
    """Write an SAE that takes raw activations (the scale is folded in a copy; `sae` is untouched).

    Args:
        sae: any architecture, in training or published form.
        folder: existing folder that receives sae.safetensors and config.json.
        meta: JSON-able description: model, revision, hook, tokens trained, ...; secrets are redacted.
    """
    published = sae.folded()
    config = dataclasses.asdict(sae.config) | {"d_sae": sae.d_sae}
    write_tensors(folder / WEIGHTS, {name: t.detach().cpu() for name, t in published.state_dict().items()})
    about = {"format_version": FORMAT_VERSION, "kind": "sae", "d_in": sae.d_in}
    about |= {"widths": dataclasses.asdict(sae.widths), "sae": config}
    write_json(folder / CONFIG, about | {"meta": redact(meta)})


def load_sae(path: str | Path, device: str | torch.device = "cpu") -> SAE:
    """Load a published SAE folder: ready for `encode` and `decode` on raw activations.

    The folder need not be trusted: what does not fit is refused before memory is taken for it, and
    nothing in it is executed.

    Args:
        path: a folder holding sae.safetensors and config.json, for example RUN/saes/main.
        device: where the weights go. They pass through the CPU's memory.

    Returns:
        The SAE in evaluation mode, float32 whatever floating dtype was stored, gradients off. The
        files may be deleted afterwards.

    Raises:
        InputError: a file is missing, a link, too large or damaged; the configuration has an unknown
            or missing key or name, a value of another type or out of range (widths are 1 to 2^24);
            the tensors are not exactly those that the configuration implies, not floating point,
            not finite in float32 or larger than the memory that is free; the input scale is not 1.
    """
    discover("sae_train.activations")
    discover("sae_train.sae")
    folder = Path(path)
    for name in (CONFIG, WEIGHTS):
        _require_regular(folder, name)
    sae = skeleton(folder / CONFIG)
    tensors = _read_weights(folder / WEIGHTS, sae.state_dict())
    for name in ("input_scale", "output_scale"):
        if name in tensors and bool((tensors[name] != 1).any()):
            scale = float(tensors[name][tensors[name] != 1].flatten()[0])
            raise InputError(name, scale, "1: a published SAE takes raw activations")
    sae.load_state_dict(tensors, assign=True)
    left = [name for name, t in (*sae.named_parameters(), *sae.named_buffers()) if t.is_meta]
    assert not left, f"{left} are not in the state dict, so they cannot be published"
    return sae.to(device).eval().requires_grad_(False)


def sae_config(data: Any) -> SAEConfig:
    """The typed configuration that a JSON object describes.

    Raises:
        InputError: an unknown key or name, or a value that its dataclass does not allow.
    """
    activation = _typed("sae.activation", _object("sae", data).get("activation"), ACTIVATIONS)
    return _typed("sae", {**data, "activation": activation}, SAES)


def _require_regular(folder: Path, name: str) -> None:
    wanted = f"a folder that holds {CONFIG} and {WEIGHTS}"
    try:
        mode = os.lstat(folder / name).st_mode
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError("path", str(folder), f"{wanted} ({name}: {reason})") from error
    if not stat.S_ISREG(mode):
        # A link may lead to any file of this machine.
        raise InputError("path", str(folder), f"{wanted} ({name} is not a regular file)")


def skeleton(path: Path) -> SAE:
    """The SAE that config.json describes, on the meta device: shapes without memory."""
    try:
        data = _object(CONFIG, read_json(path, MAX_CONFIG_BYTES))
    except CorruptFile as error:
        raise InputError("path", str(path), f"a configuration in JSON ({error.reason})") from error
    if data.get("kind") != "sae":
        raise InputError("kind", _shown(data.get("kind")), '"sae"')
    version = data.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise InputError(
            "format_version", _shown(version), f"{FORMAT_VERSION}, the version this release reads"
        )
    _refuse_unknown(CONFIG, data, KEYS)
    _object("meta", data.get("meta", {}))
    config = sae_config(data.get("sae"))
    _whole(config.d_sae, "sae.d_sae")
    widths = _widths(data)
    with torch.device("meta"):
        return SAES.build(config, widths)


def _widths(data: dict[str, Any]) -> Widths:
    """Of every hook; a file without them has one, of width d_in."""
    d_in = _whole(data.get("d_in"), "d_in")
    table = _object("widths", data.get("widths", {"inputs": [d_in], "targets": []}))
    _refuse_unknown("widths", table, ("inputs", "targets"))
    found = {}
    for key in ("inputs", "targets"):
        value = table.get(key)
        least = 1 if key == "inputs" else 0
        if not isinstance(value, list) or not least <= len(value) <= MAX_HOOKS:
            raise InputError(f"widths.{key}", _shown(value), f"a list of {least} to {MAX_HOOKS} widths")
        found[key] = tuple(_whole(width, f"widths.{key}") for width in value)
    if sum(found["inputs"]) != d_in:
        raise InputError("widths.inputs", _shown(str(found["inputs"])), f"widths that add up to d_in={d_in}")
    return Widths(**found)


def _typed(where: str, data: Any, registry: Registry[Any]) -> Any:
    """The dataclass that the object's name picks from the registry, each value of its annotated type."""
    table = _object(where, data)
    name = table.get("name")
    if not isinstance(name, str):
        raise InputError(f"{where}.name", _shown(name), "a string")
    config_class = registry.config(_shown(name))
    hints = typing.get_type_hints(config_class)
    _refuse_unknown(where, table, [f.name for f in dataclasses.fields(config_class)])
    return config_class(**{key: _plain(f"{where}.{key}", value, hints[key]) for key, value in table.items()})


def _plain(key: str, value: Any, hint: Any) -> Any:
    kinds = typing.get_args(hint) or (hint,)
    if dataclasses.is_dataclass(hint) and isinstance(value, kinds):
        return value
    small = not isinstance(value, int) or abs(value) < 1 << 63
    if float in kinds and int not in kinds and type(value) is int and small:
        return float(value)
    finite = not isinstance(value, float) or math.isfinite(value)  # JSON's 1e999 is an infinity
    if type(value) not in kinds or not (small and finite):
        words = [TYPE_WORDS[kind] for kind in kinds if kind in TYPE_WORDS]
        raise InputError(key, _shown(value), " or ".join(words))
    return value


def _read_weights(path: Path, wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the file in float32, if the header promises exactly the wanted names and shapes."""
    try:
        check_header(path, MAX_HEADER_BYTES)
        # Opening checks that the header covers the file to the byte and reads no tensor; pread, because
        # memory-mapped weights would change, or end this process, when somebody writes to the file.
        with safe_open(path, framework="pt", backend="pread") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            _compare(path, slices, wanted)
            tensors = {}
            for name in slices:
                tensors[name] = file.get_tensor(name).to(torch.float32)
                if not bool(torch.isfinite(tensors[name]).all()):
                    raise InputError(name, str(path), "finite weights in float32")
    except (CorruptFile, SafetensorError) as error:
        # safetensors quotes the stranger's names as they are, line breaks included.
        reason = error.reason if isinstance(error, CorruptFile) else ascii(str(error))[1:-1][:200]
        raise InputError("path", str(path), f"a whole safetensors file ({reason})") from error
    return tensors


def _compare(path: Path, slices: dict[str, Any], wanted: dict[str, Tensor]) -> None:
    names = ", ".join(sorted(wanted))
    for name in sorted(slices.keys() ^ wanted.keys()):
        found = "is missing" if name in wanted else "is not one of them"
        raise InputError(str(path), _shown(name), f"exactly the tensors {names}; this one {found}")
    for name, like in wanted.items():
        shape, dtype = slices[name].get_shape(), slices[name].get_dtype()
        if shape != list(like.shape):
            raise InputError(name, _shown(str(shape)), f"the shape {list(like.shape)} that {CONFIG} implies")
        if dtype not in DTYPES:
            raise InputError(name, dtype, f"a dtype among {', '.join(DTYPES)}")
    needed = sum(like.numel() for like in wanted.values()) * torch.float32.itemsize
    free = psutil.virtual_memory().available
    if needed > free:  # a sparse file of terabytes costs its sender nothing
        raise InputError("path", str(path), f"weights that fit in {free} free bytes of memory, not {needed}")


def _object(key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(key, _shown(value), "an object")
    return value


def _refuse_unknown(where: str, data: dict[str, Any], known: typing.Collection[str]) -> None:
    for key in sorted(data.keys() - set(known)):
        raise InputError(where, _shown(key), f"only the keys {', '.join(sorted(known))}")


def _whole(value: Any, key: str) -> int:
    if type(value) is not int or not 0 < value <= MAX_WIDTH:
        raise InputError(key, _shown(value), "a whole number from 1 to 2^24")
    return value


def _shown(value: Any) -> Any:
    """A stranger's value as an error message may repeat it: one short line."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    return value if len(repr(value)) <= 80 else f"{repr(value)[:80]}..."
