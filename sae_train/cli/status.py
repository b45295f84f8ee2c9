"""sae-train status run=DIR: how far a run is, at what rate, and when it was last saved."""

import json
import time
from pathlib import Path

from sae_train.checkpoint import Checkpointer
from sae_train.cli.folder import BEAT_S, DEAD_AFTER_BEATS, last_beat_s
from sae_train.errors import InputError
from sae_train.redact import printable
from sae_train.train.record import RunRecord

TAIL_BYTES = 1 << 20


def run(args: list[str]) -> int:
    values = dict(arg.split("=", 1) for arg in args if "=" in arg)
    if set(values) != {"run"} or len(args) != 1:
        raise InputError("status", " ".join(args), "run=DIR and nothing else")
    folder = Path(values["run"]).expanduser()
    record = RunRecord.read(folder)
    if record is None:
        raise InputError("run", str(folder), "a run folder (it holds run.json)")
    last = last_record(folder / "metrics.jsonl")
    step = max(record.step, last["step"] if last else 0)
    saved = Checkpointer.steps(folder / "checkpoints")
    print(printable(f"run        {folder}"))
    print(f"status     {printable(record.status)}, step {step} of {record.steps} ({step / record.steps:.0%})")
    if "tokens_per_s" in last:
        print(f"rate       {last['tokens_per_s']:,.0f} tokens/s")
    print(f"saved      {f'step {saved[-1]}' if saved else 'nothing yet'}")
    metrics = folder / "metrics.jsonl"
    if metrics.exists():
        print(f"last line  {time.time() - metrics.stat().st_mtime:,.0f} s ago")
    print(f"process    {alive(last_beat_s(folder))}")
    return 0


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
