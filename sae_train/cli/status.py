"""sae-train status run=DIR: how far a run is, at what rate, when it was last saved, and what its jobs do.

Of a folder with several runs, such as a sweep's, one line each.
"""

import json
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sae_train.checkpoint import Checkpointer
from sae_train.cli.folder import BEAT_S, DEAD_AFTER_BEATS, last_beat_s
from sae_train.cli.launch import states_in
from sae_train.errors import InputError, StoppedEarly
from sae_train.launch.base import Started
from sae_train.launch.record import JOBS, read_jobs, read_legs
from sae_train.redact import printable
from sae_train.registry import discover
from sae_train.train.record import RunRecord

TAIL_BYTES = 1 << 20
RUNS = "runs"
"""Where a folder with several runs has them, if not in itself."""
WIDTH = 160
"""Of a table that nobody looks at on a terminal."""


def run(args: list[str]) -> int:
    key, _, value = args[0].partition("=") if len(args) == 1 else ("", "", "")
    if key not in ("run", "dir") or not value:
        raise InputError("status", " ".join(args), "run=DIR and nothing else (or dir=DIR, of several runs)")
    folder = Path(value).expanduser()
    record = RunRecord.read(folder)
    jobs = jobs_in(folder)
    runs = {} if record is not None else runs_in(folder)
    if record is None and not runs and not jobs:
        raise InputError(key, str(folder), f"a run folder (it holds run.json), or one with runs or {JOBS}")
    if record is not None:
        show_run(folder, record)
    if runs or len(jobs) > 1:
        show_several(folder, runs, jobs)
    else:
        for job, state in jobs:
            count = read_legs(job.log).starts
            print(printable(f"job        {job.id}, {state}, started {count} times; log {job.log}"))
    return 0


def show_run(folder: Path, record: RunRecord) -> None:
    last = last_record(folder / "metrics.jsonl")
    saved = Checkpointer.steps(folder / "checkpoints")
    print(printable(f"run        {folder}"))
    print(printable(f"status     {record.status}, {progress(folder, record)}"))
    if "tokens_per_s" in last:
        print(f"rate       {last['tokens_per_s']:,.0f} tokens/s")
    print(f"saved      {f'step {saved[-1]}' if saved else 'nothing yet'}")
    metrics = folder / "metrics.jsonl"
    if metrics.exists():
        print(f"last line  {time.time() - metrics.stat().st_mtime:,.0f} s ago")
    print(f"process    {alive(last_beat_s(folder))}")


def progress(folder: Path, record: RunRecord) -> str:
    """How far a run is."""
    last = last_record(folder / "metrics.jsonl")
    step = max(record.step, last["step"] if last else 0)
    return f"step {step} of {record.steps} ({step / record.steps:.0%})"


def show_several(folder: Path, runs: dict[str, Path], jobs: list[tuple[Started, str]]) -> None:
    """A line for every job and every run; a job's run has its name."""
    table = Table("name", "job", "state", "starts", "run", "saved", box=None, pad_edge=False)
    told = {job.job.name: (job, state) for job, state in jobs}
    for name in dict.fromkeys([*told, *runs]):
        job, state = told.get(name, (None, "-"))
        cells = [name, "-" if job is None else job.id, state]
        cells.append("-" if job is None else str(read_legs(job.log).starts))
        path = runs.get(name)
        record = RunRecord.read(path) if path is not None else None
        if path is None or record is None:
            cells += ["-", "-"]
        else:
            saved = Checkpointer.steps(path / "checkpoints")
            cells += [f"{record.status}, {progress(path, record)}", f"step {saved[-1]}" if saved else "-"]
        table.add_row(*map(printable, cells))
    Console(width=None if sys.stdout.isatty() else WIDTH, markup=False, highlight=False).print(table)


def jobs_in(folder: Path) -> list[tuple[Started, str]]:
    """What was launched into a folder, and how it is; where the launcher does not say, one line tells why."""
    discover("sae_train.launch")
    try:
        return list(states_in(folder))
    except StoppedEarly as error:
        print(printable(f"sae-train status: {error}"), file=sys.stderr)
        return [(job, "not known") for jobs in read_jobs(folder).values() for job in jobs]


def runs_in(folder: Path) -> dict[str, Path]:
    """The runs of a folder that has several, by name."""
    found = sorted([*folder.glob("*/run.json"), *folder.glob(f"{RUNS}/*/run.json")])
    return {path.parent.name: path.parent for path in found}


def alive(beat_s: float | None) -> str:
    """The owner's heartbeat in words."""
    if beat_s is None:
        return "none"
    if beat_s <= BEAT_S * DEAD_AFTER_BEATS:
        return f"alive {beat_s:.0f} s ago"
    return f"no sign of life for {beat_s:,.0f} s: killed, frozen, or its disk is stuck"


def last_record(path: Path) -> dict[str, float]:
    """The newest training record near the end of metrics.jsonl, or nothing; damaged lines are passed over."""
    if not path.is_file():
        return {}
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        tail = file.read(TAIL_BYTES)
    for line in reversed(tail.splitlines()):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        known = isinstance(record, dict) and type(record.get("step")) is int
        if known and isinstance(record.get("tokens_per_s"), float):
            return record
    return {}
