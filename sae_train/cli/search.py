"""`sae-train sweep sweep.trials=N`: Optuna suggests SAEs, runs train them, the journal remembers.

One process asks, trains and tells by itself, in batches that share a harvest. Several (`sweep.workers`), as
processes of this machine or as an array of the cluster's, do the same beside each other: the journal is all
that they share, and the shards, where batches would harvest the same rows.
"""

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from sae_train import stop
from sae_train.cli.folder import Ownership, owned
from sae_train.cli.signals import StopSignals
from sae_train.cli.sweep_setting import Setting, keep_record, launcher_for, names_of_rows
from sae_train.errors import InputError, StoppedEarly
from sae_train.launch.config import LaunchConfig
from sae_train.sweep.drive import Driver, is_harvested, last_line
from sae_train.sweep.points import Point, point
from sae_train.sweep.results import ranked
from sae_train.sweep.runs import Harvest, Layout, Rows, Run, harvest_key, harvest_of, run_of
from sae_train.sweep.study import Batch, Search, check_optuna, labels_of
from sae_train.sweep.summary import summarise
from sae_train.sweep.wandb_file import write_wandb


@dataclass(frozen=True)
class Task:
    """A search, checked.

    Attributes:
        first: a point of it. harvest: the rows that all runs read, if they share any.
    """

    setting: Setting
    folder: Path
    first: Point
    harvest: Harvest | None

    @property
    def shards(self) -> Path | None:
        return self.folder / self.harvest.name if self.harvest is not None else None


def search(setting: Setting) -> int:
    """Run a search, or one worker's part of it; returns the exit code."""
    config = setting.config
    ends = corners(setting)
    if config.wandb is not None:
        path = Path(config.wandb).expanduser()
        write_wandb(
            path, setting.fixed, setting.axes, config, ends[0].config.run.name, ends[0].members[0].name
        )
        print(f"wandb sweep --project {ends[0].config.logger.wandb_project} {path}")
        return 0
    check_optuna()
    folder = setting.folder(ends[0])
    task = Task(setting, folder, ends[0], shared_rows(setting, ends, folder))
    if config.worker is not None:
        with StopSignals() as signals:
            signals.defer()
            work(task)
        return 0
    launch = setting.launch_config(ends[0])
    if launch.name != "local" and (launch.nodes > 1 or launch.tasks_per_node > 1):
        raise InputError(
            "launch", f"{launch.nodes} nodes x {launch.tasks_per_node} processes", "1 x 1 with sweep.trials"
        )
    with owned("sweep.dir", folder):
        keep_record(folder, setting, {})
        return conducted(task, launch)


def conducted(task: Task, launch: LaunchConfig) -> int:
    """Harvest, have workers search, sum up; returns the exit code."""
    config, folder = task.setting.config, task.folder
    here = launch.name == "local"
    with StopSignals() as signals:
        signals.defer()
        found = Search(folder, config, task.setting.axes, task.first.config.train.steps)
        if not found.is_over():
            if here and config.workers == 1:
                if task.harvest is not None and not is_harvested(folder, task.harvest.name):
                    harvest_first(task, Driver(launcher_for(launch), folder))
                work(task)
            else:
                driver = Driver(launcher_for(launch, config.workers if here else None), folder)
                driver.start(workers(task))
                if not here:
                    ids = ", ".join(one.id for one in driver.started.values())
                    print(f"jobs {ids} search; sae-train status run={folder} shows them")
                    print("the same command, once they are done, sums up")
                    return 0
                driver.wait()
    rows = found.rows()
    ranking = ranked(rows, config)
    best = None
    if ranking:
        best = point(task.setting.fixed, task.setting.axes, ranking[0].values, task.setting.compose)
    summarise(task.setting.summary(folder, task.first), rows, best, task.setting.compose)
    if not found.is_over():
        raise StoppedEarly(f"{folder}: {len(rows)} of {config.trials} trials; the same command continues")
    return 0 if any(row.status == "done" for row in rows) else 1


def harvest_first(task: Task, driver: Driver) -> None:
    """Write the rows that all runs read."""
    assert task.harvest is not None
    driver.harvest(task.harvest)
    states = driver.wait()
    if states[task.harvest.name] != "done":
        raise StoppedEarly(f"{task.harvest.name}: {last_line(driver.started[task.harvest.name].log)}")


def workers(task: Task) -> Layout:
    """The workers as jobs, which wait for the harvest."""
    config = task.setting.config
    args = [
        one for one in task.setting.args if not one.startswith(("sweep.workers=", "sweep.dir=", "launch"))
    ]
    more = [f"sweep.dir={task.folder}", f"sweep.workers={config.workers}"]
    shards = None if task.harvest is None else 0
    runs = [
        Run(f"worker-{i}", ("sweep", *args, *more, f"sweep.worker={i}"), {}, shards)
        for i in range(config.workers)
    ]
    return Layout(tuple(runs), (task.harvest,) if task.harvest is not None else ())


def work(task: Task) -> None:
    """Ask, train and tell until nothing is left."""
    setting, folder = task.setting, task.folder
    mine = Search(folder, setting.config, setting.axes, task.first.config.train.steps)
    while (batch := mine.next_batch(hold)) is not None:
        with batch.held:
            stop.check()
            if (run := run_for(task, batch, mine)) is None:
                continue
            driver = Driver(launcher_for(LaunchConfig()), folder, folder / "batches" / batch.run)
            mine.train(batch, run, driver)


def hold(folder: Path) -> AbstractContextManager[Ownership]:
    """A batch is its worker's until that ends."""
    return owned("sweep.dir", folder)


def run_for(task: Task, batch: Batch, search: Search) -> Run | None:
    """The run that trains a batch; trials that cannot be are told so. None: none of them can."""
    setting = task.setting
    points: list[Point] = []
    for trial in list(batch.trials):
        try:
            points.append(point(setting.fixed, setting.axes, search.values(trial.params), setting.compose))
        except InputError as error:
            search.fail(trial, str(error))
            batch.trials.remove(trial)
    if not points:
        return None
    labels = labels_of([trial.number for trial in batch.trials], setting.config.batch)
    return run_of(batch.run, points, labels, task.folder, task.shards, setting.compose, names_of_rows)


def corners(setting: Setting) -> list[Point]:
    """A point, and for each axis what else it can have: what a search can meet, checked before it starts.

    Raises:
        InputError: a value that `train` would refuse, or something that a search cannot do.
    """
    ends = [axis.ends() for axis in setting.axes]
    middle = [one[0] for one in ends]
    combinations = [middle]
    for i, values in enumerate(ends):
        combinations += [[*middle[:i], value, *middle[i + 1 :]] for value in values[1:]]
    found = [point(setting.fixed, setting.axes, values, setting.compose) for values in combinations]
    if len(found[0].members) != 1:
        raise InputError(
            "sweep.trials", setting.config.trials, "one SAE for each trial: no saes, grid or list of hooks"
        )
    apart = sorted({p.rest() for p in found})
    if len(apart) > 1 and setting.config.batch > 1:
        guilty = next(
            axis.key
            for axis, values in zip(setting.axes, ends, strict=True)
            if len({p.rest() for p in found if p.values in _along(middle, values, setting.axes.index(axis))})
            > 1
        )
        wanted = f"1: {guilty} is of the run, not of the SAE, so that trials cannot share one"
        raise InputError("sweep.batch", setting.config.batch, wanted)
    return found


def _along(middle: Sequence[str], values: Sequence[str], i: int) -> set[tuple[str, ...]]:
    return {(*middle[:i], value, *middle[i + 1 :]) for value in values}


def shared_rows(setting: Setting, ends: Sequence[Point], folder: Path) -> Harvest | None:
    """What is harvested once for all trials; None: each run harvests for itself."""
    config = setting.config
    keys = {harvest_key(p.config) for p in ends}
    alike = len(keys) == 1 and None not in keys
    if config.share is True and not alike:
        raise InputError("sweep.share", True, "auto: not all trials would harvest the same rows from a model")
    several = (config.trials or 0) > config.batch
    if config.share is False or not alike or not (several or config.share is True):
        return None
    rows = Rows(ends[0])
    rows.add(ends)
    print(f"rows are harvested once, to {folder / 'shards'}", file=sys.stderr)
    return harvest_of(rows, None, folder, names_of_rows)
