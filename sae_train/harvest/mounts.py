"""Files under names of their own, for `datasets` to open: packed ones and remote ones.

`datasets` opens what is not a plain local file through fsspec, and there forgets how the text is to be
decoded; of web servers it keeps neither the status nor a cut. So such a file is mounted: it gets a name like
`sae-text://3.jsonl`, and whoever opens that name gets the bytes unpacked, or text decoded as asked for.
"""

import io
import itertools
from collections.abc import Callable
from typing import IO, Any

import fsspec
from fsspec.spec import AbstractFileSystem

PROTOCOL = "sae-text"
_mounted: dict[str, Callable[[], IO[bytes]]] = {}
_numbers = itertools.count()


def mount(opener: Callable[[], IO[bytes]], ending: str) -> str:
    """The name under which `datasets` can open what `opener` opens; `ending` says what it is, unpacked."""
    name = f"{next(_numbers)}{ending}"
    _mounted[name] = opener
    return f"{PROTOCOL}://{name}"


class MountedFiles(AbstractFileSystem):
    """The file system behind the names. Read-only; a mounted file has no size, for it may be packed."""

    protocol = PROTOCOL
    cachable = False

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        name = self._strip_protocol(path)
        if name not in _mounted:
            raise FileNotFoundError(path)
        return {"name": name, "type": "file", "size": None}

    def glob(self, path: str, **options: Any) -> dict[str, dict[str, Any]]:
        info = self.info(path)
        return {info["name"]: info}

    def open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        opened = _mounted[self._strip_protocol(path)]()
        if "b" in mode:
            return opened
        # `datasets` gives options of `open` to the file system instead.
        chosen = {key: self.storage_options.get(key) for key in ("encoding", "errors", "newline")}
        return io.TextIOWrapper(opened, **chosen)


fsspec.register_implementation(PROTOCOL, MountedFiles)
