"""Where commands run: a launcher takes commands of `sae-train`, starts them somewhere, and says how they are.

A launcher knows nothing of SAEs: it gets command lines. What it started is written into a folder
(`record.py`), so that another process, or the same command after a kill, finds it again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from sae_train.registry import Registry

State = Literal["waiting", "running", "done", "stopped", "failed", "cancelled"]
"""Of a job. `stopped`: it saved and left with exit code 75, and nothing will start it again by itself."""
STOPPED = 75
"""Exit code of a command that saved and left: the same command continues."""
IN_A_JOB = "SAE_TRAIN_JOB"
"""Variable that a launcher sets for what it starts: there a command runs, and is not launched once more."""


@dataclass(frozen=True)
class Job:
    """One command.

    Attributes:
        name: unique in its folder; letters, digits, dots, dashes and underscores.
        args: what follows `sae-train` on the command line, verb first.
        alone: one process, with one GPU where the others have some: what harvests cannot share its work.
    """

    name: str
    args: tuple[str, ...]
    alone: bool = False


@dataclass(frozen=True)
class Started:
    """A job that a launcher has taken.

    Attributes:
        job: what was asked for.
        id: the launcher's own name for it: a Slurm job id such as 17_3, or the job's own name.
        log: where its output goes.
    """

    job: Job
    id: str
    log: Path


class Launcher(Protocol):
    """Starts jobs and says how they are."""

    name: str

    def submit(self, jobs: Sequence[Job], folder: Path, after: Sequence[str] = ()) -> list[Started]:
        """Take jobs, as one array where there are several and the launcher has arrays; returns at once.

        Args:
            jobs: what to run. One whose name is there already takes the place of the earlier one.
            folder: receives their logs and the record of what was started (`jobs.json`).
            after: ids of jobs that have to be done, successfully, before these start; if one of them is not,
                these are cancelled.

        Raises:
            InputError: the launcher is not there, or refuses what was asked for.
        """
        ...

    def states(self, started: Sequence[Started]) -> list[State]:
        """How each job is now. Where this process itself starts jobs, it does so here: ask again and again.

        Raises:
            StoppedEarly: the launcher does not answer. Jobs go on.
        """
        ...

    def cancel(self, started: Sequence[Started]) -> None:
        """Ask jobs to end: they save first if they can. Those that are over stay as they are."""
        ...

    def leave(self) -> None:
        """This process is about to end: jobs that go on without it do, others save, and are waited for."""
        ...


LAUNCHERS: Registry[Launcher] = Registry("launch")


def state_of(code: int) -> State:
    """How a command ended, by its exit code."""
    return "done" if code == 0 else "stopped" if code == STOPPED else "failed"
