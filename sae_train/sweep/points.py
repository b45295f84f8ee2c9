"""The points of a sweep: what a run of each alone would be, composed as `train` composes it.

A point is a value for every axis. Two points can be trained side by side, on one harvest, if what they
compose to differs in nothing but what members of a run may differ in; so nobody has to say which keys those
are, and files of conf/ and interpolations count for what they change.
"""

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from omegaconf import DictConfig

from sae_train.config import Config, as_tree, to_config
from sae_train.errors import InputError
from sae_train.member_set import members
from sae_train.sweep.axes import Axis, K, parsed
from sae_train.train.members import MemberConfig

Compose = Callable[[Sequence[str]], DictConfig]
"""Overrides of `train` -> the composed configuration."""
OF_MEMBERS = ("hook", "target", "start", "sae", "optim", "saes", "grid", "launch")
"""What the members of a run may differ in, beside `run.seed`; and where it runs, which the sweep decides."""
MOST = 10_000
"""Points; more is a slip: each is composed and checked before anything starts."""


@dataclass(frozen=True)
class Point:
    """One combination of values.

    Attributes:
        values: what each axis has, in Hydra's spelling, in the order of the axes.
        overrides: arguments of `train` that train it alone.
        config, members: what these compose to.
    """

    values: tuple[str, ...]
    overrides: tuple[str, ...]
    config: Config
    members: tuple[MemberConfig, ...]

    def rest(self) -> str:
        """Everything that points trained side by side have in common."""
        return text_of(shared_part(self.config))


def all_points(fixed: Sequence[str], axes: Sequence[Axis], compose: Compose) -> list[Point]:
    """Every combination of the axes' values, the last axis varying fastest.

    Raises:
        InputError: an axis that is searched, too many combinations, or one that `train` would refuse.
    """
    count = 1
    for axis in axes:
        if axis.values is None:
            wanted = "values in a list; between two ends is searched, which takes sweep.trials=N"
            raise InputError(axis.key, f"interval({axis.ends()[0]},{axis.ends()[1]})", wanted)
        count *= len(axis.values)
    if count > MOST:
        raise InputError("sweep", f"{count} combinations", f"at most {MOST}")
    combinations = itertools.product(*(axis.values or () for axis in axes))
    return [point(fixed, axes, values, compose) for values in combinations]


def point(fixed: Sequence[str], axes: Sequence[Axis], values: Sequence[str], compose: Compose) -> Point:
    """One combination, checked as `train` checks it before it loads anything. Raises InputError."""
    own = [axis.override(value) for axis, value in zip(axes, values, strict=True)]
    overrides = _with_k([*fixed, *own], compose)
    composed = compose(overrides)
    config: Config = to_config(composed)
    return Point(tuple(values), tuple(overrides), config, tuple(members(config, composed)))


def _with_k(overrides: Sequence[str], compose: Compose) -> list[str]:
    """The arguments with `k` made into the key that sets sparsity for their activation."""
    short = [one for one in overrides if one.partition("=")[0] == K]
    if not short:
        return list(overrides)
    others = [one for one in overrides if one not in short]
    activation = compose(others).sae.activation
    value = short[-1].partition("=")[2]
    for key in ("k", "target_l0"):
        if key in activation:
            return [*others, f"sae.activation.{key}={value}"]
    raise InputError(K, value, f"an activation with k or target_l0, which {activation.name} has not")


def shared_part(config: Config) -> dict[str, Any]:
    """What a run's members cannot differ in."""
    tree = as_tree(config)
    run = {key: value for key, value in tree["run"].items() if key not in ("seed", "dir")}
    return {key: value for key, value in tree.items() if key not in OF_MEMBERS} | {"run": run}


def text_of(tree: Any) -> str:
    """Plain values as text that is equal for equal values."""
    return json.dumps(tree, sort_keys=True)


def varies(axis: int, points: Sequence[Point]) -> bool:
    """Whether points differ on this axis."""
    return len({point.values[axis] for point in points}) > 1


def keys_of(overrides: Sequence[str]) -> set[str]:
    """The keys that arguments set."""
    return {parsed(one).key_or_group for one in overrides}


def differences(own: Any, base: Any) -> dict[str, Any]:
    """Of two dataclasses' values, what `own` has otherwise; everything, where they are of two types."""
    out: dict[str, Any] = {}
    for field in fields(own):
        mine = getattr(own, field.name)
        theirs = getattr(base, field.name) if type(own) is type(base) else None
        if is_dataclass(mine) and not isinstance(mine, type):
            if inner := differences(mine, theirs):
                out[field.name] = inner
        elif type(own) is not type(base) or mine != theirs or type(mine) is not type(theirs):
            out[field.name] = mine
    return out
