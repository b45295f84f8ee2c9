"""Which files a source of text names, in which format they are, and a digest that tells when they change."""

import glob
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import xxhash

from sae_train.errors import InputError

FORMATS = {
    ".txt": "text",
    ".text": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
}
PACKED = (".gz", ".bz2", ".xz")
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


def format_of(name: str) -> str | None:
    """The format that a file name's ending stands for, looking through compression."""
    path = Path(name.partition("?")[0])
    return FORMATS.get(Path(path.stem).suffix if path.suffix in PACKED else path.suffix)


def find_files(spec: TextSpec) -> list[str] | None:
    """The files that a source names, sorted; None when the name can only be a dataset on the hub.

    Raises:
        InputError: nothing is there, nothing there is text, or the formats differ.
    """
    name, endings = spec.name, ", ".join(FORMATS)
    if name.startswith(("http://", "https://")):
        if not importlib.util.find_spec("aiohttp"):
            raise InputError(spec.key, name, "a hub dataset or local files; a URL needs the package aiohttp")
        files = [name]
    else:
        path = Path(name).expanduser()
        if path.is_dir():
            files = [str(file) for file in sorted(path.rglob("*")) if file.is_file() and format_of(file.name)]
        elif path.is_file():
            files = [str(path)]
        elif glob.has_magic(name):
            files = sorted(file for file in glob.glob(str(path), recursive=True) if Path(file).is_file())
        elif format_of(name) or name.startswith(("/", ".", "~")) or name.count("/") > 1:
            raise InputError(spec.key, name, f"an existing file, folder or glob of {endings}, or a hub id")
        else:
            return None
    formats = {format_of(file) for file in files}
    if not files or None in formats:
        raise InputError(spec.key, name, f"files ending in {endings} (or these with {', '.join(PACKED)})")
    if len(formats) > 1:
        raise InputError(spec.key, name, f"files of one format, not {', '.join(sorted(map(str, formats)))}")
    if spec.split != "train":
        raise InputError(spec.field("split"), spec.split, "train: files have no other split")
    filled = [file for file in files if "://" in file or Path(file).stat().st_size]
    if not filled:
        raise InputError(spec.key, name, f"files that hold text, these {len(files)} are empty")
    return filled


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
