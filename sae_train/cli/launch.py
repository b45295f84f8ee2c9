"""A command that runs somewhere else: `launch=slurm` has `train` and `harvest` submit themselves, and return.

What is submitted is the command as it was given, with its folder spelt out, so that every start of the job
continues what the one before left there.
"""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from sae_train.cli.multirun import MULTIRUN
from sae_train.errors import InputError
from sae_train.launch.base import IN_A_JOB, LAUNCHERS, Job, Launcher, Started, State
from sae_train.launch.config import LaunchConfig
from sae_train.launch.record import JOBS, read_jobs
from sae_train.ranks import started
from sae_train.redact import printable
from sae_train.sweep.axes import spelt


def goes_elsewhere(config: LaunchConfig) -> bool:
    """Whether this process is to submit the command instead of running it."""
    return config.name != "local" and IN_A_JOB not in os.environ


def submit(config: LaunchConfig, args: Sequence[str], key: str, folder: Path) -> int:
    """Hand a command to a launcher, and say where to look; returns 0.

    Args:
        args: the command, verb first.
        key, folder: what it writes to: run.dir and the run's folder, or out and that of the shards.

    Raises:
        InputError: the launcher refuses it, or a job that writes there is waiting or running.
    """
    if multirun := sorted(set(MULTIRUN) & set(args)):
        wanted = "one run; sae-train sweep has a job for each of many"
        raise InputError("launch.name", f"{config.name} {multirun[0]}", wanted)
    if (size := started()) > 1:
        wanted = f"1: launch={config.name} starts launch.nodes x launch.processes_per_node processes itself"
        raise InputError("WORLD_SIZE", size, wanted)
    launcher: Launcher = LAUNCHERS.build(config)
    folder = folder.absolute()
    for other in states_in(folder):
        if other[1] in ("waiting", "running"):
            raise InputError(key, str(folder), f"a folder without a job; {other[0].id} is {other[1]}")
    whole = [arg for arg in args if arg.partition("=")[0] != key] + [f"{key}={spelt(str(folder))}"]
    try:
        (job,) = launcher.submit([Job(name_of(folder), tuple(whole))], folder)
    except OSError as error:
        raise InputError(key, str(folder), f"a folder that can be written ({error.strerror})") from None
    print(printable(f"submitted  job {job.id}: sae-train {shlex.join(whole)}", keep="\n"))
    print(printable(f"folder     {folder}"))
    print(printable(f"log        {job.log}"))
    print(printable(f"watch      sae-train status run={shlex.quote(str(folder))}"))
    if config.name == "slurm":
        print(f"end        scancel {job.id}")
    return 0


def states_in(folder: Path) -> list[tuple[Started, State]]:
    """Every job that was launched into a folder, and how it is now.

    Raises:
        InputError: the record is damaged, or names a launcher that this release does not have.
        StoppedEarly: a launcher does not answer.
    """
    found: list[tuple[Started, State]] = []
    for name, jobs in read_jobs(folder).items():
        if name not in LAUNCHERS:
            raise InputError(JOBS, name, f"one of {', '.join(LAUNCHERS)}")
        launcher: Launcher = LAUNCHERS.build(LaunchConfig(name=name))
        found += zip(jobs, launcher.states(jobs), strict=True)
    return found


def name_of(folder: Path) -> str:
    """What the job of a folder is called: as the folder, in letters that a job can have."""
    name = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in folder.name[:100])
    return name.lstrip(".-") or "run"
