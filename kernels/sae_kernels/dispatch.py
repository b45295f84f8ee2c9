"""Which backend computes an op: asked for by name, or the first in the table that can.

A backend is a module with a function for each op it implements, of the name and arguments of the
public op but without autograd, and `supports(op, *tensors)`, which returns None or the reason why
it cannot take these tensors. A reason in `BY_NAME_ONLY`, if it has that, is why "auto" passes it by.
A new backend is that file and its line in `_BACKENDS`.

A backend that cannot be imported, or whose kernels turn out not to run here, is said once, as a
warning, and then is one that cannot: "auto" takes the next, and asking for it by name is an error.
"""

import importlib
import logging
from collections.abc import Callable
from types import ModuleType

from torch import Tensor

_log = logging.getLogger("sae_kernels")

_BACKENDS = {  # name -> module, in the order in which "auto" tries them
    "cpu": "sae_kernels.cpu",
    "triton": "sae_kernels.triton",
    "torch": "sae_kernels.chunked",
    "reference": "sae_kernels.reference",
}
_requested = "auto"  # process-wide, as autograd may run a backward in another thread
_latest: "use_backend | None" = None  # whose making was the last that happened
_logged: set[tuple[str, str]] = set()
_not_importable: dict[str, str] = {}  # backend -> reason; looked at once, warned about once


def available_backends() -> list[str]:
    """Names `use_backend` accepts besides "auto", in the order of preference."""
    return list(_BACKENDS)


def requested() -> str:
    return _requested


class use_backend:
    """Choose the backend of every op in this process, from now on or within a `with` block.

    A gradient is computed by the backend that was chosen when its forward ran. Threads share the choice, so
    their blocks must not overlap.

    Args:
        name: one of `available_backends()`, or "auto": the first that supports the tensors at hand.

    Raises:
        ValueError: the name is unknown. An op that a named backend cannot run raises when it is called."""

    def __init__(self, name: str) -> None:
        global _requested, _latest
        if name != "auto" and name not in _BACKENDS:
            raise ValueError(f"backend is {name!r}: expected auto or one of {', '.join(_BACKENDS)}")
        self._name, self._before = name, [_requested]
        _requested, _latest = name, self

    def __enter__(self) -> None:
        global _requested, _latest
        if _latest is not self:  # else the block begins where this was made, and ends with what was before
            self._before.append(_requested)
        _requested, _latest = self._name, None

    def __exit__(self, *error: object) -> None:
        global _requested, _latest
        _requested, _latest = self._before.pop(), None


def select(op: str, name: str, *args: object) -> tuple[str, Callable]:
    """The backend for one call: its name and its function.

    Raises:
        ValueError: the backend asked for by name cannot run this op on these tensors."""
    tensors = [a for a in args if isinstance(a, Tensor)]
    if name != "auto":
        reason = _refusal(name, op, tensors)
        if reason:
            raise ValueError(f"backend {name!r} cannot run {op}: {reason}")
        return name, getattr(_module(name), op)
    refused: list[str] = []
    for candidate in _BACKENDS:
        reason = _refusal(candidate, op, tensors) or getattr(_module(candidate), "BY_NAME_ONLY", None)
        if reason is None:
            _log_once(op, candidate, refused)
            return candidate, getattr(_module(candidate), op)
        refused.append(f"not {candidate}: {reason}")
    raise AssertionError("the reference supports everything")


def way_of(name: str, op: str) -> Callable | None:
    """A backend's function for an op that not every backend has."""
    return getattr(_module(name), op, None)


def _module(name: str) -> ModuleType:
    return importlib.import_module(_BACKENDS[name])


def _refusal(name: str, op: str, tensors: list[Tensor]) -> str | None:
    if name in _not_importable:
        return _not_importable[name]
    try:
        module = _module(name)
    except Exception as error:
        # Triton is missing, of a version that lacks what is used, or broken, which may raise anything. The
        # others import torch alone.
        _not_importable[name] = f"it cannot be imported ({type(error).__name__}: {error})"
        _log.warning("backend %s is not used: %s", name, _not_importable[name])
        return _not_importable[name]
    if not hasattr(module, op):
        return f"it does not implement {op}"
    return module.supports(op, *tensors)


def _log_once(op: str, name: str, refused: list[str]) -> None:
    if (op, name) not in _logged:
        _logged.add((op, name))
        _log.info("%s runs on backend %s (%s)", op, name, "; ".join(refused) or "first choice")
