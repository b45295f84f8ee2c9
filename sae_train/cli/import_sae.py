"""sae-train import: somebody's SAE as one of ours, to evaluate, fine-tune, browse or convert.

The folder may be a stranger's. What is written is what `load_sae` reads: `sae.safetensors` and `config.json`.
"""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from sae_train.cli.compose import run_composed
from sae_train.cli.export import free_folder
from sae_train.config import ImportConfig, to_config
from sae_train.errors import InputError
from sae_train.files import committed_folder
from sae_train.formats.about import our_hook
from sae_train.formats.base import Found
from sae_train.formats.plain import to_sae
from sae_train.hub.fetch import fetch, is_url
from sae_train.load import read_folder, recognise
from sae_train.places import Places
from sae_train.sae.io import save_sae


def run(args: list[str]) -> int:
    return run_composed("import", args, import_sae)


def import_sae(composed: DictConfig) -> int:
    """Read, write as ours, and print one line for each SAE. Returns 0."""
    request: ImportConfig = to_config(composed)
    out = free_folder(request.out)
    folder = fetch(request.path) if is_url(request.path) else Path(request.path).expanduser()
    name = request.format if request.format is not None else recognise(folder)
    if name is None:
        raise InputError("path", request.path, "another library's folder; ours needs no import")
    found = read_folder(folder, name)
    several = name == "circuit_tracer"
    for one in found if several else found[:1]:
        target = out / one.name if several else out
        described = meta(request, one, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        sae = to_sae(one.plain)
        with committed_folder(target, "import", {"format": name}) as temp:
            save_sae(sae, temp, described)
        hook = described.get("hook", "of an unknown hook; say hook=NAME to evaluate it")
        print(f"{target}: {one.plain.describe()}, {sae.d_sae:,} latents of width {sae.d_in}, {hook}")
    return 0


def meta(request: ImportConfig, found: Found, name: str) -> dict[str, Any]:
    """What is known of an imported SAE, as a run would have said it; the user's word goes first."""
    hook = request.hook or our_hook(found.hook)
    target = request.target or our_hook(found.target)
    if request.target is not None and found.plain.kind != "transcoder":
        raise InputError("target", request.target, f"none: this is {found.plain.describe()}")
    if found.plain.kind == "transcoder" and hook is not None and target is None:
        raise InputError("target", None, "the hook that this transcoder reconstructs: target=NAME")
    if hook is not None:
        places = Places.parse(hook, target)
        if len(places.inputs) != len(found.plain.widths.inputs):
            count = len(found.plain.widths.inputs)
            raise InputError("hook", hook, f"{count} hook{'s' * (count > 1)}, joined by +")
    out = {"imported_from": name, "model": request.model or found.model, "hook": hook}
    if found.plain.kind == "transcoder":
        out["target"] = target
    return {key: value for key, value in out.items() if value is not None}
