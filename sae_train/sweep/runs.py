"""The runs that points are trained in, as command lines: one for as many points as can share a harvest.

1. points that differ in what members may differ in only: one run trains them side by side (`saes=`);
2. several runs that would harvest the same rows: `harvest` writes these once, the runs read the shards;
3. everything else: a run of its own, which harvests for itself.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sae_train.config import Config, as_tree, to_config
from sae_train.errors import InputError
from sae_train.member_set import MAX_MEMBERS, members
from sae_train.sweep.axes import Axis, name_of, spelt
from sae_train.sweep.points import Compose, Point, differences, keys_of, text_of, varies
from sae_train.train.members import MemberConfig

RowsOf = Callable[[Config, Sequence[str]], dict[str, str]]
"""Hooks as the user spells them -> the names under which a harvest keeps their rows."""
GRID = "grid"
"""What the only run of a sweep is called."""
ONLY = "main"
"""What `members` calls an SAE that has no name of its own."""
MOST_TEXT = 100_000
"""Bytes of the argument that names a run's members: Linux takes 131,072."""


@dataclass(frozen=True)
class Run:
    """One run of a sweep.

    Attributes:
        name: of its folder, in SWEEP/runs.
        args: what follows `sae-train`.
        members: its SAEs: name -> the values of the axes.
        shards: index of the harvest that it reads; None: it harvests for itself.
    """

    name: str
    args: tuple[str, ...]
    members: dict[str, tuple[str, ...]]
    shards: int | None = None


@dataclass(frozen=True)
class Harvest:
    """Rows that several runs read.

    Attributes:
        name: of its folder, in SWEEP.
        args: what follows `sae-train`.
    """

    name: str
    args: tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """The runs of a sweep, and the harvests that they wait for."""

    runs: tuple[Run, ...]
    harvests: tuple[Harvest, ...] = ()


@dataclass
class Rows:
    """What one harvest has to hold for those that read it."""

    first: Point
    hooks: list[str] = field(default_factory=list)
    tokens: int = 0
    heldout: int = 0

    def add(self, points: Sequence[Point]) -> None:
        for point in points:
            for member in point.members:
                self.hooks += [hook for hook in member.places.hooks if hook not in self.hooks]
            self.tokens = max(self.tokens, point.config.train.tokens)
            self.heldout = max(self.heldout, point.config.eval.tokens)


def side_by_side(points: Sequence[Point], most: int | None) -> list[list[Point]]:
    """Points in the runs that train them, in order.

    Args:
        most: SAEs of one run. None: as many as a run takes.
    """
    groups: dict[str, list[list[Point]]] = {}
    for point in points:
        parts = groups.setdefault(point.rest(), [[]])
        held = sum(len(other.members) for other in parts[-1])
        if parts[-1] and held + len(point.members) > min(most or MAX_MEMBERS, MAX_MEMBERS):
            parts.append([])
        parts[-1].append(point)
    return [part for parts in groups.values() for part in parts]


def harvest_key(config: Config) -> str | None:
    """What rows are a function of, equal for runs that can share them; None: they cannot be shared."""
    if config.source.name != "stream" or config.train.loss != "rows":
        return None
    tree = as_tree(config)
    return text_of(
        {key: tree[key] for key in ("model", "corpus", "filter", "source")} | {"run": tree["run"]["threads"]}
    )


def sharing(groups: Sequence[Sequence[Point]], wanted: Any) -> list[str | None]:
    """For each run the key of the harvest that it shares, or None.

    Raises:
        InputError: shards were asked for, and a run cannot read any.
    """
    keys = [harvest_key(group[0].config) for group in groups]
    if wanted is False:
        return [None] * len(keys)
    if wanted is True:
        if None in keys:
            why = (
                "auto: runs with train.loss of the model's own, or with a source that is no model, share none"
            )
            raise InputError("sweep.share", True, why)
        return keys
    return [key if keys.count(key) > 1 else None for key in keys]


def lay_out(
    groups: Sequence[Sequence[Point]],
    axes: Sequence[Axis],
    keys: Sequence[str | None],
    folder: Path,
    compose: Compose,
    rows_of: RowsOf,
) -> Layout:
    """The command lines of all runs and harvests.

    Args:
        groups: points of each run (`side_by_side`). keys: of its harvest (`sharing`).
        folder: of the sweep.
    """
    order = list(dict.fromkeys(key for key in keys if key is not None))
    rows: list[Rows] = []
    for key in order:
        mine = [group for group, own in zip(groups, keys, strict=True) if own == key]
        rows.append(Rows(mine[0][0]))
        for group in mine:
            rows[-1].add(group)
    harvests = [harvest_of(one, i if len(rows) > 1 else None, folder, rows_of) for i, one in enumerate(rows)]
    every = [point for group in groups for point in group]
    apart = [i for i in range(len(axes)) if varies(i, every)]
    runs: list[Run] = []
    for group, rows_key in zip(groups, keys, strict=True):
        same = [i for i in apart if not varies(i, group)]
        name = name_of([(axes[i].label, group[0].values[i]) for i in same]) or GRID
        taken = {run.name for run in runs}
        name = next(
            one for one in (name, *(f"{name}.{i}" for i in range(2, len(taken) + 3))) if one not in taken
        )
        at = None if rows_key is None else order.index(rows_key)
        source = None if at is None else folder / harvests[at].name
        inner = [i for i in range(len(axes)) if varies(i, group)]
        labels = [name_of([(axes[i].label, point.values[i]) for i in inner]) for point in group]
        runs.append(replace(run_of(name, group, labels, folder, source, compose, rows_of), shards=at))
    return Layout(tuple(runs), tuple(harvests))


def harvest_of(rows: Rows, number: int | None, folder: Path, rows_of: RowsOf) -> Harvest:
    """The command that writes the rows of several runs."""
    name = "shards" if number is None else f"shards-{number}"
    keys = list(dict.fromkeys(rows_of(rows.first.config, rows.hooks).values()))
    args = [
        *_without(rows.first.overrides, ("saes", "grid")),
        *("saes=null", "grid=null", "target=null", "start=null", f"hook={spelt(keys)}"),
        *(f"train.tokens={rows.tokens}", f"eval.tokens={rows.heldout}", f"out={spelt(str(folder / name))}"),
    ]
    return Harvest(name, ("harvest", *args))


def run_of(
    name: str,
    group: Sequence[Point],
    labels: Sequence[str],
    folder: Path,
    shards: Path | None,
    compose: Compose,
    rows_of: RowsOf,
) -> Run:
    """The command that trains points side by side, proved to train just what each of them alone would.

    Args:
        labels: what the SAEs of each point are called; none for a single one.
        shards: where the rows are harvested to, if they are.
    """
    first = group[0]
    hooks = list(dict.fromkeys(hook for point in group for m in point.members for hook in m.places.hooks))
    named = {hook: hook for hook in hooks} if shards is None else rows_of(first.config, hooks)
    wanted: list[MemberConfig] = []
    values: dict[str, tuple[str, ...]] = {}
    for point, label in zip(group, labels, strict=True):
        for member in point.members:
            own = member.name if not label else label if member.name == ONLY else f"{member.name}-{label}"
            if own in values:
                raise InputError("sweep", own, "values that names can tell apart")
            values[own] = point.values
            target = None if member.target is None else _renamed(member.target, named)
            wanted.append(replace(member, name=own, hook=_renamed(member.hook, named), target=target))
    alone = len(group) == 1 and not labels[0] and all(hook == key for hook, key in named.items())
    args = list(first.overrides)
    if not alone:
        text = spelt({member.name: told(member, first.config) for member in wanted})
        if len(text) > MOST_TEXT:
            most = max(1, len(wanted) * MOST_TEXT // len(text) // 2)
            raise InputError(
                "sweep.members_per_run", None, f"at most about {most}: their names fill a command line"
            )
        args = [*_without(args, ("saes", "grid")), "saes=null", "grid=null", f"saes={text}"]
    if shards is not None:
        args += ["source.name=shards", f"source.path={spelt(str(shards))}"]
    config: Config = to_config(composed := compose(args))
    assert members(config, composed) == wanted, f"{name}: its members are not those of its points"
    return Run(name, ("train", *args, f"run.dir={spelt(str(folder / 'runs' / name))}"), values)


def told(member: MemberConfig, config: Config) -> dict[str, Any]:
    """What a member says of itself in `saes`: where it differs from the run's own keys."""
    out: dict[str, Any] = {}
    for key, mine, theirs in (
        ("hook", member.hook, config.hook),
        ("target", member.target, config.target),
        ("start", member.start, config.start),
        ("seed", member.seed, config.run.seed),
    ):
        if mine != theirs:  # as it does where there is one for each hook
            out[key] = mine
    out |= {
        key: inner
        for key, inner in (
            ("sae", differences(member.sae, config.sae)),
            ("optim", differences(member.optim, config.optim)),
        )
        if inner
    }
    return out


def _renamed(hook: str, names: dict[str, str]) -> str:
    return "+".join(names[part] for part in hook.split("+"))


def _without(overrides: Sequence[str], keys: tuple[str, ...]) -> list[str]:
    """The arguments but for those that set these keys, or anything in them."""
    return [
        one
        for one in overrides
        if not any(key == k or key.startswith(f"{k}.") for key in keys_of([one]) for k in keys)
    ]
