"""What an export says beside the weights, out of what a run wrote beside its own; others' hooks as ours."""

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from sae_train.errors import InputError
from sae_train.files import CorruptFile, read_json, read_tensors
from sae_train.formats.base import About, Place, json_object, optional_text
from sae_train.harvest.hooks import TL_NAMES, TL_SPELLINGS
from sae_train.hub.public import LocalNames, hub_id
from sae_train.places import Places
from sae_train.redact import redact
from sae_train.sae.io import CONFIG

FACTS = ("model", "model_revision", "dtype", "hook", "target", "tokens", "seed", "corpus", "source")
FEATURES, METRICS = "features.safetensors", "metrics.json"


def about_of(folder: Path, model: str | None = None) -> About:
    """What is known of a published SAE.

    Args:
        folder: of ours.
        model: Hub id to write instead of the model's own name, which may be a folder of this machine.

    Raises:
        InputError: its configuration is no JSON object.
    """
    meta = json_object(folder / CONFIG).get("meta")
    meta = meta if isinstance(meta, dict) else {}
    corpus = meta.get("corpus")
    local = LocalNames({"model": {"name": meta.get("model")}, "corpus": {"name": corpus}})
    facts = {key: meta[key] for key in FACTS if isinstance(meta.get(key), str | int | float)}
    fingerprint = meta.get("fingerprint")
    if isinstance(fingerprint, dict):
        facts["data"] = {str(key): str(value)[:200] for key, value in fingerprint.items()}
    sides: list[tuple[str, ...]] = [(), ()]
    if isinstance(meta.get("hook"), str):
        places = Places.parse(meta["hook"], optional_text(meta.get("target")))
        sides = [places.inputs, places.outputs]
    told = meta.get("hooks")
    hooks: dict[str, Any] = told if isinstance(told, dict) else {}
    context = meta.get("context_length")
    return About(
        model=model or hub_id(meta.get("model")),
        inputs=tuple(_place(key, hooks) for key in sides[0]),
        outputs=tuple(_place(key, hooks) for key in sides[1]),
        context_length=context if type(context) is int else None,
        corpus=hub_id(corpus),
        l0=_l0(folder / METRICS),
        density=_density(folder / FEATURES),
        facts=redact(local.replaced(facts)),
    )


def _place(key: str, hooks: dict[str, Any]) -> Place:
    told = hooks.get(key)
    told = told if isinstance(told, dict) else {}
    site, _, layer = key.rpartition(".")
    known = f"blocks.{layer}.{TL_NAMES[site]}" if site in TL_NAMES and layer.isdigit() else None
    side = told.get("side")
    return Place(
        key,
        optional_text(told.get("transformer_lens")) or known,
        optional_text(told.get("module")),
        side if side in ("in", "out") else "out",
    )


def _l0(path: Path) -> float | None:
    try:
        table = read_json(path)
    except (FileNotFoundError, CorruptFile):
        return None
    l0 = table.get("l0") if isinstance(table, dict) else None
    return float(l0) if isinstance(l0, int | float) else None


def _density(path: Path) -> Tensor | None:
    try:
        tensors = read_tensors(path)
    except FileNotFoundError:
        return None
    except CorruptFile as error:
        raise InputError("run", str(path), f"feature statistics that can be read ({error.reason})") from error
    return tensors.get("heldout_density", tensors.get("train_density"))


def our_hook(name: str | None) -> str | None:
    """A hook of another library in our short spelling where it has one: "blocks.12.hook_resid_post" is
    resid_post.12. Other names stay: a module's path is one that we know too."""
    found = re.fullmatch(r"blocks\.(\d+)\.([a-z_.]+)", name or "")
    if found is None or found[2] not in TL_SPELLINGS:
        return name
    return f"{TL_SPELLINGS[found[2]]}.{found[1]}"
