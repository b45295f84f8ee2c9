"""Clock and ceilings of the GPU benchmark: what this very device does, to which every share refers."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from gpu_problem import Problem

CEILING_S = 2.0  # longest measurement of one ceiling
SETTLE = 2  # untimed steps at the start of a round: caches and clocks are another implementation's


Part = Callable[[int], object]


@dataclass
class Prepared:
    """What can be timed, by name; what is known already; what is known when timing is over."""

    parts: dict[str, Part]
    found: dict[str, Any]
    finish: Callable[[], dict[str, Any]] = field(default=dict)


@dataclass(frozen=True)
class Clock:
    """Times in milliseconds; on a CPU they say nothing about any GPU."""

    device: str

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def once(self, run: Callable[[int], object]) -> float:
        """Milliseconds of one call, by the host's clock."""
        self.wait()
        start = time.perf_counter()
        run(0)
        self.wait()
        return (time.perf_counter() - start) * 1e3

    def steps(self, run: Callable[[int], object], count: int, first: int = 0) -> tuple[list[float], float]:
        """Times of run(first) to run(first + count - 1), and the host's own time per step.

        The device's time runs from event to event, so what the host adds shows where the device waits."""
        if self.device == "cuda":
            for i in range(SETTLE):
                run(first + i)
            events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
            self.wait()
            start = time.perf_counter()
            events[0].record()
            for i in range(count):
                run(first + i)
                events[i + 1].record()
            host = (time.perf_counter() - start) * 1e3 / count
            self.wait()
            return [a.elapsed_time(b) for a, b in pairwise(events)], host
        times = []
        for i in range(count):
            start = time.perf_counter()
            run(first + i)
            times.append((time.perf_counter() - start) * 1e3)
        return times, statistics.fmean(times)

    def rate(self, run: Callable[[int], object]) -> float:
        """Median milliseconds of a short operation, after warming up."""
        run(0)  # may load a library
        each, most_s = self.once(run) / 1e3, CEILING_S if self.device == "cuda" else 0.1
        for i in range(max(1, min(20, int(most_s / 6 / each)))):
            run(i)
        return statistics.median(self.steps(run, max(3, min(100, int(most_s / each))))[0])


def peak_bytes(step: Part, device: str) -> int | None:
    """The most of a GPU's memory that tensors take during a step, batches included."""
    if device != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    step(0)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def summary(rounds: list[list[float]]) -> dict[str, object]:
    """Of all steps of all rounds, and each round's median, in which drift would show."""
    times = sorted(t for part in rounds for t in part)
    cut = len(times) // 10
    return {
        "median": statistics.median(times),
        "p10": times[cut],
        "p90": times[-1 - cut],
        "repeats": len(times),
        "rounds": [round(statistics.median(part), 5) for part in rounds],
    }


def gemm_tflops(clock: Clock, n: int, d: int, f: int) -> float:
    """bf16 [N, D] x [F, D]^T through the vendor's library; F in parts if the product would be too large."""
    x, w = (torch.randn(rows, d, device=clock.device).bfloat16() for rows in (n, f))
    part = max(1, (1 << 31) // n)
    out = torch.empty(n, min(f, part), dtype=torch.bfloat16, device=clock.device)

    def run(i: int) -> None:
        for rows in w.split(part):
            torch.mm(x, rows.T, out=out[:, : len(rows)] if len(rows) < out.shape[1] else out)

    return 2 * n * d * f / clock.rate(run) / 1e9


def copy_gb_s(clock: Clock, size: int) -> float:
    """Bytes read and written per second by a copy of `size` bytes."""
    a = torch.empty(size, dtype=torch.uint8, device=clock.device)
    b = torch.empty_like(a)
    return 2 * size / clock.rate(lambda i: b.copy_(a)) / 1e6


def gather_gb_s(clock: Clock, rows: int, width: int, slots: int) -> float:
    """Bytes per second of random bf16 rows of a table, which may fit the cache; summed by a library call."""
    table = torch.randn(rows, width, device=clock.device).bfloat16()
    bags = max(1, min(slots // 64, 4096))
    index = torch.randint(rows, (bags, 64), device=clock.device)
    ms = clock.rate(lambda i: torch.nn.functional.embedding_bag(index, table, mode="sum"))
    return bags * 64 * width * 2 / ms / 1e6


def ceilings(clock: Clock, problems: list[Problem], tiny: bool) -> dict[str, float]:
    """copy and gather in GB/s, products in TFLOP/s."""
    found = {
        "copy_gb_s": copy_gb_s(clock, 1 << 16 if tiny else 4 << 30),
        "gemm_8192_tflops": gemm_tflops(clock, *([64] * 3 if tiny else [8192] * 3)),
    }
    for p in problems:
        found[f"gemm_{p.name}_tflops"] = gemm_tflops(clock, p.n, p.d, p.f)
        found[f"gather_x_{p.name}_gb_s"] = gather_gb_s(clock, p.n, p.d, p.n * p.k)
        found[f"gather_w_{p.name}_gb_s"] = gather_gb_s(clock, p.f, p.d, p.n * p.k)
        if clock.device == "cuda":
            torch.cuda.empty_cache()
    return found
