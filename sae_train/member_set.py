"""Which SAEs one run trains on one harvest: one per hook, named members, a grid, or a grid of named members.

    saes={narrow: {}, gated: {sae: {name: gated}}, jump: {sae: {activation: {name: jumprelu, target_l0: 32}}}}
    grid={k: [16, 32, 64], lr: [1e-3, 2e-3], seed: [0, 1]}

A member is what differs from the run's own recipe. One that names another architecture or activation gets
its keys, with the run's values where both have a key and its defaults where not. A grid makes a member of
every combination, named after it: `k16-lr0.001-seed0`. Its k is the target L0 of an activation without one.
"""

import copy
import itertools
import re
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sae_train.activations.base import ACTIVATIONS
from sae_train.config import VALUE_KINDS, Config, check_seed, first_line
from sae_train.errors import InputError
from sae_train.registry import Registry
from sae_train.sae.base import SAES
from sae_train.train.members import MemberConfig

NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
SHORT = {
    "k": "sae.activation.k",
    "target_l0": "sae.activation.target_l0",
    "activation": "sae.activation.name",
    "architecture": "sae.name",
    "d_sae": "sae.d_sae",
    "expansion": "sae.expansion",
    "lr": "optim.lr",
    "lr_base": "optim.lr_base",
    "optimizer": "optim.name",
}
"""What a grid may call a key. Any other key of a member goes by its full name: `sae.auxk_coefficient`."""
MAX_MEMBERS = 1024
"""More is a slip: each keeps weights and optimizer state in memory."""


def members(config: Config, composed: DictConfig) -> list[MemberConfig]:
    """The SAEs of a run, each on top of the run's own recipe.

    Args:
        config: the typed configuration.
        composed: the same as Hydra composed it; what a member says is merged into parts of it.

    Raises:
        InputError: a hook, name, key or value that cannot be.
    """
    hooks = config.hook if isinstance(config.hook, list) else [config.hook]
    if not hooks:
        raise InputError("hook", config.hook, "at least one hook name such as resid_post.12")
    for hook in hooks:
        if not isinstance(hook, str) or not hook:
            raise InputError("hook", config.hook, "a hook name such as resid_post.12, or a list of them")
    if len(set(hooks)) < len(hooks):
        raise InputError("hook", config.hook, "each hook once")
    targets = _for_each(hooks, "target", config.target, "hook name")
    starts = _for_each(hooks, "start", config.start, "published SAE folder")
    if config.saes is not None and not isinstance(config.saes, dict):
        raise InputError(
            "saes", config.saes, "names with what differs: saes={a: {sae: {activation: {k: 16}}}, b: {}}"
        )
    if config.saes and len(hooks) > 1:
        told = [isinstance(differs, dict) and "hook" in differs for differs in config.saes.values()]
        if not all(told):
            raise InputError("hook", config.hook, "one hook beside saes; a member's own is saes.NAME.hook")
    if config.saes:
        wanted: dict[str, tuple[int, Any]] = {name: (0, differs) for name, differs in config.saes.items()}
    elif len(hooks) == 1:
        wanted = {"main": (0, {})}
    else:
        wanted = {re.sub(r"[^A-Za-z0-9._-]", "_", hook): (i, {}) for i, hook in enumerate(hooks)}
    if config.grid is not None:
        points = grid_points(config.grid)
        alone = list(wanted) == ["main"] and not config.saes
        wanted = {
            point if alone else f"{name}-{point}": (i, _merged(name, differs, more))
            for name, (i, differs) in wanted.items()
            for point, more in points.items()
        }
        if len(wanted) > MAX_MEMBERS:
            raise InputError("grid", config.grid, f"at most {MAX_MEMBERS} SAEs, not {len(wanted)}")
    by_l0 = config.grid is not None and "k" in config.grid
    return [
        _member(name, differs, (hooks[i], targets[i], starts[i]), config, composed, by_l0)
        for name, (i, differs) in wanted.items()
    ]


def grid_points(grid: Any) -> dict[str, dict[str, Any]]:
    """Every combination of a grid's values: its name -> what differs.

    Raises:
        InputError: not a mapping of keys to lists of different values, or values that no name can tell apart.
    """
    wanted = "keys with lists of values: grid={k: [16, 32], seed: [0, 1]}"
    if not isinstance(grid, dict) or not grid:
        raise InputError("grid", grid, wanted)
    for key, values in grid.items():
        if not isinstance(key, str) or not isinstance(values, list) or not values:
            raise InputError(f"grid.{key}", values, wanted)
    points: dict[str, dict[str, Any]] = {}
    for values in itertools.product(*grid.values()):
        chosen = dict(zip(grid, values, strict=True))
        name = "-".join(f"{key.rpartition('.')[2]}{_spelt(value)}" for key, value in chosen.items())
        if name in points:
            raise InputError("grid", grid, f"values that differ: two combinations are called {name}")
        differs: dict[str, Any] = {}
        for key, value in chosen.items():
            _put(differs, SHORT.get(str(key), str(key)), value)
        points[name] = differs
    return points


def _spelt(value: Any) -> str:
    """A value as part of a name."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return re.sub(r"[^A-Za-z0-9.+]", "_", text).replace("+", "")


def _put(tree: dict[str, Any], path: str, value: Any) -> None:
    """Set the key of a nested mapping that a dotted name stands for."""
    *parents, last = path.split(".")
    for part in parents:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise InputError("grid", path, "each key once, and none that is a part of another")
    if last in tree:
        raise InputError("grid", path, "each key once, by one of its names")
    tree[last] = value


def _merged(name: str, differs: Any, more: dict[str, Any]) -> dict[str, Any]:
    if differs is not None and not isinstance(differs, dict):
        raise InputError(f"saes.{name}", differs, "what differs: {sae: {activation: {k: 16}}}, or {}")
    merged: Any = OmegaConf.to_container(OmegaConf.merge(differs or {}, more))
    return dict(merged)


def _member(
    name: Any,
    differs: Any,
    where: tuple[str, str | None, str | None],
    config: Config,
    composed: DictConfig,
    by_l0: bool,
) -> MemberConfig:
    hook, target, start = where
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise InputError("saes", name, "member names of letters, digits, dots, dashes and underscores")
    if differs is not None and not isinstance(differs, dict):
        raise InputError(f"saes.{name}", differs, "what differs: {sae: {activation: {k: 16}}}, or {}")
    sae = _other(name, composed.sae, differs or {})
    if by_l0 and "k" not in sae.activation and "target_l0" in sae.activation:
        differs = copy.deepcopy(differs)
        differs["sae"]["activation"]["target_l0"] = float(differs["sae"]["activation"].pop("k"))
    base = OmegaConf.create(
        {"hook": hook, "target": target, "start": start, "seed": config.run.seed}
        | {"sae": sae, "optim": composed.optim}
    )
    OmegaConf.set_struct(base, True)
    try:
        typed = OmegaConf.to_object(OmegaConf.merge(base, differs or {}))
    except OmegaConfBaseException as error:
        if isinstance(error.__cause__, InputError):
            raise error.__cause__ from None
        raise _explained(name, differs, config.grid or {}, base, error) from None
    assert isinstance(typed, dict)
    check_seed(f"saes.{name}.seed", typed["seed"])
    if not isinstance(typed["hook"], str):
        raise InputError(f"saes.{name}.hook", typed["hook"], "one hook name such as resid_post.12")
    _for_each([hook], f"saes.{name}.target", typed["target"], "hook name")
    _for_each([hook], f"saes.{name}.start", typed["start"], "published SAE folder")
    return MemberConfig(
        name=name,
        hook=typed["hook"],
        seed=typed["seed"],
        sae=typed["sae"],
        optim=typed["optim"],
        target=typed["target"],
        start=typed["start"],
    )


def _explained(
    name: str, differs: Any, grid: dict[str, Any], base: DictConfig, error: OmegaConfBaseException
) -> InputError:
    """What is wrong with a key of a member, by the name under which the user gave it."""
    key = found.group(1) if (found := re.search(r"full_key: (\S+)", str(error))) else ""
    parent = key.rpartition(".")[0]
    near = OmegaConf.select(base, parent) if parent else base
    accepted = first_line(error)
    if kind := re.search(r"could not be converted to (\w+)", accepted):
        accepted = VALUE_KINDS.get(kind.group(1), kind.group(1))
    if accepted.startswith("Merge error"):
        accepted = "what differs: {sae: {activation: {k: 16}}}, or {}"
    if "not in" in accepted and isinstance(near, DictConfig):
        accepted = f"a key of {parent or 'a member'}: {', '.join(map(str, near))}"
    if short := next((given for given in grid if SHORT.get(given, given) == key), None):
        known = "" if parent else f"; or a short name: {', '.join(SHORT)}"
        return InputError(f"grid.{short}", grid[short], accepted + known)
    given = OmegaConf.select(OmegaConf.create(differs), key) if key else differs
    return InputError(f"saes.{name}.{key}" if key else f"saes.{name}", given, accepted)


def _other(name: str, own: DictConfig, differs: dict[str, Any]) -> DictConfig:
    """The run's own `sae`, made into the architecture and activation that a member names, if it does."""
    asked = differs.get("sae")
    if not isinstance(asked, dict):
        return own
    sae = copy.deepcopy(own)
    activation = sae.activation
    if isinstance(chosen := asked.get("activation"), dict) and "name" in chosen:
        activation = _as(f"saes.{name}.sae.activation", chosen["name"], activation, ACTIVATIONS)
    if "name" in asked:
        sae = _as(f"saes.{name}.sae", asked["name"], sae, SAES)
    sae.activation = activation
    return sae


def _as(key: str, name: Any, own: DictConfig, registry: Registry[Any]) -> DictConfig:
    """The configuration of `name`, with the values of `own` where both have a key."""
    if name not in registry:
        raise InputError(f"{key}.name", name, f"one of {', '.join(sorted(registry))}")
    if name == own.name:
        return own
    made = OmegaConf.structured(registry.config(name))
    for shared in own:
        if shared in made and shared not in ("name", "activation"):
            made[shared] = own[shared]
    return made


def _for_each(hooks: list[str], key: str, value: Any, wanted: str) -> list[str | None]:
    """A value of each hook, given one for all or a list.

    Raises:
        InputError: another number of them than there are hooks, or something that is no string.
    """
    values: list[str | None] = value if isinstance(value, list) else [value] * len(hooks)
    if len(values) != len(hooks) or not all(v is None or (isinstance(v, str) and v) for v in values):
        raise InputError(key, value, f"one {wanted} for each of {', '.join(hooks)}, or null")
    return values
