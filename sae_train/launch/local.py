"""Jobs as processes of this machine, a few at a time.

Each job is a process with a session of its own, so that Ctrl-C reaches only the command that launched it,
which asks the jobs to save (`leave`). Should that command be killed, jobs go on: who continues it finds them
in the record, counts them among those that run, and cannot know how they ended, only that they did; then they
are `stopped`, and the same command either continues the run or says that it is finished.

On a machine with GPUs a job sees one of them, another one than the jobs beside it.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from sae_train.errors import InputError
from sae_train.launch.base import IN_A_JOB, LAUNCHERS, Job, Started, State, state_of
from sae_train.launch.config import LaunchConfig, check_name
from sae_train.launch.record import LOGS, add_end, add_start, read_legs, write_jobs

PROGRAM = (sys.executable, "-P", "-m", "sae_train")
"""This installation, whatever PATH says, and nothing from the working directory."""


@dataclass
class _Running:
    """A process of ours."""

    process: subprocess.Popen[bytes]
    slot: int


@LAUNCHERS.register("local", LaunchConfig)
class Local:
    """Starts jobs here, at most `launch.parallel` at a time, in the order in which they came."""

    name = "local"

    def __init__(self, config: LaunchConfig) -> None:
        self.parallel = config.parallel or 1
        self._given: dict[Path, tuple[Started, tuple[str, ...]]] = {}
        """By log: ids are unique in one folder only."""
        self._known: set[Path] = set()
        self._running: dict[Path, _Running] = {}
        self._ended: dict[Path, State] = {}

    def submit(self, jobs: Sequence[Job], folder: Path, after: Sequence[str] = ()) -> list[Started]:
        folder = folder.absolute()
        logs = folder / LOGS
        taken = []
        for job in jobs:
            check_name(job.name)
            taken.append(Started(job, job.name, logs / f"{job.name}.log"))
            if taken[-1].log in self._running or _stranger(taken[-1].log) is not None:
                raise InputError("job", job.name, "a job that is not running")
        logs.mkdir(parents=True, exist_ok=True)
        write_jobs(folder, self.name, taken)
        for one in taken:
            self._ended.pop(one.log, None)
            self._given[one.log] = one, tuple(after)
        self._go_on()
        return taken

    def states(self, started: Sequence[Started]) -> list[State]:
        self._known |= {one.log for one in started}
        self._go_on()
        return [self._state(one.log) for one in started]

    def cancel(self, started: Sequence[Started]) -> None:
        self._go_on()
        for one in started:
            if one.log in self._running:
                self._running[one.log].process.terminate()
            elif (stranger := _stranger(one.log)) is not None:
                stranger.terminate()
            elif self._state(one.log) == "waiting":
                self._ended[one.log] = "cancelled"

    def leave(self) -> None:
        self._go_on(start=False)
        for one in self._running.values():
            one.process.terminate()
        for one in self._running.values():
            one.process.wait()
        self._go_on(start=False)

    def _state(self, log: Path) -> State:
        if log in self._running:
            return "running"
        if log in self._ended:
            return self._ended[log]
        if _stranger(log) is not None:
            return "running"
        if log in self._given:
            return "waiting"
        legs = read_legs(log)
        if legs.starts == 0:
            return "cancelled"  # who would have started it is gone
        return "stopped" if legs.code is None else state_of(legs.code)

    def _go_on(self, start: bool = True) -> None:
        """Note what has ended, and start what may start."""
        for log, running in list(self._running.items()):
            if (code := running.process.poll()) is not None:
                del self._running[log]
                add_end(log, code)
                self._ended[log] = state_of(code)
        if not start:
            return
        waiting = [log for log in self._given if self._state(log) == "waiting"]
        busy = sum(self._state(log) == "running" for log in self._known | self._given.keys())
        for log in waiting:
            one, after = self._given[log]
            before = [self._state(log.with_name(f"{name}.log")) for name in after]
            if any(state in ("stopped", "failed", "cancelled") for state in before):
                self._ended[log] = "cancelled"
            elif busy < self.parallel and all(state == "done" for state in before):
                self._start(one)
                busy += 1

    def _start(self, one: Started) -> None:
        taken = {running.slot for running in self._running.values()}
        slot = next(i for i in range(len(taken) + 1) if i not in taken)
        env = os.environ | {IN_A_JOB: one.job.name}
        if gpus := visible_gpus():
            env["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
        with open(one.log, "ab") as log:
            process = subprocess.Popen(
                [*PROGRAM, *one.job.args],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=env,
                start_new_session=True,
            )
        self._running[one.log] = _Running(process, slot)
        add_start(one.log, process.pid)


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may name here, one by one."""
    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    if told is None:
        return [str(i) for i in range(torch.cuda.device_count())]
    return [name.strip() for name in told.split(",") if name.strip()]


def _stranger(log: Path) -> psutil.Process | None:
    """The process that runs a job for somebody else, if it lives: a command that was killed has left it."""
    legs = read_legs(log)
    if legs.starts == 0 or legs.code is not None or legs.host != os.uname().nodename:
        return None
    try:
        process = psutil.Process(legs.process)
        own = "sae_train" in process.cmdline()  # nobody's, of one that has ended and was not waited for
    except psutil.Error:  # it is gone, or not ours to look at
        return None
    return process if own else None
