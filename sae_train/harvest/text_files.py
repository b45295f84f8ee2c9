"""Which files a source of text names, their format, whether they can be text at all, and a digest of them."""

import bz2
import codecs
import glob
import gzip
import logging
import lzma
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import xxhash

from sae_train.errors import InputError
from sae_train.harvest.zst import ZstDamage, open_zst

log = logging.getLogger("sae_train.harvest")

FORMATS = {
    ".txt": "text",
    ".text": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
}
PACKED: dict[str, Callable[..., Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": open_zst,
}
DAMAGE = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, ZstDamage)
"""What decompressors raise about a file that is cut off, garbled or not what its ending says."""
HEAD_BYTES = 1024
WIDE_BOMS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)
WHOLE_DIGEST_BYTES = 64 << 20
EDGE_BYTES = 1 << 20


@dataclass(frozen=True)
class TextSpec:
    """Where one source of text lies; `key` is what the user would write to name it in the configuration."""

    key: str
    name: str
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    text_column: str = "text"
    documents: str = "file"
    weight: float = 1.0

    def field(self, name: str) -> str:
        """What the user would write to set another property of this source."""
        return self.key.removesuffix("name") + name


def is_url(name: str) -> bool:
    return name.startswith(("http://", "https://"))


def format_of(name: str) -> str | None:
    """The format that a file name's ending stands for, looking through compression."""
    path = Path(name.partition("?")[0].lower())
    return FORMATS.get(Path(path.stem).suffix if path.suffix in PACKED else path.suffix)


def unpacker(name: str) -> Callable[..., Any] | None:
    """What opens a compressed file, or file object, for reading; None where it is not compressed."""
    return PACKED.get(Path(name.partition("?")[0]).suffix.lower())


def find_files(spec: TextSpec) -> list[str] | None:
    """The files that a source names, sorted; None when the name can only be a dataset on the hub.

    Raises:
        InputError: nothing is there, nothing there is text, or the formats differ.
    """
    name, endings = spec.name, ", ".join(FORMATS)
    if is_url(name):
        files = [name]
    else:
        path = Path(name).expanduser()
        if path.is_dir():
            files = _text_below(path)
        elif path.is_file():
            files = [str(path)]
        elif glob.has_magic(name):
            files = sorted(file for file in glob.glob(str(path), recursive=True) if Path(file).is_file())
        elif format_of(name) or name.startswith(("/", ".", "~")) or name.count("/") > 1:
            raise InputError(spec.key, name, f"an existing file, folder or glob of {endings}, or a hub id")
        else:
            return None
    if not files and glob.has_magic(name):
        raise InputError(spec.key, name, "a pattern that some file matches; none does")
    formats = {format_of(file) for file in files}
    if not files or None in formats:
        raise InputError(spec.key, name, f"files ending in {endings} (or these with {', '.join(PACKED)})")
    if len(formats) > 1:
        raise InputError(spec.key, name, f"files of one format, not {', '.join(sorted(map(str, formats)))}")
    if spec.split != "train":
        raise InputError(spec.field("split"), spec.split, "train: files have no other split")
    filled = [file for file in files if is_url(file) or not _is_empty(file)]
    if not filled:
        raise InputError(spec.key, name, f"files that hold text, these {len(files)} are empty")
    return filled


def _text_below(folder: Path) -> list[str]:
    """Text files of a folder and the folders in it, sorted; what lies there besides is said.

    What is hidden is not looked at."""
    seen = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    seen = [file for file in seen if not any(p.startswith(".") for p in file.relative_to(folder).parts)]
    found = [file for file in seen if format_of(file.name)]
    others = [file.name for file in seen if not format_of(file.name)]
    if found and others:
        log.info("%s: %d files are read; no text by their endings: %s", folder, len(found), _few(others))
    return [str(file) for file in found]


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _is_empty(file: str) -> bool:
    """No bytes; or Parquet without rows, such as a part that nothing was left of: datasets cannot read it."""
    no_bytes = Path(file).stat().st_size == 0
    if no_bytes or format_of(file) != "parquet" or unpacker(file) is not None:
        return no_bytes
    import pyarrow
    from pyarrow import parquet

    try:
        return bool(parquet.read_metadata(file).num_rows == 0)
    except (OSError, pyarrow.ArrowException):
        return False  # damaged: reading it says so


def is_damage(error: BaseException) -> bool:
    """Whether an error is about content, which reading a file again cannot change.

    bz2 and Arrow say so by a bare OSError. One of the operating system's carries an errno, and one that
    `datasets` raises for an absent file is of a subclass.
    """
    return isinstance(error, DAMAGE) or (type(error) is OSError and error.errno is None)


def check_encoding(spec: TextSpec, openers: Mapping[str, Callable[[], IO[bytes]]]) -> None:
    """Look at the first kilobyte of each file (name -> what opens it unpacked).

    Text in UTF-16 would otherwise be read, as replacement characters and NULs. Half the bytes of English in
    UTF-16 are NULs, a few less where it has quotes and dashes, and three quarters in UTF-32; a quarter tells
    both from UTF-8 with a stray NUL.

    Raises:
        InputError: a file begins like UTF-16 or UTF-32, or cannot be unpacked.
        OSError: a file cannot be read.
    """
    for file, opener in openers.items():
        try:
            with opener() as opened:
                head = opened.read(HEAD_BYTES)
        except (OSError, *DAMAGE) as error:
            if not is_damage(error):
                raise
            accepted = f"whole {Path(file).suffix} files; {file} is damaged or not packed that way ({error})"
            raise InputError(spec.key, spec.name, accepted) from error
        nuls = head.count(0)
        if head.startswith(WIDE_BOMS):
            found = f"{file} begins with the byte-order mark of UTF-16 or UTF-32"
        elif nuls and 4 * nuls >= len(head):
            found = f"{nuls} of the first {len(head)} bytes of {file} are NULs, as in UTF-16 or UTF-32"
        else:
            continue
        raise InputError(spec.key, spec.name, f"text in UTF-8; {found}")


def digest_files(files: list[str]) -> str:
    """xxh3 of names, sizes and content: whole up to 64 MB in all, else the first and last MB of each."""
    digest = xxhash.xxh3_128()
    paths = [Path(file) for file in files]
    whole = sum(path.stat().st_size for path in paths) <= WHOLE_DIGEST_BYTES
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            if whole or size <= 2 * EDGE_BYTES:
                digest.update(file.read())
            else:
                digest.update(file.read(EDGE_BYTES))
                file.seek(size - EDGE_BYTES)
                digest.update(file.read())
    return digest.hexdigest()
