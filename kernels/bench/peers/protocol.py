"""How the benchmark of whole training steps talks to its workers: one process per implementation.

A worker is started as `python -m peers.NAME JOB` in the folder kernels/bench, so that no file here hides
an installed package of the same name. It builds its model, answers {"ready": ...}, and then obeys one JSON
object per line on stdin, with one JSON object per line on the pipe it was given (packages print to stdout):

    {"steps": n}   n training steps on the next batches  -> {"wall_ms": [...], "cpu_ms": [...], "loss": [...]}
    {"memory": 1}  -> {"peak": bytes, "growth": bytes}   peak of the process; of that, since it was ready
    end of input   the worker ends

Imports nothing but torch, since every environment has that.
"""

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class Job:
    """What every worker is told."""

    data: str
    """File with `batches` [B, N, D] and the weights to start from, named as in LinearSAE."""
    rows: int
    k: int
    lr: float
    bf16: bool
    threads: int
    variant: str
    pipe: int
    """File descriptor to answer on."""


Start = dict[str, Tensor]
Step = Callable[[Tensor], Tensor | float]
"""One training step on rows [N, D]. Returns the reconstruction loss before the update: squared error of a row
summed over D, mean over rows, whatever multiple of it the implementation minimises."""


def status_bytes(key: str) -> int:
    """VmRSS or VmHWM of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def serve(package: str, build: Callable[[Job, Start], Step]) -> None:
    """Build from the job on the command line, then answer until the input ends."""
    job = Job(**json.loads(sys.argv[1]))
    answers = os.fdopen(job.pipe, "w")

    def answer(**reply: object) -> None:
        answers.write(json.dumps(reply) + "\n")
        answers.flush()

    torch.set_num_threads(job.threads)
    start: Start = torch.load(job.data, weights_only=True)
    batches = start.pop("batches")
    step = build(job, start)
    del start
    gc.collect()
    ready_rss, peak_before = status_bytes("VmRSS"), status_bytes("VmHWM")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here: importing is not training
    answer(ready=f"{package} {version(package)}", torch=torch.__version__)
    done = 0
    for line in sys.stdin:
        command = json.loads(line)
        if "memory" in command:
            peak = status_bytes("VmHWM")
            answer(peak=max(peak, peak_before), growth=peak - ready_rss)
            continue
        wall_ms, cpu_ms, losses = [], [], []
        for _ in range(command["steps"]):
            x = batches[done % len(batches)]
            wall, cpu = time.perf_counter(), time.process_time()
            loss = step(x)
            wall_ms.append((time.perf_counter() - wall) * 1e3)
            cpu_ms.append((time.process_time() - cpu) * 1e3)
            losses.append(float(loss))
            done += 1
        answer(wall_ms=wall_ms, cpu_ms=cpu_ms, loss=losses)
