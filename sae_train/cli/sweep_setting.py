"""What both kinds of sweep are set in: the command taken apart, the folder with its record, the launcher."""

import hashlib
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sae_train.cli.compose import Composer
from sae_train.cli.multirun import HYDRAS, MULTIRUN
from sae_train.config import Config, to_config
from sae_train.demo import resolve as demo
from sae_train.errors import InputError
from sae_train.files import CorruptFile, read_json, write_json
from sae_train.harvest.hooks import is_other, resolve
from sae_train.harvest.kinds import skeleton
from sae_train.harvest.model import load_config
from sae_train.harvest.second import of_second, second
from sae_train.launch.base import LAUNCHERS, Launcher
from sae_train.launch.config import LaunchConfig
from sae_train.ranks import started
from sae_train.redact import refuse_secrets
from sae_train.registry import discover
from sae_train.sweep.axes import Axis, parsed, read_axes
from sae_train.sweep.options import PREFIX, SweepConfig, read_options
from sae_train.sweep.points import Point
from sae_train.sweep.summary import Sweep

RECORD = "sweep.json"
FORMAT = 1


@dataclass(frozen=True)
class Setting:
    """A command taken apart.

    Attributes:
        args: all of it, without flags. fixed, axes: what is of `train`. launch: where jobs run.
        config: the sweep's own keys.
        compose: of `train`, from `fixed` and what a point adds.
    """

    args: tuple[str, ...]
    fixed: tuple[str, ...]
    axes: tuple[Axis, ...]
    launch: tuple[str, ...]
    config: SweepConfig
    compose: Composer

    @property
    def command(self) -> str:
        """The command that continues or repeats the sweep."""
        return "sae-train sweep " + shlex.join(self.args)

    def folder(self, point: Point) -> Path:
        """Of the sweep: as given, or named by what the command says."""
        if (told := self.config.folder) is not None:
            return told
        digest = hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()[:8]
        return Path("runs") / "sweeps" / f"{point.config.run.name}-{digest}"

    def identity(self) -> dict[str, Any]:
        """What may not change when a sweep is continued."""
        own = {"share": self.config.share, "members_per_run": self.config.members_per_run}
        if self.config.trials is not None:
            own |= {"search": True, "batch": self.config.batch, "l0": self.config.l0}
            own |= {"objective": self.config.objective, "l0_tolerance": self.config.l0_tolerance}
        axes = {axis.key: [*axis.ends(), axis.values is None, axis.log] for axis in self.axes}
        return {"fixed": sorted(self.fixed), "axes": axes, "sweep": own}

    def summary(self, folder: Path, point: Point) -> Sweep:
        """What the sweep's summary is of."""
        return Sweep(folder, point.config.run.name, self.command, self.config, self.axes)

    def launch_config(self, point: Point) -> LaunchConfig:
        """The keys of `launch`."""
        config: Config = to_config(self.compose([*point.overrides, *self.launch]))
        return config.launch


def take_apart(args: Sequence[str]) -> Setting:
    """Raises InputError for a flag, or for a key that is not for a sweep to have."""
    rest: list[str] = []
    own: list[str] = []
    launch: list[str] = []
    for arg in args:
        if arg in MULTIRUN:
            continue
        if arg.startswith("-"):
            raise InputError("sweep", arg, "key=value; flags are for sae-train train")
        key = parsed(arg).key_or_group
        if key.startswith(HYDRAS):
            wanted = "sweep.dir and launch=NAME; Hydra's own multirun is sae-train train -m with these keys"
            raise InputError(key, arg.partition("=")[2], wanted)
        if key == "run.dir":
            wanted = "sweep.dir=FOLDER, whose runs are in FOLDER/runs"
            raise InputError(key, arg.partition("=")[2], wanted)
        mine = own if key.startswith(PREFIX) else launch if key.split(".")[0] == "launch" else rest
        mine.append(arg)
    if started() > 1:
        wanted = "1: a sweep starts its runs itself; torchrun ... sae-train train 'grid={...}' shares one run"
        raise InputError("processes", started(), wanted)
    refuse_secrets(list(args), "sweep")  # the command is kept with the sweep
    config = read_options(own)
    fixed, axes = read_axes(rest)
    kept = tuple(one for one in args if one not in MULTIRUN)
    return Setting(kept, tuple(fixed), tuple(axes), tuple(launch), config, Composer("train"))


def keep_record(folder: Path, setting: Setting, chosen: dict[str, Any]) -> dict[str, Any]:
    """Write down what the sweep is; returns what was chosen when it was begun.

    Raises:
        InputError: the folder has a sweep of something else.
    """
    path = folder / RECORD
    identity = json.loads(json.dumps(setting.identity()))
    if path.exists():
        try:
            told = read_json(path)
        except (CorruptFile, OSError) as error:
            raise InputError(str(path), "damaged", f"a record written by this release ({error})") from None
        if (
            not isinstance(told, dict)
            or told.get("format") != FORMAT
            or not isinstance(told.get("chosen"), dict)
        ):
            raise InputError(str(path), "strange", "a record written by this release")
        if told.get("identity") != identity:
            wanted = f"a folder of its own; the sweep there is: {told.get('command')}"
            raise InputError("sweep.dir", str(folder), wanted)
        chosen = told["chosen"]
    record = {"format": FORMAT, "command": setting.command, "identity": identity, "chosen": chosen}
    write_json(path, record)
    return chosen


def launcher_for(config: LaunchConfig, parallel: int | None = None) -> Launcher:
    """What starts the jobs of a sweep."""
    discover("sae_train.launch")
    made: Launcher = LAUNCHERS.build(replace(config, parallel=parallel) if parallel else config)
    return made


def names_of_rows(config: Config, hooks: Sequence[str]) -> dict[str, str]:
    """Hooks as they are spelt -> the names that a harvest keeps their rows under. No weights are read."""
    other = demo(config.model.other) if config.model.other else None
    model = replace(config.model, name=demo(config.model.name), other=other)
    bare = {False: skeleton(load_config(model))}
    if any(map(is_other, hooks)):
        with of_second():
            bare[True] = skeleton(load_config(second(model)))
    return {hook: resolve(hook, bare[is_other(hook)]).key for hook in hooks}
