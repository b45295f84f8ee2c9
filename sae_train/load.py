"""`load_sae`: an SAE from anywhere, ours or another library's, this machine's or the hub's.

A folder is known by the names of its files, never by what a file says about itself; then that format's reader
decides whether the rest is true.
"""

from pathlib import Path

import torch

from sae_train.errors import InputError
from sae_train.formats.base import FORMATS, FormatConfig, Found
from sae_train.formats.plain import to_sae
from sae_train.hub.fetch import fetch, is_url
from sae_train.registry import discover
from sae_train.sae import io
from sae_train.sae.base import SAE

LAYOUTS: dict[tuple[str, ...], str | None] = {
    ("config.json", "sae.safetensors"): None,
    ("cfg.json", "sae_weights.safetensors"): "saelens",
    ("cfg.json", "sae.safetensors"): "sparsify",
    ("config.json", "sae_weights.safetensors"): "openmoss",
    ("config.json", "ae.pt"): "dictionary_learning",
    ("params.safetensors",): "gemma_scope",
    ("params.npz",): "gemma_scope",
    ("config.yaml", "layer_0.safetensors"): "circuit_tracer",
}
"""Files that are all there -> format, None for our own; the first that fits. A folder that serves SAELens and
sparsify is read as SAELens'."""


def load_sae(path: str | Path, device: str | torch.device = "cpu") -> SAE:
    """Load an SAE: ready for `encode` and `decode` on raw activations.

    The files need not be trusted: what does not fit is refused before memory is taken for it, and nothing in
    them is executed. A dictionary_learning folder holds a pickle; of it, plain tensors are read.

    Args:
        path: a folder of ours (RUN/saes/main), or one that SAELens, sparsify, dictionary_learning, OpenMOSS
            or Gemma Scope wrote; or hf://USER/REPO/FOLDER@REVISION on the hub.
        device: where the weights go. They pass through the CPU's memory.

    Returns:
        The SAE in evaluation mode, float32 whatever floating dtype was stored, gradients off. The files may
        be deleted afterwards.

    Raises:
        InputError: no such folder, none of these layouts, or something in it is not what its format says.
    """
    folder = fetch(str(path)) if is_url(path) else Path(path).expanduser()
    name = recognise(folder)
    if name is None:
        return io.load_sae(folder, device)
    found = read_folder(folder, name)
    if len(found) > 1 and name == "circuit_tracer":
        wanted = "one SAE; this is a set: sae-train import makes a folder of each"
        raise InputError("path", str(path), wanted)
    return to_sae(found[0].plain).to(device)


def recognise(folder: Path) -> str | None:
    """The format of a folder, None for our own.

    Raises:
        InputError: it is not there, or has the files of no format.
    """
    known = "; ".join(" and ".join(names) for names in LAYOUTS)
    try:
        present = {path.name for path in folder.iterdir()}
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError("path", str(folder), f"a folder that holds an SAE ({reason})") from error
    for names, format_name in LAYOUTS.items():
        if present.issuperset(names):
            return format_name
    raise InputError("path", str(folder), f"a folder that holds an SAE: {known}")


def read_folder(folder: Path, name: str) -> list[Found]:
    """What a folder of a named format holds; raises InputError as its reader does."""
    discover("sae_train.formats")
    return FORMATS.build(FormatConfig(name)).read(folder)
