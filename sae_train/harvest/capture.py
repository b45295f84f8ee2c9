"""Forward hooks that read or replace the tensor at a site, whatever container a module hands it in.

The rule: a tensor is itself; of a tuple or list the first element; of a dict, ModelOutput or dataclass the
first field; and that must be a float tensor. Of a module's input, the first positional argument, else
`hidden_states`, else the first keyword argument that is a tensor. Anything else is an error that names the
module: guessing would train an SAE on attention weights.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from sae_train.errors import InputError
from sae_train.harvest.hooks import Site

Visit = Callable[[Tensor], Tensor | None]
"""Sees a site's tensor; returns what the model goes on with, or None to leave it as it is."""


@contextmanager
def hooked(model: nn.Module, visits: Mapping[Site, Visit]) -> Iterator[None]:
    """While open, each site's `visit` sees its tensor in every forward. Hooks go also on an exception."""
    handles: list[Any] = []
    try:
        for site, visit in visits.items():
            module = model.get_submodule(site.path)
            if site.side == "in":
                hook = _input_hook(site, visit)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            else:
                handles.append(module.register_forward_hook(_output_hook(site, visit)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _output_hook(site: Site, visit: Visit) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        new = visit(first_tensor(output, site))
        return None if new is None else with_first_tensor(output, new)

    return hook


def _input_hook(site: Site, visit: Visit) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            new = visit(first_tensor(args, site))
            return None if new is None else (with_first_tensor(args, new), kwargs)
        tensors = [name for name, value in kwargs.items() if isinstance(value, Tensor)]
        name = "hidden_states" if "hidden_states" in tensors else next(iter(tensors), None)
        if name is None:
            raise InputError(
                "hook", site.name, f"a module that is given a tensor; {site.path!r} is given none"
            )
        new = visit(first_tensor(kwargs[name], site))
        return None if new is None else (args, kwargs | {name: new})

    return hook


def first_tensor(value: Any, site: Site) -> Tensor:
    """The tensor of a site in what its module was given or gave. Raises InputError if the rule finds none."""
    found = value
    if isinstance(value, tuple | list):
        found = value[0] if value else None
    elif isinstance(value, Mapping):
        found = next(iter(value.values()), None)
    elif dataclasses.is_dataclass(value):
        found = getattr(value, dataclasses.fields(value)[0].name)
    if not isinstance(found, Tensor) or not found.is_floating_point():
        kind = f"{type(value).__name__} starting with {type(found).__name__}" if found is not value else ""
        if isinstance(found, Tensor):
            kind = f"a tensor of {str(found.dtype).removeprefix('torch.')}"
        raise InputError(
            "hook",
            site.name,
            f"a module with a float tensor first; {site.path!r} has {kind or type(value).__name__}",
        )
    return found


def with_first_tensor(value: Any, new: Tensor) -> Any:
    """The same container as `value` with `new` in the place that `first_tensor` reads."""
    if isinstance(value, Tensor):
        return new
    if isinstance(value, tuple):
        rest = (new, *value[1:])
        return type(value)(*rest) if hasattr(value, "_fields") else rest
    if isinstance(value, list):
        return [new, *value[1:]]
    if isinstance(value, Mapping):
        first = next(iter(value))
        return type(value)(**{**value, first: new})
    return dataclasses.replace(value, **{dataclasses.fields(value)[0].name: new})
