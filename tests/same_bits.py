"""Comparing states to the bit."""

from typing import Any

import torch
from torch import Tensor


def tensors(tree: Any, path: str = "") -> dict[str, Tensor]:
    """All tensors and numbers of a state by their place in it."""
    if isinstance(tree, Tensor):
        return {path: tree.detach().clone()}
    if isinstance(tree, bool | int | float):
        return {path: torch.tensor(tree, dtype=torch.float64)}
    pairs = (
        tree.items() if isinstance(tree, dict) else enumerate(tree if isinstance(tree, list | tuple) else ())
    )
    return {place: t for key, part in pairs for place, t in tensors(part, f"{path}/{key}").items()}


def assert_same_bits(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert tensor.dtype == two[name].dtype and torch.equal(tensor, two[name]), name
