"""What the tests of this folder share: real processes to break, and what a run leaves behind."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sae_train.checkpoint import Checkpointer
from sae_train.log import read_metrics

SMALL = [
    "sae.d_sae=24",
    "sae.activation.k=3",
    "train.tokens=640",
    "train.batch_tokens=32",
    "eval.tokens=100",
    "source.shard_tokens=256",
    "source.lanes=2",
    "checkpoint.every=5",
    "run.threads=1",
]
"""A run on rows without a model, or whatever model the test names."""
TINY = [
    "hook=resid_post.1",
    "corpus.context_length=16",
    "corpus.holdout=0.25",
    "corpus.epochs=400",
    "corpus.shuffle_windows=24",
    "source.shard_tokens=256",
    "source.lanes=2",
    "sae.d_sae=48",
    "sae.activation.k=4",
    "train.tokens=6400",
    "train.batch_tokens=32",
    "eval.tokens=200",
    "eval.ce_tokens=64",
    "eval.every=50",
    "logger.every=2",
    "checkpoint.every=10",
    "run.threads=1",
]
"""200 steps of 32 rows in about 2 s; a later `key=value` wins. Shards are of 16 windows: some begin within a
block of shuffled windows, some with one."""
WITHOUT_MODEL = [key for key in TINY if not key.startswith(("hook=", "corpus."))]
"""The same for sources of rows that are no language model."""
SYNTHETIC = [
    "source=synthetic",
    "source.synthetic={d: 16, features: 32, groups: 4, group_size: 4, l0: 2, rows: 2000}",
    "source.holdout=0.1",
    "source.epochs=8",
    *WITHOUT_MODEL,
]
DYING = ["sae.d_sae=96", "sae.activation.k=2", "sae.dead_after_tokens=64"]
"""Many latents are dead, so the auxiliary loss is at work."""


class Process:
    """A command that runs in a process of its own."""

    def __init__(self, zygote: "Zygote", pid: int, out: Path) -> None:
        self.zygote, self.pid, self.out = zygote, pid, out

    def poll(self) -> int | None:
        """The exit code (-9 for SIGKILL), or None while it runs."""
        code: int | None = self.zygote.ask({"poll": self.pid})
        return code

    def send(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def wait(self, timeout_s: float = 90) -> int:
        deadline = time.monotonic() + timeout_s
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                self.send(signal.SIGKILL)
                raise AssertionError(f"still running after {timeout_s} s: {self.text()}")
            time.sleep(0.01)
        return code

    def text(self) -> str:
        """What it has printed so far, both streams."""
        return self.out.read_text(errors="replace") if self.out.exists() else ""

    def wait_for_step(self, run: Path, step: int, timeout_s: float = 90) -> None:
        """Until metrics.jsonl has a record of this step or a later one."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if (run / "metrics.jsonl").exists() and any(r["step"] >= step for r in read_metrics(run)):
                return
            assert self.poll() is None, f"ended before step {step}: {self.text()}"
            time.sleep(0.005)
        raise AssertionError(f"no step {step} in {timeout_s} s: {self.text()}")


class Zygote:
    """Starts commands; made once per test process."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        env = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("zygote.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )
        assert self.server.stdout is not None
        assert self.server.stdout.readline() == "ready\n"

    def ask(self, request: dict[str, Any]) -> Any:
        assert self.server.stdin is not None and self.server.stdout is not None
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def start(
        self,
        *args: str,
        rows: Path | None = None,
        env: dict[str, str] | None = None,
        before: str | None = None,
        plots: bool = True,
    ) -> Process:
        """Start `sae-train args...`.

        Args:
            rows: file to which the ids of every batch trained on are appended.
            env: more environment.
            before: Python that the process runs first.
            plots: False leaves the report's pictures empty, which halves the time of a short run.
        """
        self.count += 1
        out = self.folder / f"{self.count:04}.txt"
        job = {"run": list(args), "out": str(out), "env": env, "before": before, "plots": plots}
        return Process(self, self.ask(job | {"rows": str(rows) if rows else None}), out)

    def run(self, *args: str, code: int = 0, timeout_s: float = 90, **kwargs: Any) -> str:
        """Run a command to its end, demand an exit code, and return what it printed."""
        process = self.start(*args, **kwargs)
        found = process.wait(timeout_s)
        assert found == code, f"exit {found}, not {code}: {process.text()}"
        return process.text()


def call(target: str, action: str, nth: int | None = None, after: bool = False, since: int = 1) -> str:
    """Code for `before=`: run `action` whenever a function is called.

    Args:
        target: "module:name" or "module:Class.name".
        action: Python; `os`, `time` and the call's `args` are there.
        nth: only at this call, counted from 1; None is every one.
        after: when the call has returned, not before it.
        since: from this call on.
    """
    return f"""
def install():
    import functools, importlib, os, time
    module, _, path = {target!r}.partition(":")
    owner = importlib.import_module(module)
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    real, action, count = getattr(owner, name), compile({action!r}, "action", "exec"), [0]
    def act(args, mine):
        if {nth} in (None, mine) and mine >= {since}:
            exec(action, {{"os": os, "time": time, "args": args}})
    @functools.wraps(real)
    def wrapped(*args, **kwargs):
        count[0] += 1
        mine = count[0]
        if not {after}:
            act(args, mine)
        result = real(*args, **kwargs)
        if {after}:
            act(args, mine)
        return result
    setattr(owner, name, wrapped)
install()
"""


def send(number: int) -> str:
    """Action: a signal to this process."""
    return f"os.kill(os.getpid(), {int(number)})"


ROWS = ("sae_train.shards.source:ShardSource.next_batch", "args[0].batches")
WINDOWS = ("sae_train.harvest.window_source:WindowSource.next_batch", "args[0].counts['seen'] // 32 + 1")
"""What gives a run its batches -> how many it has given; of windows, for batches of 32 tokens, which are
counted when the step has read them."""


def at_step(step: int, action: str, batches: tuple[str, str] = ROWS) -> str:
    """Code for `before=`: run `action` while this optimizer step is done, resumed or not."""
    return call(batches[0], f"if {batches[1]} == {step}:\n    {action}", after=True)


def kill_once_saved(run: Path, step: int, batches: tuple[str, str] = ROWS) -> str:
    """Code for `before=`: SIGKILL in this step, or in the first after it that a checkpoint lies behind."""
    return call(
        batches[0],
        f"""
if {batches[1]} >= {step}:
    from pathlib import Path
    from sae_train.checkpoint import Checkpointer
    for _ in range(20):  # a save in the background may be slow, and the next one waits for it
        if Checkpointer.steps(Path({str(run)!r}, "checkpoints"))[-1:] > [0]:
            {send(signal.SIGKILL)}
        time.sleep(0.01)
""",
        after=True,
    )


def kill_soon(seconds: float) -> str:
    """Action: SIGKILL from outside after some time, wherever the process is then."""
    shell = f"sleep {seconds}; kill -9 "
    return f"import subprocess; subprocess.Popen(['sh', '-c', {shell!r} + str(os.getpid())])"


def newest(run: Path) -> int | None:
    """The newest committed step of a run."""
    steps = Checkpointer.steps(run / "checkpoints")
    return steps[-1] if steps else None


def resumed_at(text: str) -> int | None:
    """The step that a command says it continues from."""
    found = re.search(r"continuing \S+ from step (\d+) of", text)
    return int(found[1]) if found else None


TIMED = re.compile(r"time|seconds|tokens_per_s|system/.*|kernels/.*")


def told(run: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl without what is measured of the process and not of the training."""
    return [{k: v for k, v in record.items() if not TIMED.fullmatch(k)} for record in read_metrics(run)]


def whole_tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, but for the lock's record."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != ".lock"
    }


def final_state(run: Path) -> dict[str, Any]:
    """Everything of a run's newest checkpoint that must not depend on how often it was interrupted.

    Left out: what is measured in seconds, and where in metrics.jsonl it was.
    """
    loaded = Checkpointer(run / "checkpoints").load()
    assert loaded is not None, f"no checkpoint in {run}"
    flat: dict[str, Any] = {}

    def walk(path: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                walk(f"{path}/{key}", item)
        elif isinstance(value, list):
            for i, item in enumerate(value):
                walk(f"{path}/{i}", item)
        else:
            flat[path] = value

    walk("", loaded[1])
    timed = ("/extra/clock", "/extra/producer", "/extra/log/bytes")
    return {path: value for path, value in flat.items() if not path.startswith(timed)}


def differences(one: dict[str, Any], two: dict[str, Any]) -> list[str]:
    """Paths at which two states are not bit for bit the same."""

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))
        return type(a) is type(b) and repr(a) == repr(b)

    def bits(x: torch.Tensor) -> torch.Tensor:
        return x.contiguous().reshape(-1).view(torch.uint8)

    return sorted(
        p for p in one.keys() | two.keys() if p not in one or p not in two or not same(one[p], two[p])
    )


def read_rows(path: Path) -> list[tuple[int, ...]]:
    """The batches of ids that `rows=` recorded, in the order of training; half a last one is left out."""
    numbers = np.frombuffer(path.read_bytes()[: path.stat().st_size // 8 * 8], "<i8").tolist()
    batches, at = [], 0
    while at < len(numbers) and at + numbers[at] < len(numbers):
        batches.append(tuple(numbers[at + 1 : at + 1 + numbers[at]]))
        at += numbers[at] + 1
    return batches
