"""Files as a stranger would make them, written byte by byte: no writer of ours or of anybody else agrees to.

A canary is a file that exists only once code from one of these files has run.
"""

import functools
import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash

CANARY = Path("canary")
"""In the current folder, which is a test's own."""

Header = dict[str, dict[str, Any]]
NAN = struct.pack("<f", float("nan"))


class Pickled:
    """Unpickling this makes the canary: any reader that unpickles anything will run it."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (os.mkdir, (str(CANARY),))


PICKLE = pickle.dumps({"w": Pickled()})
MODULE = "import os\nos.makedirs('canary', exist_ok=True)\n"
"""A Python module that makes the canary when it is imported."""


def split(path: Path) -> tuple[Header, bytes]:
    """Header and body of a safetensors file."""
    raw = path.read_bytes()
    size_bytes = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + size_bytes]), raw[8 + size_bytes :]


def join(header: Header | bytes, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def _largest(header: Header) -> dict[str, Any]:
    tensors = [about for name, about in header.items() if name != "__metadata__"]
    return max(tensors, key=lambda about: about["data_offsets"][1] - about["data_offsets"][0])


def _shifted(header: Header, body: bytes, by: int) -> bytes:
    """The last tensor begins `by` bytes after (or before) the end of the one in front of it."""
    last = max((a for n, a in header.items() if n != "__metadata__"), key=lambda a: a["data_offsets"])
    last["data_offsets"] = [offset + by for offset in last["data_offsets"]]
    return join(header, body + bytes(by) if by > 0 else body[:by])


def _twice(header: Header, body: bytes) -> bytes:
    name = next(name for name in header if name != "__metadata__")
    text = json.dumps(header)
    return join(f"{text[:-1]}, {json.dumps(name)}: {json.dumps(header[name])}}}".encode(), body)


def _set(key: str, value: Any) -> Callable[[Header, bytes], bytes]:
    def attack(header: Header, body: bytes) -> bytes:
        _largest(header)[key] = value
        return join(header, body)

    return attack


def _negative(header: Header, body: bytes) -> bytes:
    about = _largest(header)
    about["shape"] = [-n for n in about["shape"]]
    return join(header, body)


def _all_nan(header: Header, body: bytes) -> bytes:
    first, last = _largest(header)["data_offsets"]
    return join(header, body[:first] + NAN * ((last - first) // 4) + body[last:])


@functools.cache
def _million_names() -> bytes:
    one = '"{:07d}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    return ("{" + ",".join(one.format(i) for i in range(1_000_000)) + "}").encode()


def _no_width(header: Header, body: bytes) -> bytes:
    """More rows than any machine can count, none of them wide: no byte of body is needed."""
    return join({name: {"dtype": "F32", "shape": [2**40, 0], "data_offsets": [0, 0]} for name in header}, b"")


def _overflowing(header: Header, body: bytes) -> bytes:
    return join(
        {n: {"dtype": "F32", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]} for n in header}, b""
    )


TENSOR_ATTACKS: dict[str, Callable[[Header, bytes], bytes]] = {
    "header of 2^63 bytes": lambda header, body: struct.pack("<Q", 2**63) + join(header, body)[8:],
    "header of 100 MB and a byte": lambda header, body: join(
        json.dumps(header).encode().ljust(100_000_001), body
    ),
    "overlap": lambda header, body: _shifted(header, body, -4),
    "gap": lambda header, body: _shifted(header, body, 4),
    "negative shape": _negative,
    "negative offset": _set("data_offsets", [-8, 0]),
    "a name twice": _twice,
    "no UTF-8": lambda header, body: join(json.dumps(header).encode().replace(b'"F32"', b'"F\xff2"'), body),
    "dtype that lies": _set("dtype", "F64"),
    "dtype that nobody has": _set("dtype", "F32\n\x1b[2J"),
    "shape that lies": _set("shape", [2**31, 2**31]),
    "a million tensors": lambda header, body: join(_million_names(), b""),
    "only NaN": _all_nan,
    "rows without width": _no_width,
    "size that overflows": _overflowing,
    "dtype without numbers": lambda header, body: join(
        {n: {"dtype": "F4", "shape": [0], "data_offsets": [0, 0]} for n in header}, b""
    ),
    "half of it": lambda header, body: join(header, body)[: -len(body) // 2],
    "a byte more": lambda header, body: join(header, body + b"\0"),
    "deep header": lambda header, body: join(b'{"a":' * 10_000 + b"1" + b"}" * 10_000, b""),
    "pickle": lambda header, body: PICKLE,
    "torch.save": lambda header, body: torch_file(),
}
"""What a stranger makes of a safetensors file, by name."""


def torch_file() -> bytes:
    """A zip file as torch.save writes it, whose pickle makes the canary."""
    import io
    import zipfile

    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", PICKLE)
        archive.writestr("archive/version", "3\n")
    return out.getvalue()


def numpy_file() -> bytes:
    """A .npy of dtype object: a pickle behind a header."""
    text = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + PICKLE


JSON_ATTACKS: dict[str, Callable[[bytes], bytes]] = {
    "ten megabytes of objects": lambda raw: b'{"x": [' + b"{}," * 3_500_000 + b"0]}",
    "ten megabytes of blanks": lambda raw: raw + b" " * 10_000_000,
    "ten megabytes of digits": lambda raw: b"9" * 10_000_000,
    "ten thousand lists deep": lambda raw: b'{"x": ' + b"[" * 10_000 + b"]" * 10_000 + b"}",
    "five hundred lists deep": lambda raw: b'{"x": ' + b"[" * 500 + b"]" * 500 + b"}",
    "a key twice": lambda raw: raw.replace(b"{", b'{"x": 1, "x": 2, ', 1),
    "NaN": lambda raw: raw.replace(b"{", b'{"x": NaN, ', 1),
    "infinity": lambda raw: raw.replace(b"{", b'{"x": -Infinity, ', 1),
    "more than infinity": lambda raw: raw.replace(b"{", b'{"x": 1e999, ', 1),
    "UTF-16": lambda raw: raw.decode().encode("utf-16"),
    "half of it": lambda raw: raw[: len(raw) // 2],
    "nothing": lambda raw: b"",
    "a list": lambda raw: b"[]",
    "a number": lambda raw: b"5",
    "a string": lambda raw: b'"x"',
    "a pickle": lambda raw: PICKLE,
}
"""What a stranger makes of a JSON file, by name; each must be refused whatever the file is for."""


def edited(path: Path, change: Callable[[Any], Any]) -> None:
    """Parse a JSON file, change the value in place (or return another), and write it back."""
    value = json.loads(path.read_text())
    value = change(value) or value
    path.write_text(json.dumps(value, indent=1) + "\n")


def seal(folder: Path, change: Callable[[dict[str, Any]], Any] = lambda manifest: None) -> None:
    """Rewrite a committed folder's manifest to fit its files, as whoever writes to it can, and change it."""
    path = folder / "MANIFEST.json"
    manifest = json.loads(path.read_text())
    del manifest["digest"]
    manifest["files"] = {
        file.name: {"bytes": file.stat().st_size, "xxh3_128": xxhash.xxh3_128_hexdigest(file.read_bytes())}
        for file in sorted(folder.iterdir())
        if file.is_file() and not file.is_symlink() and file != path and file.stat().st_size < 2**32
    }
    manifest = change(manifest) or manifest
    body = (json.dumps(manifest, indent=1) + "\n").encode()
    sealed = (
        manifest | {"digest": xxhash.xxh3_128_hexdigest(body)} if isinstance(manifest, dict) else manifest
    )
    path.write_text(json.dumps(sealed, indent=1) + "\n")


def instead(path: Path, make: Callable[[Path], object]) -> None:
    """Remove a file or folder and have something else made in its place."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
    make(path)


NOT_FILES: dict[str, Callable[[Path], object]] = {
    "a FIFO": lambda path: os.mkfifo(path),
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a link": lambda path: path.symlink_to("/etc/passwd"),
    "a link to itself": lambda path: path.symlink_to(path),
    "a folder": lambda path: path.mkdir(),
}
"""What may stand where a file is expected, by name."""
