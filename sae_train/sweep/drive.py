"""Runs through a launcher: start what is not done, wait, say what happens; a sweep killed half way goes on.

What is done is asked of the runs themselves (`run.json`, `harvest.json`), and what is under way of the
launcher's record, so whoever continues needs to remember nothing and starts nothing twice.
"""

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from sae_train import stop
from sae_train.launch.base import Job, Launcher, Started, State
from sae_train.launch.record import read_jobs
from sae_train.redact import printable, redact
from sae_train.shards.disk import Harvest as ShardsOnDisk
from sae_train.sweep.runs import Harvest, Layout, Run
from sae_train.train.record import RunRecord

POLL_S = 0.3
UNDER_WAY = ("waiting", "running")
Watch = Callable[[], Iterable[str]]
"""Names of runs that shall end now, asked again and again while runs go on."""


def run_folder(folder: Path, run: str) -> Path:
    """Of a run of the sweep."""
    return folder / "runs" / run


def is_done(folder: Path, run: str) -> bool:
    """Whether a run has been trained, judged and reported."""
    record = RunRecord.read(run_folder(folder, run))
    return record is not None and record.status == "done"


def is_harvested(folder: Path, name: str) -> bool:
    """Whether a harvest of the sweep is whole."""
    found = ShardsOnDisk.read(folder / name)
    return found is not None and found.complete


class Driver:
    """The jobs of one sweep.

    Args:
        launcher: starts them.
        folder: of the sweep. jobs: where the launcher's record and the logs are; the sweep's own folder, or
            that of a batch.
    """

    def __init__(self, launcher: Launcher, folder: Path, jobs: Path | None = None) -> None:
        self.launcher, self.folder, self.jobs = launcher, folder, jobs or folder
        self.started: dict[str, Started] = {}
        self.before: dict[str, str] = {}
        """What jobs said last that an earlier command started and that failed."""
        self._told: dict[str, State] = {}
        self._again: set[str] = set()

    def start(self, layout: Layout) -> None:
        """Hand to the launcher what is neither done nor under way."""
        alive = self._under_way()
        for i in (None, *range(len(layout.harvests))):
            mine = [run for run in layout.runs if run.shards == i and not is_done(self.folder, run.name)]
            after = self.harvest(layout.harvests[i]) if i is not None and mine else None
            for run in mine:
                if run.name in alive:
                    self._adopt(alive[run.name])
            self._submit([run for run in mine if run.name not in alive], after)

    def harvest(self, harvest: Harvest) -> str | None:
        """Start a harvest that is neither done nor under way; the id to wait for, or None if it is done."""
        if is_harvested(self.folder, harvest.name):
            return None
        alive = self._under_way()
        if harvest.name in alive:
            self._adopt(alive[harvest.name])
        else:
            (one,) = self.launcher.submit([Job(harvest.name, harvest.args, alone=True)], self.jobs)
            self.started[harvest.name] = one
        return self.started[harvest.name].id

    def _under_way(self) -> dict[str, Started]:
        """Jobs of an earlier command that wait or run."""
        known = {one.job.name: one for one in read_jobs(self.jobs).get(self.launcher.name, [])}
        states = dict(zip(known, self.launcher.states(list(known.values())), strict=True))
        self.before |= {n: last_line(one.log) for n, one in known.items() if states[n] == "failed"}
        return {name: one for name, one in known.items() if states[name] in UNDER_WAY}

    def _adopt(self, one: Started) -> None:
        self.started[one.job.name] = one
        self._again.add(one.job.name)

    def _submit(self, runs: Sequence[Run], after: str | None) -> None:
        if runs:
            jobs = [Job(run.name, run.args) for run in runs]
            for one in self.launcher.submit(jobs, self.jobs, [after] if after is not None else []):
                self.started[one.job.name] = one

    def states(self) -> dict[str, State]:
        """How each job is that this sweep has under way or has seen end."""
        found = self.launcher.states(list(self.started.values()))
        return dict(zip(self.started, found, strict=True))

    def wait(self, watch: Watch = tuple) -> dict[str, State]:
        """Until every job has ended.

        Args:
            watch: runs that shall save and end.

        Raises:
            Interrupted: this process was asked to stop; jobs of this machine have saved and ended.
        """
        asked: set[str] = set()
        try:
            while True:
                states = self.states()
                self._tell(states)
                if "running" not in states.values() and not self._restarted(states):
                    if not any(state == "waiting" for state in states.values()):
                        return states
                    if self._stuck(states):
                        self.launcher.cancel(list(self.started.values()))
                ending = [n for n in watch() if states.get(n) == "running" and n not in asked]
                if ending:
                    self.launcher.cancel([self.started[name] for name in ending])
                    asked.update(ending)  # once: a second signal would end a run that is saving
                stop.sleep(POLL_S)
        except stop.Interrupted as error:
            raise stop.Interrupted(
                f"{error}: runs on this machine have saved; the same command continues"
            ) from None
        finally:
            self.launcher.leave()

    def _restarted(self, states: dict[str, State]) -> bool:
        """Start once more what an earlier command left running and what has ended since, not done: nobody can
        know how."""
        lost = [name for name in self._again if states[name] == "stopped" and not is_done(self.folder, name)]
        self._again.clear()
        for name in lost:
            self.started[name] = self.launcher.submit([self.started[name].job], self.jobs)[0]
        return bool(lost)

    def _stuck(self, states: dict[str, State]) -> bool:
        """Whether what others wait for has ended without being done."""
        return any(state in ("stopped", "failed", "cancelled") for state in states.values())

    def _tell(self, states: dict[str, State]) -> None:
        for name, state in states.items():
            if self._told.get(name) != state and state != "waiting":
                more = f": {last_line(self.started[name].log)}" if state in ("failed", "stopped") else ""
                when = time.strftime("%H:%M:%S")
                print(f"{when} {printable(name)} {state}{more}", file=sys.stderr)
            self._told[name] = state


def last_line(log: Path) -> str:
    """What a job said last, safe to print; of one that failed, why."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - 4096))
            lines = file.read().decode(errors="replace").strip().splitlines()
    except OSError:
        return "no log"
    return printable(str(redact(lines[-1]))) if lines else "it said nothing"
