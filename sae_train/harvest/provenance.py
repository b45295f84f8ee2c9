"""Digests that say which model and tokenizer it was.

A local model has no commit, so its revision is a digest: of config.json, of the Python files that may come
with it, and of each weight file its name, size and content. Files of more than 4 GiB in all count with their
first and last megabyte only: that notices another model, a truncated file or a fine-tuned copy in
milliseconds, not an edit in the middle of a tensor.
"""

import json
from pathlib import Path
from typing import Any

import xxhash

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".gguf")
WHOLE_BYTES = 4 << 30
"""Read whole up to here, at 5 GB/s once they are in memory, where loading the model wants them anyway."""
SAMPLED_BYTES = 1 << 20


def local_revision(folder: str, gguf_file: str | None = None) -> str:
    """xxh3-128 of a model folder's configuration, code and weight files, as "xxh3:HEX"."""
    path = Path(folder).expanduser()
    digest = xxhash.xxh3_128()
    if gguf_file is not None:
        files = [path / gguf_file]
    else:
        files = sorted(file for file in path.iterdir() if file.suffix in WEIGHT_SUFFIXES)
        digest.update((path / "config.json").read_bytes())
        for code in sorted(path.glob("*.py")):
            digest.update(f"\0{code.name}\0".encode() + code.read_bytes())
    whole = sum(file.stat().st_size for file in files) <= WHOLE_BYTES
    for file in files:
        size_bytes = file.stat().st_size
        digest.update(f"\0{file.name}\0{size_bytes}\0".encode())
        with file.open("rb") as handle:
            if whole:
                while part := handle.read(SAMPLED_BYTES):
                    digest.update(part)
            else:
                digest.update(handle.read(SAMPLED_BYTES))
                handle.seek(max(0, size_bytes - SAMPLED_BYTES))
                digest.update(handle.read(SAMPLED_BYTES))
    return f"xxh3:{digest.hexdigest()}"


def tokenizer_digest(tokenizer: Any) -> str:
    """xxh3-128 of what decides a tokenizer's ids: its Rust definition (or vocabulary) and its special tokens.

    Truncation and padding are left out: they are switches that callers flip, not part of the tokenizer.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    definition = json.loads(backend.to_str()) if backend is not None else {"vocab": tokenizer.get_vocab()}
    content = {key: value for key, value in definition.items() if key not in ("truncation", "padding")}
    content["special_tokens_map"] = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return f"xxh3:{xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())}"
