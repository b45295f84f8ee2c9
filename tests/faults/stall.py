"""What a checkpoint costs: how long training stands still, and what digests take of saves and loads.

    python tests/faults/stall.py [LATENTS WIDTH]

A run on synthetic rows, one thread, a checkpoint every 20 steps; what is timed is the project's own calls.
Digests are judged by doing without: saves and loads with and without them take turns.
"""

import itertools
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

from sae_train import files, verified
from sae_train.checkpoint import Checkpointer
from sae_train.cli.main import main
from sae_train.shards.source import ShardSource
from sae_train.train.saver import Saver

EVERY, STEPS, DEFAULT_EVERY = 20, 200, 1000


def timed(owner: Any, name: str, seconds: list[float]) -> None:
    """Note how long each call of a method takes."""
    real: Callable[..., Any] = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return real(*args, **kwargs)
        finally:
            seconds.append(time.perf_counter() - began)

    setattr(owner, name, call)


WITHOUT = {
    (files, "digest"): "0" * 32,
    (verified, "digest_read"): "0" * 32,
    (verified, "check_digest"): None,
    (files, "check_digest"): None,
}
"""What these functions answer, at once, where nothing is digested."""


def slower(work: Callable[[], Any]) -> float:
    """By what share digests make `work` slower; it runs with and without them in turns, 41 times each."""
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(82):
        digests = turn % 2 == 0
        with ExitStack() as replaced:
            for (module, name), answer in WITHOUT.items() if not digests else ():
                replaced.enter_context(patch.object(module, name, lambda *_, answer=answer: answer))
            began = time.perf_counter()
            work()
            seconds[digests].append(time.perf_counter() - began)
    return statistics.median(seconds[True]) / statistics.median(seconds[False]) - 1


def forget(path: Path) -> None:
    """Have the system drop a file from its memory, so that reading it is reading the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(latents: int, width: int) -> dict[str, float]:
    """Run, and say what a save costs."""
    stood, wrote, arrived = list[float](), list[float](), list[float]()
    timed(Saver, "start", stood)
    timed(Checkpointer, "save", wrote)
    real = ShardSource.next_batch

    def next_batch(self: ShardSource) -> Any:
        arrived.append(time.perf_counter())
        return real(self)

    ShardSource.next_batch = next_batch  # type: ignore[method-assign]
    shape = f"d: {width}, features: {2 * width}, groups: 8, group_size: 8, l0: 8, rows: {512 * STEPS}"
    keys = ["source=synthetic", f"source.synthetic={{{shape}}}", "hook=auto", "run.threads=1"]
    keys += [f"sae.d_sae={latents}", "train.batch_tokens=512", f"train.tokens={512 * STEPS}"]
    keys += [f"checkpoint.every={EVERY}", "eval.every=0", "eval.tokens=512"]
    with tempfile.TemporaryDirectory() as folder:
        assert main(["train", *keys, f"run.dir={folder}/run"]) == 0
        checkpoints = Path(folder, "run", "checkpoints")
        last = checkpoints / f"step-{STEPS:08d}"
        size_bytes = sum(path.stat().st_size for path in last.iterdir())
        found = Checkpointer(checkpoints).load(last)
        assert found is not None
        number = itertools.count()

        def save_again() -> None:
            copy = Path(folder, f"copy-{next(number)}")
            copy.mkdir()
            Checkpointer(copy).save(STEPS, found[1], found[2])
            shutil.rmtree(copy)

        def load_cold() -> None:
            for path in last.iterdir():
                forget(path)
            Checkpointer(checkpoints).load(last)

        shares = {
            "digests_slow_a_save_by": slower(save_again),
            "digests_slow_a_load_by": slower(lambda: Checkpointer(checkpoints).load(last)),
            "digests_slow_a_load_from_disk_by": slower(load_cold),
        }
    step = statistics.median(b - a for a, b in itertools.pairwise(arrived))
    stall, save = map(statistics.median, (stood, wrote))
    return {
        "checkpoint_mb": size_bytes / 1e6,
        "step_ms": 1e3 * step,
        "stall_ms": 1e3 * stall,
        "stall_steps": stall / step,
        f"stall_share_at_every_{DEFAULT_EVERY}": stall / (stall + DEFAULT_EVERY * step),
        "written_in_the_loop_ms": 1e3 * save,
    } | shares


if __name__ == "__main__":
    given = [int(text) for text in sys.argv[1:3]]
    found = measure(*(given or (2304, 576)))
    print(json.dumps({name: round(value, 5) for name, value in found.items()}, indent=1))
