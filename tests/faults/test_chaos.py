"""The long ones, for `make chaos`: hundreds of kills, and a soak under all kinds of faults, with a report.

    make chaos                                          200 kills, then half an hour of faults
    make chaos CHAOS_KILLS=20 CHAOS_MINUTES=3           a short one

Everything is drawn from CHAOS_SEED. The report (CHAOS_REPORT, runs/chaos.json) has each figure, and is
rewritten after every fault, so that what an interrupted soak has found is not lost.
"""

import json
import os
import random
import resource
import signal
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from faults.tools import Process, differences, final_state, read_rows

KILLS = int(os.environ.get("CHAOS_KILLS", "200"))
MINUTES = float(os.environ.get("CHAOS_MINUTES", "30"))
SEED = int(os.environ.get("CHAOS_SEED", "0"))
REPORT = Path(os.environ.get("CHAOS_REPORT", "runs/chaos.json")).absolute()
LONG_MINUTES, LONG_TOKENS = 20, 1_000_000
"""From which on a soak says something about the work done under faults, and about the growth of memory: in a
shorter one the start of a process, and of its caches, is most of both."""
LEAST_GOODPUT, MOST_MB_PER_MILLION, MOST_MORE_FILES = 0.7, 1.0, 4
"""Targets of docs/reliability.md."""
MEAN_FAULT_S = 60.0
SAVE_S = 20.0
"""Between checkpoints of the soak."""
FAULTS = ("kill", "term", "stop", "full")
CALM = ["eval.every=0", "logger.every=20", "checkpoint.keep=3"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(0)]


def record(**found: Any) -> None:
    """Add to the report and say it."""
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    report = json.loads(REPORT.read_text()) if REPORT.exists() else {}
    report |= {"date": datetime.now(UTC).isoformat(timespec="seconds"), "seed": SEED} | found
    REPORT.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(found), flush=True)


def trained(run: Path) -> int:
    """The newest step in metrics.jsonl."""
    path = run / "metrics.jsonl"
    lines = path.read_bytes().splitlines() if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith(b"}")), default=0)


def test_a_run_killed_hundreds_of_times_ends_like_one_that_was_not(zygote, tiny, tmp_path):
    steps = 500 * KILLS  # more than legs get through, so that the last one has something to do
    args = ["train", *tiny, *CALM, f"train.tokens={32 * steps}", "corpus.epochs=9999", "checkpoint.every=25"]
    zygote.run(*args, f"run.dir={tmp_path / 'whole'}", rows=tmp_path / "whole.rows", timeout_s=36_000)
    draw, run, kills, resumed = random.Random(SEED), tmp_path / "run", 0, 0
    saved = [0]
    started = time.monotonic()
    while True:
        process = zygote.start(*args, f"run.dir={run}", rows=tmp_path / f"{kills}.rows")
        if kills < KILLS:
            known = trained(run)
            # Every other one anywhere, start-up included; the rest once they train, however slow that is.
            while kills % 2 and trained(run) <= known and process.poll() is None:
                time.sleep(0.02)
            end = time.monotonic() + draw.uniform(0.0, 3.0)
            while time.monotonic() < end and process.poll() is None:
                time.sleep(0.005)
            process.send(signal.SIGKILL)
        code = process.wait(36_000)
        resumed += "continuing" in process.text()
        if code != -9:
            assert code == 0, process.text()
            break
        kills += 1
        steps_saved = [int(p.name[5:]) for p in (run / "checkpoints").glob("step-????????")]
        saved.append(max(steps_saved, default=0))
        assert saved[-1] >= saved[-2], "a checkpoint was lost"
        record(kills=kills, kills_newest_step=saved[-1], kills_resumed=resumed)
    assert differences(final_state(tmp_path / "whole"), final_state(run)) == []
    assert kills == KILLS, "the run was done before it had been killed often enough"
    assert resumed >= kills / 2 - 1, "most legs were killed before they had resumed"
    whole = read_rows(tmp_path / "whole.rows")
    last = read_rows(tmp_path / f"{kills}.rows")
    assert whole[len(whole) - len(last) :] == last
    record(kills_equal=True, kills_seconds=round(time.monotonic() - started, 1), kills_steps=steps)


def test_a_soak_under_faults_does_most_of_the_work_and_ends_with_the_same_bits(zygote, tiny, tmp_path):
    seconds = 60 * MINUTES
    per_second = rate(zygote, tiny, tmp_path)
    steps, every = int(per_second * seconds * 0.5) // 20 * 20, max(1, int(per_second * SAVE_S))
    args = ["train", *tiny, *CALM, f"train.tokens={32 * steps}", "corpus.epochs=99999"]
    args.append(f"checkpoint.every={every}")
    began = time.monotonic()
    calm = zygote.start(*args, f"run.dir={tmp_path / 'whole'}")
    memory = watch(calm, tmp_path / "whole", steps)
    clean_s = time.monotonic() - began
    record(soak_steps=steps, soak_save_every=every, soak_clean_seconds=round(clean_s, 1), **memory)
    assert memory["fds"][1] - memory["fds"][0] <= MOST_MORE_FILES, memory
    if memory["rss_tokens"] >= LONG_TOKENS:
        assert memory["rss_95_percent_bound"] < MOST_MB_PER_MILLION, memory

    draw, run = random.Random(SEED), tmp_path / "run"
    counts: dict[str, int] = dict.fromkeys(FAULTS, 0)
    recoveries: list[float] = []
    began = time.monotonic()
    process = zygote.start(*args, f"run.dir={run}")
    while True:
        end = time.monotonic() + draw.expovariate(1 / MEAN_FAULT_S)
        while time.monotonic() < end and process.poll() is None:
            time.sleep(0.05)
        code = process.poll()
        if code is None:
            counts[(fault := draw.choice(FAULTS))] += 1
            harm(fault, process, draw)
            code = process.poll()
        record(soak_faults=counts, soak_step=trained(run), soak_seconds=round(time.monotonic() - began, 1))
        if code == 0:
            break
        if code is not None:
            assert code in (75, -9), process.text()
            known, started = trained(run), time.monotonic()
            process = zygote.start(*args, f"run.dir={run}")
            while trained(run) <= known and process.poll() is None:
                time.sleep(0.02)
            recoveries.append(round(time.monotonic() - started, 2))
            record(soak_seconds_to_a_new_step=recoveries)
    goodput = clean_s / (time.monotonic() - began)
    equal = differences(final_state(tmp_path / "whole"), final_state(run)) == []
    record(soak_goodput=round(goodput, 3), soak_equal=equal)
    assert equal
    assert not list((run / "checkpoints").glob("*damaged*"))
    assert goodput >= LEAST_GOODPUT or MINUTES < LONG_MINUTES, "too much of the work was lost to faults"


def rate(zygote: Any, tiny: list[str], tmp_path: Path) -> float:
    """Steps per second of this machine, undisturbed."""
    run = tmp_path / "rate"
    process = zygote.start("train", *tiny, *CALM, "train.tokens=3200000", f"run.dir={run}")
    process.wait_for_step(run, 200)
    first, began = trained(run), time.monotonic()
    time.sleep(10)
    found = (trained(run) - first) / (time.monotonic() - began)
    process.send(signal.SIGKILL)
    process.wait()
    return found


def harm(fault: str, process: Process, draw: random.Random) -> None:
    """One fault; returns when it is over."""
    if fault == "kill":
        process.send(signal.SIGKILL)
        process.wait()
    elif fault == "term":
        process.send(signal.SIGTERM)
        process.wait()
    elif fault == "stop":
        process.send(signal.SIGSTOP)
        time.sleep(draw.uniform(0.5, 5))
        process.send(signal.SIGCONT)
    else:  # no file may grow: what a full disk does to every write
        before = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, before[1]))
        time.sleep(draw.uniform(0.5, 5))
        if process.poll() is None:
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, before)


def watch(process: Process, run: Path, steps: int) -> dict[str, Any]:
    """Resident size, open files and threads of a run while it trains, over the last three quarters of that.

    Not of its report: matplotlib keeps the files of the eight fonts that it draws with open, once.
    """
    seen: list[tuple[int, int, int, int]] = []
    target = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            with target.oneshot():
                size, fds, threads = target.memory_info().rss, target.num_fds(), target.num_threads()
        except psutil.NoSuchProcess:
            break
        if (step := trained(run)) < steps:
            seen.append((step * 32, size, fds, threads))
        time.sleep(1)
    assert process.wait() == 0, process.text()
    late = np.array(seen[len(seen) // 4 : -2], dtype=np.float64)
    slope, covariance = np.polyfit(late[:, 0] / 1e6, late[:, 1] / 1e6, 1, cov=True)
    return {
        "rss_mb_per_million_tokens": round(float(slope[0]), 3),
        "rss_95_percent_bound": round(float(slope[0] + 2 * covariance[0, 0] ** 0.5), 3),
        "rss_tokens": int(late[-1, 0]),
        "fds": [int(late[:, 2].min()), int(late[:, 2].max())],
        "threads": [int(late[:, 3].min()), int(late[:, 3].max())],
    }
