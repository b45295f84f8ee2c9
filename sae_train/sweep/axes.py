"""The axes of a sweep, in Hydra's syntax for them: `key=1,2`, choice, range, and interval to search.

    sae.activation.k=16,32          optim.lr=choice(1e-3,3e-3)      train.batch_tokens=range(1024,5120,1024)
    optim.lr=tag(log,interval(1e-4,1e-2))    sae.activation.k=int(interval(8,64))     (with sweep.trials)

A grid's short names (k, lr, activation ...) are axes too. Where a file of conf/ stands for a choice the axis
picks the file, as `sae/activation=jumprelu` does, so that its other keys come along.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import (
    ChoiceSweep,
    Glob,
    IntervalSweep,
    Override,
    OverrideType,
    RangeSweep,
)
from hydra.errors import HydraException

from sae_train.errors import InputError
from sae_train.member_set import SHORT

FILES = {"activation": "sae/activation", "architecture": "sae", "optimizer": "optim"}
"""Short names whose values are files of conf/."""
ALIASES = SHORT | FILES | {"seed": "run.seed"}
K = "k"
"""Means something beside an activation only: its k, or the target L0 of one that has none."""
MAX_NAME = 80
"""Characters of a name made of values; folders are named by it."""


@dataclass(frozen=True)
class Axis:
    """What varies.

    Attributes:
        key: as the command says it: a short name, a group with slashes, or a dotted key.
        values: of a list: what it takes, in Hydra's spelling. None: it is searched between two ends.
        low, high, log, whole: of one that is searched.
    """

    key: str
    values: tuple[str, ...] | None
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False

    @property
    def label(self) -> str:
        """What it is called in tables: the last part of the key."""
        return re.split(r"[./]", self.key)[-1]

    @property
    def rises(self) -> bool:
        """Whether its values are numbers in order, so that neighbours are alike."""
        if self.values is None or len(self.values) < 3:
            return False
        try:
            numbers = [float(value) for value in self.values]
        except ValueError:
            return False
        return all(a < b for a, b in pairwise(numbers))

    def override(self, value: str) -> str:
        """The argument of `train` for one value; that of `k` is not one yet."""
        return f"{ALIASES.get(self.key, self.key)}={value}" if self.key != K else f"{K}={value}"

    def ends(self) -> tuple[str, ...]:
        """Values that between them show everything that can vary."""
        return self.values if self.values is not None else (self.spelt(self.low), self.spelt(self.high))

    def spelt(self, value: float) -> str:
        """A value between the ends as Hydra reads it."""
        return str(int(value)) if self.whole else repr(float(value))


def read_axes(args: Sequence[str]) -> tuple[list[str], list[Axis]]:
    """What a command keeps fixed, and what it varies.

    Raises:
        InputError: no axis, two of one key, or one that cannot be.
    """
    fixed: dict[int, tuple[str, str]] = {}
    axes: dict[str, Axis] = {}
    for place, arg in enumerate(args):
        override = parsed(arg)
        key = override.key_or_group
        full = ALIASES.get(key, key)
        if override.is_sweep_override():
            if full in axes:
                raise InputError(key, arg.partition("=")[2], f"each key once: {axes[full].key} is the same")
            axes[full] = _axis(override)
            fixed = {i: one for i, one in fixed.items() if one[0] != full}  # of two, the later one counts
        elif full in axes:
            raise InputError(key, arg.partition("=")[2], f"several values or one: {axes[full].key} varies it")
        else:
            short = key in ALIASES and key != K and override.type is OverrideType.CHANGE
            fixed[place] = full, f"{full}={arg.partition('=')[2]}" if short else arg
    if not axes:
        wanted = "at least one key with several values: sae.activation.k=16,32"
        raise InputError("sweep", " ".join(args), wanted)
    return [arg for _, arg in fixed.values()], list(axes.values())


def parsed(arg: str) -> Override:
    """One argument as Hydra understands it. Raises InputError."""
    try:
        return OverridesParser.create().parse_override(arg)
    except (HydraException, ValueError, TypeError, AttributeError, RecursionError):
        raise InputError(
            "override", arg, "key=value (quote values that hold spaces, commas or braces)"
        ) from None


def _axis(override: Override) -> Axis:
    key, told = override.key_or_group, override.value()
    text = override.get_value_string()
    if override.type is not OverrideType.CHANGE:
        raise InputError(key, text, "a key that is there: KEY=A,B, with no + or ~ before it")
    if isinstance(told, IntervalSweep):
        start, end = told.start, told.end
        assert start is not None and end is not None
        log = "log" in told.tags
        if not start < end or (log and start <= 0):
            raise InputError(key, text, "two ends, the smaller first" + (", above 0" if log else ""))
        return Axis(key, None, float(start), float(end), log, isinstance(start, int) and isinstance(end, int))
    if isinstance(told, Glob):
        raise InputError(key, text, "values by name: KEY=A,B")
    assert isinstance(told, ChoiceSweep | RangeSweep)
    if isinstance(told, ChoiceSweep) and any(isinstance(v, RangeSweep | IntervalSweep) for v in told.list):
        raise InputError(key, text, "plain values in a list, or one range")
    if told.shuffle:
        raise InputError(key, text, "values in order; runs do not depend on it")
    values = tuple(dict.fromkeys(override.sweep_string_iterator()))
    given = len(list(override.sweep_string_iterator()))
    if len(values) < given:
        raise InputError(key, text, "values that differ")
    if not values:
        raise InputError(key, text, "at least one value")
    return Axis(key, values)


def name_of(values: Sequence[tuple[str, str]]) -> str:
    """A name made of values, as a grid makes it: (label, value) ... -> `k16-lr0.001`."""
    name = "-".join(f"{label}{_plain(value)}" for label, value in values)
    if len(name) <= MAX_NAME:
        return name
    return f"{name[: MAX_NAME - 9]}-{hashlib.sha256(repr(values).encode()).hexdigest()[:8]}"


def _plain(value: str) -> str:
    """A value as part of a name."""
    text = value.strip("'\"")
    try:
        text = f"{float(text):g}" if not text.lstrip("-").isdecimal() else text
    except ValueError:
        text = text.rpartition("/")[2]
    return re.sub(r"[^A-Za-z0-9.+-]", "_", text).replace("+", "")


def spelt(value: Any) -> str:
    """A plain value as Hydra's command line reads it back."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {spelt(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(spelt, value)) + "]"
    if isinstance(value, str):
        return _quoted(str(value))
    return repr(value)


def _quoted(text: str) -> str:
    plain = re.fullmatch(r"[A-Za-z_][A-Za-z0-9_./-]*", text) is not None
    if plain and text.lower() not in ("null", "true", "false", "inf", "nan"):
        return text
    escaped = re.sub(r"(\\*)'", lambda m: m[1] * 2 + "\\'", text)
    escaped = re.sub(r"(\\+)$", lambda m: m[1] * 2, escaped)
    return f"'{escaped}'"
