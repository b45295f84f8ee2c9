"""An .npz file from anyone: a zip archive of plain arrays, its sizes checked before anything is unpacked.

A deflated archive of a megabyte can hold gigabytes of zeros, and numpy believes a header's shape, so both are
bounded first: what is unpacked by the archive's own directory, and arrays by their number of dimensions.
"""

import zipfile
import zlib
from collections import UserDict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import Tensor

from sae_train.errors import InputError
from sae_train.formats.base import regular_size

MAX_MEMBERS = 64
MOST_PACKED = 64
"""Times smaller that honest weights get by packing: they hardly do; zeros get a thousand times smaller."""


class Arrays(UserDict[str, Tensor]):
    """Arrays by name, in float32."""

    def __init__(self, path: Path, arrays: dict[str, Tensor]) -> None:
        super().__init__(arrays)
        self.path = path

    def expect(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raises InputError unless arrays have these shapes."""
        for name, shape in shapes.items():
            if tuple(self[name].shape) != shape:
                raise InputError(name, str(list(self[name].shape)), f"the shape {list(shape)}")


def read_npz(path: Path, dims: Mapping[str, int]) -> Arrays:
    """The arrays of these names and numbers of dimensions; others may be there and are not looked at.

    Raises:
        InputError: no regular file, no such archive, larger than memory, an array missing, of another kind or
            not finite.
    """
    wanted = f"a numpy archive with the arrays {', '.join(dims)}"
    try:
        size_bytes = regular_size(path)
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
        total = sum(member.file_size for member in members)
        if len(members) > MAX_MEMBERS or total > MOST_PACKED * size_bytes:
            raise InputError("path", str(path), f"{wanted}, not {len(members)} files of {total} bytes")
        if 3 * total > psutil.virtual_memory().available:
            raise InputError("path", str(path), f"weights that fit in memory, not {total} bytes")
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in dims if name in arrays.files}
    except InputError:
        raise
    except (
        OSError,
        ValueError,
        LookupError,
        EOFError,
        RuntimeError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        # RuntimeError: encrypted, or packed in a way that this Python does not know.
        raise InputError("path", str(path), f"{wanted} ({ascii(str(error))[1:-1][:200]})") from error
    out = {}
    for name, count in dims.items():
        array = found.get(name)
        if array is None or array.ndim != count or 0 in array.shape or array.dtype.kind != "f":
            raise InputError(str(path), name, f"a floating-point array with {count} dimensions")
        with np.errstate(over="ignore"):
            out[name] = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
        if not bool(torch.isfinite(out[name]).all()):
            raise InputError(name, str(path), "finite weights in float32")
    return Arrays(path, out)
