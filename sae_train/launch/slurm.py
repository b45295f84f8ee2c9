"""Jobs of a Slurm cluster, by a batch script that says everything it does (`script.py`).

`sbatch` takes the script, `squeue` says what waits and runs, the job's own legs (`record.py`) say how it
ended, and `sacct` is asked only about jobs that were ended from outside. Only options and commands that are
the same from Slurm 22.05 on are used, and none of `sacct` where there is no database behind it.

Why not submitit, or Hydra's launcher on top of it: they pickle Python calls, which this package has no place
for (nothing is run because a file says so); they know states from `sacct` alone; they requeue from a handler
of their own in the process, where this package's commands have theirs, leave SIGTERM, with which Slurm
preempts, unanswered, and would hide the command that a reader of `scontrol show job` looks for.
"""

import logging
import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from sae_train.errors import InputError, StoppedEarly
from sae_train.files import write_bytes
from sae_train.launch.base import LAUNCHERS, STOPPED, Job, Started, State, state_of
from sae_train.launch.config import LaunchConfig, check_name
from sae_train.launch.record import LOGS, Legs, read_legs, write_jobs
from sae_train.launch.script import batch_script
from sae_train.redact import refuse_secrets

WAITING = {"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT", "SUSPENDED"}
"""Of squeue's states; what else it lists is running, or about to end."""
LISTED = {"RUNNING", "COMPLETING", "CONFIGURING", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED"}
"""States in sacct of jobs that are not over."""
COMMAND_TIMEOUT_S = 120
"""Slurm's commands try for a while themselves when the controller is busy."""
OF_A_JOB = ("SLURM_", "SBATCH_", "SRUN_", "TORCHELASTIC_", "PMI_", "PMIX_")
"""Variables of a job that this process may itself be part of; the new job is none of its business."""

logger = logging.getLogger("sae_train.launch")


@LAUNCHERS.register("slurm", LaunchConfig)
class Slurm:
    """Submits jobs to the Slurm cluster that this host belongs to."""

    name = "slurm"
    FRESH_S = 5.0
    """The controller is asked no more often: all users of the cluster wait for it."""

    def __init__(self, config: LaunchConfig) -> None:
        self.config = config
        self._told = False
        self._over: dict[str, State] = {}
        self._listed: tuple[float, dict[str, str]] = 0.0, {}

    def submit(self, jobs: Sequence[Job], folder: Path, after: Sequence[str] = ()) -> list[Started]:
        if not jobs:
            return []
        folder = folder.absolute()
        for job in jobs:
            check_name(job.name)
            refuse_secrets(list(job.args), f"job {job.name}")
        refuse_secrets(asdict(self.config), "launch")
        logs = folder / LOGS
        config = self.config
        if all(job.alone for job in jobs):
            gpus = min(1, config.gpus_per_node)
            config = replace(config, nodes=1, gpus_per_node=gpus, processes_per_node=1)
        text = batch_script(config, jobs, logs, Path.cwd(), after)
        logs.mkdir(parents=True, exist_ok=True)
        self._listed = 0.0, {}
        answer = _command("sbatch", "--parsable", script=text)
        number = answer.split(";")[0].strip()  # NUMBER, or NUMBER;CLUSTER
        ids = [number] if len(jobs) == 1 else [f"{number}_{i}" for i in range(len(jobs))]
        taken = [Started(job, id, logs / f"slurm-{id}.log") for job, id in zip(jobs, ids, strict=True)]
        try:
            write_bytes(logs / f"slurm-{number}.sh", text.encode())
            write_jobs(folder, self.name, taken)
        except OSError:
            _command("scancel", number)  # nobody would find them again
            raise
        return taken

    def states(self, started: Sequence[Started]) -> list[State]:
        queued = self._queue() if started else {}
        # Read after the queue: a job that it did not list has written its last line by now.
        legs = {one.id: read_legs(one.log) for one in started if one.id not in queued}
        unclear = [id for id, leg in legs.items() if leg.code != 0 and id not in self._over]
        told = self._accounts(unclear) if unclear else {}
        for id, leg in legs.items():
            if leg.code == 0:
                self._over[id] = "done"
            elif leg.code is None and told.get(id) == "running":
                queued[id] = "RUNNING"  # it is not: who keeps the accounts has not heard of its end yet
            elif id not in self._over:
                self._over[id] = _ended(leg, told.get(id))
        return [self._over[one.id] if one.id not in queued else _listed(queued[one.id]) for one in started]

    def cancel(self, started: Sequence[Started]) -> None:
        self._listed = 0.0, {}
        if started:
            _command("scancel", *(one.id for one in started))

    def leave(self) -> None:
        """They do not need us."""

    def _queue(self) -> dict[str, str]:
        """id -> state of every job of ours that the controller has on its list, at most `FRESH_S` ago."""
        when, listed = self._listed
        if when and time.monotonic() - when < self.FRESH_S:
            return dict(listed)
        user = f"--user={os.getuid()}"
        try:
            text = _command("squeue", "--noheader", "--array", user, "--format=%i %T")
        except InputError as error:
            raise StoppedEarly(f"{error}; jobs go on, and the same command looks again") from None
        listed = {words[0]: words[1] for words in map(str.split, text.splitlines()) if len(words) == 2}
        for id in listed:
            self._over.pop(id, None)  # somebody has put it back into the queue
        self._listed = time.monotonic(), listed
        return dict(listed)

    def _accounts(self, ids: list[str]) -> dict[str, State]:
        """What Slurm's database has on jobs, where there is one: who ended them, if not they themselves."""
        own = ["--noheader", "--parsable2", "--allocations", "--format=JobID,State,ExitCode"]
        try:
            text = _command("sacct", *own, f"--jobs={','.join(ids)}")
        except InputError as error:
            if not self._told:
                logger.warning(
                    "a job that somebody ended counts as failed or stopped: no accounts (%s)", error
                )
            self._told = True
            return {}
        lines = (line.split("|") for line in text.splitlines() if line.count("|") == 2)
        return {id: _accounted(state.split(" ")[0], code.partition(":")[0]) for id, state, code in lines}


def _listed(state: str) -> State:
    return "waiting" if state in WAITING else "running"


def _ended(legs: Legs, told: State | None) -> State:
    """Of a job that is over, what the accounts or it itself say."""
    if told is not None and told != "running":
        return told
    if legs.starts == 0:
        return "cancelled"
    return "failed" if legs.code is None else state_of(legs.code)


def _accounted(state: str, code: str) -> State:
    """A state of sacct as one of ours."""
    if state in LISTED or state in WAITING:
        return "running"
    if state == "COMPLETED":
        return "done"
    if state == "CANCELLED":
        return "cancelled"
    return "stopped" if state == "FAILED" and code == str(STOPPED) else "failed"


def _command(*words: str, script: str | None = None) -> str:
    """What a command of Slurm prints.

    Raises:
        InputError: it is not there, or refuses; with its own words.
    """
    env = {name: value for name, value in os.environ.items() if not name.startswith(OF_A_JOB)}
    env |= {name: os.environ[name] for name in ("SLURM_CONF",) if name in os.environ}
    try:
        done = subprocess.run(
            words, input=script or "", capture_output=True, text=True, env=env, timeout=COMMAND_TIMEOUT_S
        )
    except FileNotFoundError:
        raise InputError(
            "launch", "slurm", f"a host of a Slurm cluster; there is no {words[0]} here"
        ) from None
    except subprocess.TimeoutExpired:
        raise InputError(
            "launch", "slurm", f"a cluster that answers; {words[0]} did not in {COMMAND_TIMEOUT_S} s"
        ) from None
    if done.returncode:
        said = " ".join(line.strip() for line in done.stderr.splitlines() if line.strip())
        raise InputError("launch", "slurm", f"what this cluster takes; {said or words[0] + ' fails'}")
    return done.stdout
