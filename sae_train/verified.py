"""Tensors of a committed folder, read once: their digest is taken of what has arrived in memory.

Where a file lies on a slow disk, reading is what costs; and so what is checked is what is used.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from sae_train.files import CorruptFile, check_digest, digest, read_tensors


def read_verified_tensors(folder: Path, name: str, manifest: Mapping[str, Any]) -> dict[str, Tensor]:
    """`read_tensors` of a file of a committed folder, with its digest checked.

    Raises:
        CorruptFolder: the file has changed since it was written.
        CorruptFile: it has not, and never was a safetensors file.
    """
    path = folder / name
    try:
        tensors = read_tensors(path)
        found = digest_read(path, tensors)
    except CorruptFile:
        check_digest(folder, name, manifest, digest(path))
        raise
    check_digest(folder, name, manifest, found)
    return tensors


def digest_read(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """`digest` of a safetensors file that has been read: its header, then each tensor in the file's order."""
    found = xxhash.xxh3_128()
    with open(path, "rb") as file:
        start = file.read(8)
        text = file.read(int.from_bytes(start, "little"))
    found.update(start)
    found.update(text)
    header = json.loads(text)
    header.pop("__metadata__", None)
    for name in sorted(header, key=lambda name: header[name]["data_offsets"]):
        found.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
