"""Weights too large for memory: read and written in blocks of latents, whichever way round they are stored.

An SAE of a million latents has gigabytes of weights, and a format may want them the other way round. So a
writer gets a `Matrix`, which gives any block of latents in float32, and puts that block where it belongs:
one run of bytes in a file of [F, D], a piece of every row in one of [D, F]. safetensors reads and writes
whole tensors only (its slices read all of a tensor first), so offsets are taken from the header here,
after safetensors has checked that they cover the file exactly.

Files are a stranger's: links, large headers, strange dtypes and values that are not finite are refused.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import psutil
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sae_train.errors import InputError
from sae_train.files import MAX_HEADER_BYTES, CorruptFile, check_header

T = TypeVar("T")

BLOCK_ELEMENTS = 1 << 22
"""Of a block: 16 MiB of float32, which malloc keeps for the next block. What is larger than 32 MiB comes from
the system each time, and touching that first costs more than reading the file does."""
THREADS = min(4, os.cpu_count() or 1)
"""That each read, convert and write a block: turning one round takes longer than its way to the disk."""
CODES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in CODES.items()}


class Matrix:
    """Weights [F, D], one latent a row, wherever they are.

    Attributes:
        shape: (F, D).
        dtype: that they are stored in; a format of the same dtype gets them without a detour.
    """

    def __init__(
        self, read: Callable[[int, int], Tensor], shape: tuple[int, int], dtype: torch.dtype = torch.float32
    ) -> None:
        self._read, self.shape, self.dtype = read, shape, dtype

    @classmethod
    def of(cls, tensor: Tensor) -> "Matrix":
        """Of a tensor [F, D] in memory."""
        f, d = tensor.shape
        return cls(lambda first, last: tensor[first:last].detach(), (f, d), tensor.dtype)

    def rows(self, first: int, last: int) -> Tensor:
        """[last - first, D] float32."""
        return self._read(first, last).float()

    def blocks(self, multiple: int = 1, dtype: torch.dtype = torch.float32) -> Iterator[tuple[int, Tensor]]:
        """(first latent, [n, D]) of all latents; n is a multiple of `multiple` if F is."""
        step = max(1, BLOCK_ELEMENTS // (self.shape[1] * multiple)) * multiple
        for first in range(0, self.shape[0], step):
            yield first, self._read(first, min(first + step, self.shape[0])).to(dtype)

    def each(self, work: Callable[[int, Tensor], T], dtype: torch.dtype = torch.float32) -> list[T]:
        """`work(first latent, block)` of all blocks, in their order; several are worked on at once."""
        step = max(1, BLOCK_ELEMENTS // self.shape[1])

        def one(first: int) -> T:
            return work(first, self._read(first, min(first + step, self.shape[0])).to(dtype))

        with ThreadPoolExecutor(THREADS) as pool:
            return list(pool.map(one, range(0, self.shape[0], step)))

    def scaled(self, factor: Tensor) -> "Matrix":
        """Row f times factor[f]; the factors [F] must be float32."""
        return Matrix(lambda a, b: self.rows(a, b) * factor[a:b, None], self.shape)

    def columns(self, first: int, last: int) -> "Matrix":
        """The weights of some columns."""
        shape = (self.shape[0], last - first)
        return Matrix(lambda a, b: self._read(a, b)[:, first:last], shape, self.dtype)

    def times(self, vector: Tensor) -> Tensor:
        """[F] products with a vector [D], in float64."""
        return torch.cat(self.each(lambda _, block: block.double() @ vector.double()))

    def norms(self) -> Tensor:
        """[F] norms of the rows."""
        return torch.cat(self.each(lambda _, block: block.norm(dim=-1)))

    def whole(self) -> Tensor:
        """[F, D] float32, all in memory.

        Raises:
            InputError: there is not enough.
        """
        needed, free = 4 * math.prod(self.shape), psutil.virtual_memory().available
        if needed > free:  # a sparse file of terabytes costs its sender nothing
            raise InputError("path", str(self.shape), f"weights that fit in {free} free bytes, not {needed}")
        out = torch.empty(self.shape)
        for first, block in self.blocks():
            out[first : first + len(block)] = block
        return out


def side_by_side(parts: list[Matrix]) -> Matrix:
    """[F, sum of D] of several hooks' weights."""
    shape = (parts[0].shape[0], sum(part.shape[1] for part in parts))
    return Matrix(lambda a, b: torch.cat([part.rows(a, b) for part in parts], dim=-1), shape, parts[0].dtype)


class TensorFile:
    """A safetensors file from anyone, opened after its header has been checked.

    Raises:
        InputError: it is missing, no whole safetensors file, or holds other dtypes than floating ones.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            check_header(path, MAX_HEADER_BYTES)
            with safe_open(path, framework="pt", backend="pread") as opened:
                opened.keys()  # it opens only if names, shapes and offsets cover the file to the byte
            with open(path, "rb") as file:
                size_bytes = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(size_bytes))
        except (CorruptFile, SafetensorError, ValueError) as error:
            # safetensors quotes the stranger's names as they are, line breaks included.
            reason = error.reason if isinstance(error, CorruptFile) else ascii(str(error))[1:-1][:200]
            raise InputError("path", str(path), f"a whole safetensors file ({reason})") from error
        except OSError as error:
            raise InputError("path", str(path), f"a file that can be read ({error.strerror})") from error
        header.pop("__metadata__", None)
        self.shapes: dict[str, tuple[int, ...]] = {name: tuple(h["shape"]) for name, h in header.items()}
        self._at = {name: 8 + size_bytes + h["data_offsets"][0] for name, h in header.items()}
        self._dtypes = {name: h["dtype"] for name, h in header.items()}

    def expect(self, wanted: Mapping[str, tuple[int, ...]]) -> None:
        """Raises InputError unless the file holds exactly these names, shapes, and floating dtypes."""
        for name in sorted(self.shapes.keys() ^ wanted.keys()):
            found = "is missing" if name in wanted else "is not one of them"
            known = ", ".join(sorted(wanted))
            raise InputError(str(self.path), name[:80], f"exactly the tensors {known}; this one {found}")
        for name, shape in wanted.items():
            if self.shapes[name] != shape:
                raise InputError(name, str(list(self.shapes[name]))[:80], f"the shape {list(shape)}")
            if self._dtypes[name] not in CODES:
                raise InputError(name, self._dtypes[name], f"a dtype among {', '.join(CODES)}")

    def shape(self, name: str, dims: int) -> tuple[int, ...]:
        """Of a tensor that has to be there, with so many dimensions, none of them 0."""
        shape = self.shapes.get(name)
        if shape is None or len(shape) != dims or 0 in shape:
            raise InputError(str(self.path), name, f"a tensor of that name with {dims} dimensions")
        return shape

    def tensor(self, name: str) -> Tensor:
        """A tensor in float32; for small ones."""
        shape = self.shapes[name]
        needed, free = 4 * math.prod(shape), psutil.virtual_memory().available
        if needed > free:
            raise InputError("path", str(self.path), f"weights that fit in {free} free bytes, not {needed}")
        return self._finite(name, self._read(name, 0, math.prod(shape))).float().reshape(shape)

    def matrix(self, name: str, transposed: bool = False, index: int | None = None) -> Matrix:
        """Weights that are stored as [F, D], or transposed as [D, F]; of [L, ...] those of one `index`."""
        first, second = self.shapes[name][-2:]
        start = 0 if index is None else index * first * second
        if not transposed:

            def read(a: int, b: int) -> Tensor:
                flat = self._read(name, start + a * second, start + b * second)
                return self._finite(name, flat).view(b - a, second)
        else:

            def read(a: int, b: int) -> Tensor:
                stored = torch.empty(first, b - a, dtype=CODES[self._dtypes[name]])
                with open(self.path, "rb") as file:
                    for i in range(first):
                        self._read_into(stored[i], name, start + i * second + a, file.fileno())
                return self._finite(name, stored).T

        shape = (second, first) if transposed else (first, second)
        return Matrix(read, shape, CODES[self._dtypes[name]])

    def _read(self, name: str, first: int, last: int) -> Tensor:
        """Elements first to last of a tensor, as stored."""
        out = torch.empty(last - first, dtype=CODES[self._dtypes[name]])
        with open(self.path, "rb") as file:
            self._read_into(out, name, first, file.fileno())
        return out

    def _read_into(self, out: Tensor, name: str, first: int, handle: int) -> None:
        """As many elements of a tensor as `out` has, from `first` on, as stored."""
        buffer = out.view(torch.uint8).numpy().data
        done, at = 0, self._at[name] + first * out.dtype.itemsize
        while done < len(buffer):
            count = os.preadv(handle, [buffer[done:]], at + done)
            if count == 0:
                raise InputError("path", str(self.path), "a file that does not shrink while it is read")
            done += count

    def _finite(self, name: str, tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.float64:  # what does not fit in float32 is an infinity there
            tensor = tensor.float()
        # The extremes are not finite if anything is not, and cost one pass.
        if tensor.numel() > 0 and not bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all()):
            raise InputError(name, str(self.path), "finite weights in float32")
        return tensor


@dataclass(frozen=True)
class Stored:
    """How a matrix [F, D] lies in a file: as it is, or transposed as [D, F]."""

    matrix: Matrix
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        f, d = self.matrix.shape
        return (d, f) if self.transposed else (f, d)


def write_file(path: Path, tensors: Mapping[str, Tensor | Stored], dtype: torch.dtype) -> None:
    """Write a safetensors file in blocks; every tensor in one dtype. Not flushed: see `committed_folder`."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts, end = {}, 0
    for name, tensor in tensors.items():
        starts[name], shape = end, list(tensor.shape)
        end += math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [starts[name], end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb", buffering=0) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
        for name, tensor in tensors.items():
            at = 8 + len(text) + starts[name]
            if isinstance(tensor, Tensor):
                _put(file.fileno(), _bytes(tensor, dtype), at)
                continue
            tensor.matrix.each(partial(_put_block, file.fileno(), at, tensor), dtype)


def _put_block(handle: int, at: int, stored: Stored, first: int, block: Tensor) -> None:
    """Write some latents where they belong in a tensor that begins at byte `at`."""
    (f, d), size_bytes = stored.matrix.shape, block.dtype.itemsize
    if not stored.transposed:
        _put(handle, _bytes(block, block.dtype), at + first * d * size_bytes)
        return
    piece = len(block) * size_bytes
    columns = _bytes(block.T, block.dtype)
    for i in range(d):
        _put(handle, columns[i * piece : (i + 1) * piece], at + (i * f + first) * size_bytes)


def _put(handle: int, data: memoryview, at: int) -> None:
    while data:
        done = os.pwrite(handle, data, at)
        data, at = data[done:], at + done


def _bytes(tensor: Tensor, dtype: torch.dtype) -> memoryview:
    stored = tensor.detach().cpu().to(dtype).contiguous().flatten().view(torch.uint8)
    return stored.numpy().data
