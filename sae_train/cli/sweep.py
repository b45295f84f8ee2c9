"""sae-train sweep: many SAEs from one command, in as few harvests as they need.

    sae-train sweep experiment=demo sae.activation.k=16,32,64 optim.lr=1e-3,3e-3      # one run, six SAEs
    sae-train sweep experiment=demo train.batch_tokens=1024,2048 k=16,32              # two runs, one harvest
    sae-train sweep experiment=demo 'optim.lr=tag(log,interval(1e-4,1e-2))' sweep.trials=20 sweep.batch=4

`sae-train train -m` is the same. A sweep that was stopped or killed goes on with the same command.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from sae_train import stop
from sae_train.cli.compose import compose
from sae_train.cli.fit import device_bytes
from sae_train.cli.folder import owned
from sae_train.cli.plan import PlanOptions, planned
from sae_train.cli.search import search
from sae_train.cli.signals import StopSignals
from sae_train.cli.sweep_setting import Setting, keep_record, launcher_for, names_of_rows, take_apart
from sae_train.cli.train import train
from sae_train.config import to_config
from sae_train.devices import pick_device
from sae_train.errors import InputError
from sae_train.launch.base import State
from sae_train.launch.config import LaunchConfig
from sae_train.launch.record import read_jobs, read_legs
from sae_train.plan import make
from sae_train.sweep.axes import name_of
from sae_train.sweep.drive import Driver, is_done, last_line
from sae_train.sweep.points import Point, all_points, varies
from sae_train.sweep.results import Row, ranked, read_rows
from sae_train.sweep.runs import Layout, lay_out, run_of, sharing, side_by_side
from sae_train.sweep.summary import summarise
from sae_train.sweep.wandb_file import write_wandb


def run(args: list[str]) -> int:
    setting = take_apart(args)
    if setting.config.trials is not None:
        return search(setting)
    points = all_points(setting.fixed, setting.axes, setting.compose)
    if setting.config.wandb is not None:
        return for_wandb(setting, points[0])
    folder = setting.folder(points[0])
    launch = setting.launch_config(points[0])
    with owned("sweep.dir", folder):
        most = per_run(setting, points, launch)
        layout = layout_of(setting, points, folder, most)
        begun = keep_record(folder, setting, {"members_per_run": most})["members_per_run"]
        if begun != most:  # on a device with other room
            layout = layout_of(setting, points, folder, begun)
        announce(setting, layout, folder, points)
        return trained(setting, layout, points, folder, launch)


def layout_of(setting: Setting, points: Sequence[Point], folder: Path, most: int | None) -> Layout:
    """The runs of a sweep, with at most so many SAEs each. Raises InputError for too many runs."""
    groups = side_by_side(points, most)
    if len(groups) > setting.config.max_runs:
        wanted = f"at least {len(groups)} for so many runs, or fewer values"
        raise InputError("sweep.max_runs", setting.config.max_runs, wanted)
    keys = sharing(groups, setting.config.share)
    return lay_out(groups, setting.axes, keys, folder, setting.compose, names_of_rows)


def trained(
    setting: Setting, layout: Layout, points: Sequence[Point], folder: Path, launch: LaunchConfig
) -> int:
    """Run what is not done and sum up; returns the exit code."""
    if len(layout.runs) == 1 and not layout.harvests and launch.name == "local":
        (only,) = layout.runs
        if begun := not is_done(folder, only.name):
            stop.check()
            verb, *args = only.args
            train(compose(verb, args), list(only.args))  # here: what it shows is what there is to see
        return summed_up(setting, layout, points, folder, {}, table=not begun)
    launcher = launcher_for(launch)
    driver = Driver(launcher, folder)
    with StopSignals() as signals:
        signals.defer()
        driver.start(layout)
        if launch.name == "local":
            states = driver.wait()
        elif any(state in ("waiting", "running") for state in driver.states().values()):
            return submitted(driver, setting, layout, points, folder)
        else:
            states = driver.states()
    return summed_up(setting, layout, points, folder, states)


def submitted(driver: Driver, setting: Setting, layout: Layout, points: Sequence[Point], folder: Path) -> int:
    """Say what waits and runs elsewhere, and sum up what is done; returns 0."""
    told = {name: (state, driver.before.get(name, "")) for name, state in driver.states().items()}
    if driver.before or any(is_done(folder, run.name) for run in layout.runs):
        rows = read_rows(folder, layout.runs, told)
        summarise(setting.summary(folder, points[0]), rows, best_of(setting, rows, points), setting.compose)
    done = sum(is_done(folder, run.name) for run in layout.runs)
    ids = ", ".join(one.id for one in driver.started.values())
    print(f"{done} of {len(layout.runs)} runs done; jobs {ids} wait or run")
    print(f"sae-train status run={folder} shows them; the same command, once they are done, sums up")
    return 0


def summed_up(
    setting: Setting,
    layout: Layout,
    points: Sequence[Point],
    folder: Path,
    states: Mapping[str, State],
    table: bool = True,
) -> int:
    """Write what a sweep leaves; returns the exit code of the worst of its runs."""
    logs = {one.job.name: one.log for jobs in read_jobs(folder).values() for one in jobs}
    said = {
        name: (state, last_line(logs[name]))
        for name, state in states.items()
        if state != "done" and name in logs
    }
    for run in layout.runs:
        harvest = None if run.shards is None else layout.harvests[run.shards].name
        if harvest in said:
            said[run.name] = ("waiting", f"{harvest}: {said[harvest][1]}")
    rows = read_rows(folder, layout.runs, said)
    best = best_of(setting, rows, points)
    summarise(setting.summary(folder, points[0]), rows, best, setting.compose, table)
    bad = [name for name, state in states.items() if state != "done" and not is_done(folder, name)]
    codes = [abs(read_legs(logs[name]).code or 1) for name in bad if states[name] == "failed"]
    if codes:
        print(f"{len(codes)} runs failed; the same command tries them again", file=sys.stderr)
        return codes[0] if codes[0] in (2, 3) else 1
    return 75 if bad else 0


def best_of(setting: Setting, rows: Sequence[Row], points: Sequence[Point]) -> Point | None:
    """The point of the best SAE so far."""
    ranking = ranked(rows, setting.config)
    return next((point for point in points if ranking and point.values == ranking[0].values), None)


def per_run(setting: Setting, points: Sequence[Point], launch: LaunchConfig) -> int | None:
    """How many SAEs a run takes: as told, or as many as fit this device; None is no limit."""
    if setting.config.members_per_run is not None or launch.name != "local":
        return setting.config.members_per_run
    largest = max(side_by_side(points, None), key=len)
    count = len(largest)
    while count > 1 and not fits(setting, largest[:count]):
        count = -(-count // 2)
    return None if count == len(largest) else count * len(largest[0].members)


def fits(setting: Setting, group: Sequence[Point]) -> bool:
    """Whether the plan of a run of these points does not say that it cannot fit."""
    inner = [i for i in range(len(setting.axes)) if varies(i, group)]
    labels = [name_of([(setting.axes[i].label, point.values[i]) for i in inner]) for point in group]
    one = run_of("plan", group, labels, Path("plan"), None, setting.compose, names_of_rows)
    composed = compose("train", list(one.args[1:]))
    config = to_config(composed)
    room = device_bytes(pick_device(config.model.device), 1)
    return make(planned(config, composed, PlanOptions())).verdict(room) != "does not fit"


def announce(setting: Setting, layout: Layout, folder: Path, points: Sequence[Point]) -> None:
    """In a line, what is made of the axes."""
    saes = sum(len(run.members) for run in layout.runs)
    keys = ", ".join(axis.key for axis in setting.axes)
    if len(layout.runs) == 1:
        text = f"{saes} SAEs in one run, on one harvest: only what is of an SAE varies ({keys})"
    else:
        text = f"{saes} SAEs in {len(layout.runs)} runs ({keys})"
        for harvest in layout.harvests:
            count = sum(
                run.shards is not None and layout.harvests[run.shards] is harvest for run in layout.runs
            )
            text += f"; {count} of them read {folder / harvest.name}, harvested once"
    print(text, file=sys.stderr)


def for_wandb(setting: Setting, point: Point) -> int:
    """Write the sweep for `wandb sweep`; returns 0."""
    if len(point.members) != 1:
        raise InputError(
            "sweep.wandb", setting.config.wandb, "one SAE for each run: no saes, grid or list of hooks"
        )
    path = Path(str(setting.config.wandb)).expanduser()
    name = point.config.run.name
    write_wandb(path, setting.fixed, setting.axes, setting.config, name, point.members[0].name)
    print(f"wandb sweep --project {point.config.logger.wandb_project} {path}")
    return 0
