"""A registry maps the name in a configuration to a class and the dataclass that configures it.

Published configurations are downloaded by strangers, so data never names a Python object:
``name: topk`` looks up a dict. The same dict feeds Hydra's schemas (``config.py``).
"""

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from sae_train.errors import InputError

T = TypeVar("T")

MAX_SHOWN = 50
MAX_COMPARED = 1000
"""Comparing takes about 0.1 ms a name; the tensors of a stranger's file can have any number of names."""


def nearest(name: str, known: list[str], count: int = 3) -> str:
    """A phrase listing the accepted names, the first fifty if there are more, and the closest to ``name``."""
    close = difflib.get_close_matches(name, known[:MAX_COMPARED], n=count, cutoff=0.4)
    shown = ", ".join(sorted(known)[:MAX_SHOWN]) + (f" ... ({len(known)})" if len(known) > MAX_SHOWN else "")
    if close:
        return f"one of {shown} (did you mean {' or '.join(close)}?)"
    return f"one of {shown}"


class Registry(Generic[T]):
    """Names of one kind (``sae``, ``activation`` ...), each with a class and its config dataclass."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, tuple[type[T], type]] = {}

    def register(self, name: str, config: type) -> Callable[[type[T]], type[T]]:
        def add(cls: type[T]) -> type[T]:
            if name in self._entries:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._entries[name] = (cls, config)
            return cls

        return add

    def _entry(self, name: str) -> tuple[type[T], type]:
        if name not in self._entries:
            raise InputError(f"{self.kind}.name", name, nearest(str(name), list(self)))
        return self._entries[name]

    def cls(self, name: str) -> type[T]:
        return self._entry(name)[0]

    def config(self, name: str) -> type:
        return self._entry(name)[1]

    def build(self, config: Any, *args: Any, **kwargs: Any) -> T:
        """The class that ``config.name`` names, constructed with the config and what else it needs."""
        build: Callable[..., T] = self.cls(config.name)
        return build(config, *args, **kwargs)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)


def discover(package: str) -> None:
    """Import every module of a package, so that its ``@REGISTRY.register`` lines run."""
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        importlib.import_module(f"{package}.{module.name}")
