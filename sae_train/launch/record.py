"""What was launched, on disk: who started what, and how far each job is.

    FOLDER/jobs.json                what a launcher has taken, by name; replaced whole
    FOLDER/logs/slurm-17_3.log      what the job printed, all its starts one after the other
    FOLDER/logs/slurm-17_3.legs     a line for every start and every end, appended by whoever sees it

The legs say how a job ended where nobody else can: `sacct` needs a database that many clusters do not have,
and a process of this machine leaves its exit code to its parent alone.

    started 2026-11-22T02:31:53Z node7 4711
    ended 2026-11-22T06:29:58Z 75
"""

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sae_train.errors import InputError
from sae_train.files import CorruptFile, read_json, write_json
from sae_train.launch.base import Job, Started

JOBS = "jobs.json"
LOGS = "logs"
FORMAT = 1
MAX_LEGS_BYTES = 1 << 20


@dataclass(frozen=True)
class Legs:
    """A job's starts and ends so far.

    Attributes:
        starts: how often it was started.
        host, process: where its last start was, and as which process there.
        code: exit code of the last start; None while it runs, or if whoever would tell was killed with it.
    """

    starts: int = 0
    host: str = ""
    process: int = 0
    code: int | None = None


def legs_file(log: Path) -> Path:
    """Beside a job's log."""
    return log.with_suffix(".legs")


def read_legs(log: Path) -> Legs:
    """The starts and ends of the job that has this log; a line that is half written is passed over."""
    try:
        with open(legs_file(log), errors="replace") as file:
            text = file.read(MAX_LEGS_BYTES)
    except FileNotFoundError:
        return Legs()
    legs = Legs()
    for words in map(str.split, text.splitlines()):
        match words:
            case ["started", _, host, process] if process.isdecimal():
                legs = Legs(legs.starts + 1, host, int(process))
            case ["ended", _, code] if code.lstrip("-").isdecimal():
                legs = Legs(legs.starts, legs.host, legs.process, int(code))
    return legs


def add_start(log: Path, process: int) -> None:
    """Note that a job was started on this host."""
    _append(log, f"started {_now()} {socket.gethostname()} {process}")


def add_end(log: Path, code: int) -> None:
    """Note how it ended."""
    _append(log, f"ended {_now()} {code}")


def _append(log: Path, line: str) -> None:
    with open(legs_file(log), "a") as file:
        file.write(line + "\n")


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def write_jobs(folder: Path, launcher: str, started: Sequence[Started]) -> None:
    """Add jobs to the record; one whose name is there takes the place of the earlier one."""
    known = {record["name"]: record for record in _read(folder)}
    for one in started:
        known[one.job.name] = {
            "name": one.job.name,
            "args": list(one.job.args),
            "launcher": launcher,
            "id": one.id,
            "log": str(one.log.relative_to(folder)),
        }
    write_json(folder / JOBS, {"format": FORMAT, "jobs": list(known.values())})


def read_jobs(folder: Path) -> dict[str, list[Started]]:
    """launcher -> what it was given in this folder, in the order in which it was; {} if there is nothing.

    Raises:
        InputError: the record is not one that this release can read.
    """
    found: dict[str, list[Started]] = {}
    for record in _read(folder):
        job = Job(record["name"], tuple(record["args"]))
        found.setdefault(record["launcher"], []).append(Started(job, record["id"], folder / record["log"]))
    return found


def _read(folder: Path) -> list[dict[str, Any]]:
    path = folder / JOBS
    try:
        told = read_json(path)
    except FileNotFoundError:
        return []
    wanted = "what this release writes: who was given which jobs"
    if not isinstance(told, dict) or told.get("format") != FORMAT or not isinstance(told.get("jobs"), list):
        raise InputError(JOBS, str(path), wanted)
    for record in told["jobs"]:
        if not isinstance(record, dict) or not isinstance(record.get("args"), list):
            raise CorruptFile(path, "a job without arguments")
        texts = [*record["args"], *(record.get(key) for key in ("name", "launcher", "id", "log"))]
        if not all(isinstance(text, str) for text in texts):
            raise CorruptFile(path, "a job that is not described by text")
        if ".." in Path(record["log"]).parts or Path(record["log"]).is_absolute():
            raise CorruptFile(path, "a log outside its folder")
    jobs: list[dict[str, Any]] = told["jobs"]
    return jobs
