"""What may leave this machine: names of local files are replaced, secrets and paths are refused.

A run's record says where its model and text lay. What of that is a folder of this machine becomes
`local:NAME` before anything is written for publication. Then every file that is to go is read as a stranger
would read it: a secret of the environment, something that looks like a well-known kind of token, or a path of
this machine stops the publication, named by file and line and not shown. Of weights the header is read; the
rest of them is numbers.
"""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sae_train.errors import InputError
from sae_train.files import MAX_HEADER_BYTES, CorruptFile
from sae_train.redact import secrets

LOCAL = "local:"
PATH_STARTS = ("/", "~", "./", "../", "file:")
HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*|[A-Za-z0-9_][\w.-]*")
WEIGHTS = (".safetensors",)
TOKENS = {
    "a Hugging Face token": r"\b(?:hf|api_org)_[A-Za-z0-9]{30,}",
    "a GitHub token": r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{36,})",
    "an API key": r"\bsk-[A-Za-z0-9_-]{20,}",
    "an AWS key": r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    "a Slack token": r"\bxox[abposr]-[A-Za-z0-9-]{10,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY",
    "a password in an address": r"[a-z][a-z0-9+.-]*://[^\s/:@\"']+:[^\s/@\"']+@",
}
PATTERN = re.compile("|".join(f"({pattern})" for pattern in TOKENS.values()).encode())


def is_local(name: str) -> bool:
    """Whether a model's or corpus' name is a file, folder or pattern of files of this machine."""
    if name.startswith(PATH_STARTS) or "\\" in name:
        return True
    if name.startswith(("demo:", "http://", "https://")):
        return False
    return not HUB_ID.fullmatch(name) or os.path.exists(name)


def hub_id(name: Any) -> str | None:
    """The name, if it can be one of the hub's."""
    known = isinstance(name, str) and HUB_ID.fullmatch(name) is not None and not is_local(name)
    return name if known else None


class LocalNames:
    """Names of this machine's files in a run's records, and what takes their place."""

    def __init__(self, config: Mapping[str, Any], more: Mapping[str, str] | None = None) -> None:
        """Collect them.

        Args:
            config: the configuration in run.json.
            more: further names and what is to be written in their place.
        """
        self._instead: dict[str, str] = {}
        for name in _names(config):
            if is_local(name):
                self._instead[name] = public_name(name)
        self._instead |= more or {}

    def replaced(self, tree: Any) -> Any:
        """A copy of plain values without them."""
        if isinstance(tree, str):
            if tree in self._instead:
                return self._instead[tree]
            return public_name(tree) if tree.startswith(PATH_STARTS) and len(tree) > 1 else tree
        if isinstance(tree, Mapping):
            return {self.replaced(key): self.replaced(value) for key, value in tree.items()}
        if isinstance(tree, list | tuple):
            return [self.replaced(value) for value in tree]
        return tree


def public_name(path: str) -> str:
    """`local:` and the last part of a path."""
    last = re.split(r"[/\\]", path.rstrip("/\\"))[-1]
    return LOCAL + (re.sub(r"[^\w.*+-]", "_", last)[:80] or "folder")


def _names(config: Mapping[str, Any]) -> list[str]:
    """Where a configuration names files."""
    model, corpus, source = (config.get(key) or {} for key in ("model", "corpus", "source"))
    found: list[Any] = [model.get(key) for key in ("name", "other", "tokenizer", "gguf_file")]
    found += [corpus.get("name"), *(item.get("name") for item in corpus.get("sources") or [])]
    found += [source.get("path"), *(source.get("paths") or [])]
    found += [config.get("start")] if isinstance(config.get("start"), str) else config.get("start") or []
    found += [(config.get("run") or {}).get("dir")]
    found += [member.get("start") for member in (config.get("members") or {}).values()]
    return [name for name in found if isinstance(name, str) and name]


def private_paths(more: Iterable[Path] = ()) -> list[bytes]:
    """Folders whose names would say something about this machine or its user, the longest first."""
    known = {Path.home(), Path.cwd(), *more}
    found = {str(path) for path in known} | {str(path.resolve()) for path in known}
    return sorted((path.encode() for path in found if len(path) > 4), key=len, reverse=True)


def refuse_private(name: str, file: Path, paths: list[bytes]) -> None:
    """Read one file that is to be published.

    Args:
        name: as it will be called there.
        file: where it lies now.
        paths: what `private_paths` found.

    Raises:
        InputError: there is something in it that must stay here; says what kind and where, and not what.
    """
    data = _readable(file)
    hidden = [secret.encode() for secret in secrets()]
    for number, line in enumerate(data.split(b"\n"), 1):
        kind = next(("a secret of this environment" for secret in hidden if secret in line), None)
        if kind is None and (found := PATTERN.search(line)) is not None:
            assert found.lastindex is not None
            kind = f"what looks like {list(TOKENS)[found.lastindex - 1]}"
        if kind is None and any(path in line for path in paths):
            kind = "a path of this machine"
        if kind is not None:
            where = f"{name} line {number}" if b"\0" not in data else name
            raise InputError("run", where, f"nothing to be published that holds {kind}")


def _readable(file: Path) -> bytes:
    """The whole file, or the header of weights."""
    if file.suffix not in WEIGHTS:
        return file.read_bytes()
    with open(file, "rb") as handle:
        size_bytes = int.from_bytes(handle.read(8), "little")
        if size_bytes > MAX_HEADER_BYTES:
            raise CorruptFile(file, f"{size_bytes} bytes of header, at most {MAX_HEADER_BYTES} are read")
        return handle.read(size_bytes)
