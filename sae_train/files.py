"""Durable files: a name either holds a whole, verified content or does not exist.

Every write goes to a hidden sibling (`.tmp-NAME-<uuid>`), is fsynced, renamed to its name, and
the folder that holds the name is fsynced: a crash at any instant leaves the old state or the new
one. A *committed folder* is the same for several files at once, with MANIFEST.json listing each
file's size and xxh3_128 digest, the manifest's own included. safetensors alone detects none of
200 single-bit flips in tensor data, and its writer neither fsyncs nor honours the umask, so both
are done here. The digests find accidents; they do not stop someone who rewrites the manifest.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

FORMAT = 1
"""Version of the committed-folder layout. Readers refuse a larger one."""
MANIFEST = "MANIFEST.json"
MAX_JSON_BYTES = 64 * 2**20
"""Parsed JSON takes tens of times its size in memory; nothing this package writes comes near."""
MAX_JSON_DEPTH = 64
"""Ours is nested a quarter as deep. What walks it afterwards may recurse without a thought."""
MAX_MANIFEST_BYTES = 2 * 2**20
"""Parsed before any digest can vouch for it. 2 MiB of `{}` come to 50 MB; ours has kilobytes."""
MAX_FILES = 1000
"""Files in a committed folder; ours hold two or three."""
MAX_HEADER_BYTES = 2**20
"""Of a safetensors file from anyone: some 10,000 tensors. safetensors itself reads up to 100 MB."""
MEMORY_BYTES = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
LIES = (RuntimeError, TypeError)
"""What torch raises for shapes and dtypes that a header may state and no tensor can have."""


class CorruptFile(ValueError):
    """A file does not hold what its format says it must."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = path, reason


class CorruptFolder(CorruptFile):
    """A committed folder is not what its manifest says: torn, edited, truncated, flipped or mixed."""


class FutureFormat(CorruptFolder):
    """A committed folder was written by a newer version of this package."""


def is_name(name: str) -> bool:
    """Whether a file name from a manifest is safe to join to a folder: no separator, no parent."""
    return bool(re.fullmatch(r"[A-Za-z0-9._-]{1,200}", name)) and name not in {".", ".."}


def digest(path: Path) -> str:
    """xxh3_128 of a file's bytes as 32 hex digits, streamed."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def fsync(path: Path) -> None:
    """Flush a file's bytes, or a folder's entries, to the device."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def temporary(path: Path) -> Path:
    """A hidden sibling of `path` that no reader looks at: `.tmp-NAME-<uuid>`."""
    return path.parent / f".tmp-{path.name}-{uuid.uuid4().hex}"


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary file to fill; then make it `path`, durably, with the mode the umask gives."""
    temp = temporary(path)
    try:
        os.close(os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        mode = stat.S_IMODE(temp.stat().st_mode)
        yield temp
        temp.chmod(mode)  # safetensors swaps in a file of its own, mode 0600
        fsync(temp)
        os.replace(temp, path)
        fsync(path.parent)
    finally:
        temp.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a whole file durably; an older one of that name stays intact until the new one is on disk."""
    with _replacing(path) as temp:
        temp.write_bytes(data)


def _encode(value: Any) -> bytes:
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    """Write JSON durably. Raises ValueError for NaN and infinities, TypeError for what JSON cannot hold."""
    write_bytes(path, _encode(value))


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """Parse a JSON file that may come from anyone.

    Raises:
        CorruptFile: a link or no regular file, larger than `max_bytes`, not UTF-8 JSON, nested too
            deeply, a key given twice, NaN or an infinity.
        FileNotFoundError: there is no such file.
    """
    size_bytes = _regular_size(path)
    if size_bytes > max_bytes:
        raise CorruptFile(path, f"{size_bytes} bytes of JSON, at most {max_bytes} are read")
    return _parse(path, path.read_bytes())


def _regular_size(path: Path) -> int:
    status = path.lstat()  # a stranger's link may lead to any file of this machine
    if not stat.S_ISREG(status.st_mode):
        raise CorruptFile(path, "not a regular file")
    return status.st_size


def _parse(path: Path, raw: bytes) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(table := dict(pairs)) != len(pairs):
            raise ValueError("a key is given twice")
        return table

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a JSON number")

    try:
        value = json.loads(raw.decode(), object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise CorruptFile(path, f"not valid JSON: {error}") from error
    level = [value]
    for _ in range(MAX_JSON_DEPTH + 1):
        if not level:
            return value
        level = [child for node in level if isinstance(node, dict | list) for child in _children(node)]
    raise CorruptFile(path, f"JSON nested deeper than {MAX_JSON_DEPTH}")


def _children(node: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return node.values() if isinstance(node, dict) else node


def check_header(path: Path, max_bytes: int = MAX_HEADER_BYTES) -> None:
    """Refuse what safetensors would accept: a header of up to 100 MB, and a name given twice.

    Raises:
        CorruptFile: a link or no regular file, a header of more than `max_bytes`, or one that is no JSON.
        FileNotFoundError: there is no such file.
    """
    _regular_size(path)
    with open(path, "rb") as file:
        size_bytes = int.from_bytes(file.read(8), "little")
        if size_bytes > max_bytes:
            raise CorruptFile(path, f"{size_bytes} bytes of header, at most {max_bytes} are read")
        header = file.read(size_bytes)
    try:
        _parse(path, header)
    except CorruptFile as error:
        raise CorruptFile(path, f"its header is {error.reason}") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file durably.

    Args:
        tensors: any strided tensors on any device; non-contiguous ones and ones that share memory
            are copied, so each is stored whole.

    Raises:
        OSError: the device is full or fails; no file of that name is made or changed.
    """
    storages: set[tuple[torch.device, int]] = set()
    own: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        storage = (tensor.device, tensor.untyped_storage().data_ptr())
        own[name] = tensor.detach().contiguous()
        if storage in storages and own[name].data_ptr() == tensor.data_ptr():
            own[name] = own[name].clone()
        storages.add(storage)
    with _replacing(path) as temp:
        try:
            save_file(own, temp)
        except SafetensorError as error:
            # It reports a full disk as its own error type, with errno in the text only.
            code = re.search(r"os error (\d+)", str(error))
            number = int(code.group(1)) if code else errno.EIO
            raise OSError(number, f"{os.strerror(number)} ({error})", str(path)) from error


def read_tensors(
    path: Path, device: str | torch.device = "cpu", max_header_bytes: int = MAX_JSON_BYTES
) -> dict[str, Tensor]:
    """All tensors of a safetensors file, in memory of their own: the file may be deleted afterwards.

    Raises:
        CorruptFile: no whole safetensors file, a header of more than `max_header_bytes`, or more bytes than
            this machine has memory (a flipped value is not noticed here: see `verify`).
        FileNotFoundError: there is no such file.
    """
    check_header(path, max_header_bytes)
    if (size_bytes := path.stat().st_size) > MEMORY_BYTES:  # sparse, it costs its sender nothing
        raise CorruptFile(path, f"{size_bytes} bytes, more than this machine's memory")
    try:
        return load_file(path, device=str(device), backend="pread")
    except (SafetensorError, *LIES) as error:
        # The message quotes the file's own names: as many as it likes, line breaks included.
        reason = ascii(str(error))[1:-1][:200]
        raise CorruptFile(path, f"not a whole safetensors file: {reason}") from error


@contextmanager
def committed_folder(
    target: Path, kind: str, meta: Mapping[str, Any], check: Callable[[], None] = lambda: None
) -> Iterator[Path]:
    """Make a folder of files appear whole or not at all.

        with committed_folder(Path("runs/a/step-00000100"), "checkpoint", {"step": 100}) as temp:
            write_tensors(temp / "state.safetensors", tensors)

    Args:
        target: the folder to make, in one that is there; it must not exist, nothing is ever written into an
            old one.
        kind: what the folder is ("checkpoint", "shard" ...); readers refuse another kind.
        meta: any JSON-able facts, kept in the manifest and covered by its digest.
        check: asked when all is written, just before it gets its name; what it raises leaves nothing behind.

    Yields:
        A hidden sibling to write plain files into. It is removed if anything fails.

    Raises:
        FileExistsError: the target exists.
        OSError: the device is full or fails; nothing is committed.
    """
    assert is_name(target.name), target.name
    temp = temporary(target)
    temp.mkdir()  # not its parents: a run folder that was moved away is not made anew
    try:
        yield temp
        files = {}
        for path in sorted(temp.iterdir()):
            assert is_name(path.name), path.name
            assert path.is_file(), path
            assert path.name != MANIFEST, path
            fsync(path)
            files[path.name] = {"bytes": path.stat().st_size, "xxh3_128": digest(path)}
        write_bytes(
            temp / MANIFEST, _seal({"format": FORMAT, "kind": kind, "files": files, "meta": dict(meta)})
        )
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        check()
        os.rename(temp, target)
        try:
            fsync(target.parent)
        except OSError:
            os.rename(target, temp)  # a name that may not survive a crash is no commit
            raise
    finally:
        shutil.rmtree(temp, ignore_errors=True)  # a leftover is harmless; the first error is what matters


def _seal(manifest: dict[str, Any]) -> bytes:
    """The manifest's bytes, ending in the digest of its other fields."""
    return _encode(manifest | {"digest": xxhash.xxh3_128_hexdigest(_encode(manifest))})


def verify(folder: Path, kind: str | None = None) -> dict[str, Any]:
    """Check every byte of a committed folder against its manifest and return the manifest.

    Returns:
        {"format", "kind", "files": {name: {"bytes", "xxh3_128"}}, "meta"}.

    Raises:
        FutureFormat: written by a newer version of this package.
        CorruptFolder: anything is missing, extra, truncated, changed, a link, of another kind, or larger
            than this machine's memory (what is committed is read whole).
    """
    manifest = verify_listing(folder, kind)
    verify_digests(folder, manifest)
    return manifest


def verify_digests(folder: Path, manifest: Mapping[str, Any], without: Collection[str] = ()) -> None:
    """Check the content of a folder's files against the manifest that `verify_listing` has returned.

    Raises:
        CorruptFolder: a file has changed since it was written.
    """
    for name in manifest["files"].keys() - without:
        check_digest(folder, name, manifest, digest(folder / name))


def check_digest(folder: Path, name: str, manifest: Mapping[str, Any], found: str) -> None:
    """Raises CorruptFolder if the digest of a folder's file is not the manifest's."""
    if found != manifest["files"][name]["xxh3_128"]:
        raise CorruptFolder(folder, f"{name!r} has changed since it was written (digest)")


def verify_listing(folder: Path, kind: str | None = None) -> dict[str, Any]:
    """`verify` without what takes time: the manifest itself, and the names, kinds and sizes of the files."""
    if folder.is_symlink() or not folder.is_dir():
        raise CorruptFolder(folder, "not a folder")
    with os.scandir(folder) as listing:
        entries = {entry.name: entry for entry in islice(listing, MAX_FILES + 1)}
    if len(entries) > MAX_FILES:
        raise CorruptFolder(folder, f"more than {MAX_FILES} files")
    for name, entry in entries.items():
        if not entry.is_file(follow_symlinks=False):
            raise CorruptFolder(folder, f"{name!r} is not a regular file")
    if MANIFEST not in entries:
        raise CorruptFolder(folder, f"{MANIFEST} is missing")
    manifest = _read_manifest(folder)
    if kind is not None and manifest["kind"] != kind:
        raise CorruptFolder(folder, f"it is of kind {manifest['kind']!r}, not {kind!r}")
    files = manifest["files"]
    for name in sorted(files.keys() - entries.keys()):
        raise CorruptFolder(folder, f"{name!r} is missing")
    for name in sorted(entries.keys() - files.keys() - {MANIFEST}):
        raise CorruptFolder(folder, f"{name!r} is not in the manifest")
    for name, expected in files.items():
        size_bytes = entries[name].stat(follow_symlinks=False).st_size
        if size_bytes != (said := expected["bytes"]):
            raise CorruptFolder(folder, f"{name!r} has {size_bytes} bytes, the manifest says {said}")
        if size_bytes > MEMORY_BYTES:  # before its digest, which would take hours
            raise CorruptFolder(folder, f"{name!r} has {size_bytes} bytes, more than this machine's memory")
    return manifest


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest: Any = read_json(path, MAX_MANIFEST_BYTES)
    except CorruptFile as error:
        raise CorruptFolder(folder, f"{MANIFEST}: {error.reason}") from error
    version = manifest.get("format") if isinstance(manifest, dict) else None
    if type(version) is not int or version < 1:
        raise CorruptFolder(folder, f"{MANIFEST} has no format version")
    if version > FORMAT:
        raise FutureFormat(
            folder, f"format version {version}, this version of sae_train reads up to {FORMAT}"
        )
    body = {key: value for key, value in manifest.items() if key != "digest"}
    try:
        # Compared as bytes: a flipped space or a reordered key is a change too.
        sealed = path.read_bytes() == _seal(body)
    except (ValueError, RecursionError):  # a number or a depth that can be read, but not written
        sealed = False
    if not sealed or body.keys() != {"format", "kind", "files", "meta"}:
        raise CorruptFolder(folder, f"{MANIFEST} has changed since it was written (digest)")
    # Whoever rewrites a manifest can seal it too: from here on its values are only those of a stranger.
    files, facts = body["files"], {"bytes": int, "xxh3_128": str}
    if not isinstance(body["meta"], dict) or not isinstance(files, dict) or type(body["kind"]) is not str:
        raise CorruptFolder(folder, f"{MANIFEST} is not one of this package")
    for name, expected in files.items():
        if not is_name(name):
            raise CorruptFolder(folder, f"{MANIFEST} names a file outside the folder")
        if not isinstance(expected, dict) or {key: type(v) for key, v in expected.items()} != facts:
            raise CorruptFolder(folder, f"{MANIFEST} gives no size and digest of {name!r}")
    return body


def remove_leftovers(folder: Path) -> None:
    """Delete what killed writers left in a folder (`.tmp-*`). Only the folder's one writer may call it."""
    for path in folder.glob(".tmp-*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def remove_folder(folder: Path) -> None:
    """Delete a committed folder; a kill half way leaves a leftover, never a torn folder under its name."""
    doomed = temporary(folder)
    os.rename(folder, doomed)
    shutil.rmtree(doomed)
