"""A state dict in torch's own file format, a pickle: read with nothing but tensors allowed, and bounded.

`torch.load(weights_only=True)` runs no code of the file's, but it unpacks what it is given. So the archive's
directory is checked first: nothing packed, no old format without a directory, the pickle itself small, and no
more bytes than the file has.
"""

import math
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import psutil
import torch
from torch import Tensor

from sae_train.errors import InputError
from sae_train.formats.base import regular_size

MAX_MEMBERS = 1000
MAX_PICKLE_BYTES = 1 << 20
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
UNPICKLING = torch.serialization.pickle.UnpicklingError  # the module itself is not to be imported here
STRANGE = (
    *(UNPICKLING, OSError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, EOFError),
    *(AssertionError, ArithmeticError, struct.error),
)
"""What torch raises about files that are not what they seem."""


class State:
    """Tensors by name, not yet known to be of any shape."""

    def __init__(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        self.path, self.tensors = path, tensors

    def expect(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raises InputError unless these are exactly the names and shapes."""
        for name in sorted(self.tensors.keys() ^ shapes.keys()):
            found = "is missing" if name in shapes else "is not one of them"
            known = ", ".join(sorted(shapes))
            raise InputError(str(self.path), name[:80], f"exactly the tensors {known}; this one {found}")
        for name, shape in shapes.items():
            if tuple(self.tensors[name].shape) != shape:
                raise InputError(name, str(list(self.tensors[name].shape))[:80], f"the shape {list(shape)}")

    def weights(self, name: str) -> Tensor:
        """A tensor in float32."""
        tensor = self.tensors[name]
        if tensor.dtype not in DTYPES:
            raise InputError(name, str(tensor.dtype), "a floating-point tensor")
        tensor = tensor.float()
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(name, str(self.path), "finite weights in float32")
        return tensor

    def whole(self, name: str) -> int:
        """A scalar that is a whole number."""
        tensor = self.tensors.get(name)
        if tensor is None or tensor.numel() != 1 or tensor.is_floating_point() or tensor.is_complex():
            raise InputError(str(self.path), name, "a whole number of that name")
        return int(tensor)


def read_state(path: Path) -> State:
    """The state dict of a file.

    Raises:
        InputError: it is no regular file, no such archive, holds anything but plain tensors by name, or is
            larger than the memory that is free.
    """
    wanted = "a state dict of plain tensors as torch.save writes it"
    size_bytes = regular_size(path)
    if 2 * size_bytes > psutil.virtual_memory().available:
        raise InputError("path", str(path), f"weights that fit in memory, not {size_bytes} bytes")
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (OSError, ValueError, LookupError, RuntimeError, zipfile.BadZipFile) as error:
        raise InputError("path", str(path), f"{wanted} ({ascii(str(error))[1:-1][:200]})") from error
    packed = [m for m in members if m.compress_type != zipfile.ZIP_STORED or m.flag_bits & 1]
    large = [m for m in members if m.filename.endswith(".pkl") and m.file_size > MAX_PICKLE_BYTES]
    total = sum(m.file_size for m in members)
    if packed or large or len(members) > MAX_MEMBERS or total > size_bytes:
        raise InputError("path", str(path), f"{wanted} (nothing packed, at most {MAX_MEMBERS} parts)")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except STRANGE as error:
        raise InputError("path", str(path), f"{wanted} ({ascii(str(error))[1:-1][:200]})") from error
    if not isinstance(found, dict) or len(found) > MAX_MEMBERS:
        raise InputError("path", str(path), wanted)
    for name, tensor in found.items():
        plain = isinstance(name, str) and type(tensor) is Tensor and tensor.layout == torch.strided
        # A tensor of stride 0 has any number of elements and costs its sender nothing.
        if not plain or tensor.is_quantized or tensor.device.type != "cpu" or _bytes(tensor) > size_bytes:
            raise InputError("path", str(path), wanted)
    return State(path, found)


def _bytes(tensor: Tensor) -> int:
    return math.prod(tensor.shape) * tensor.element_size()
