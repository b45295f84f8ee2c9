"""Clock and ceilings of the GPU benchmark: what this very device does, to which every share refers."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from gpu_problem import Problem


@dataclass(frozen=True)
class Clock:
    """Times in milliseconds; on a CPU they are those of an interpreter and say nothing about any device."""

    device: str
    warmup: int = 20
    repeats: int = 100

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def measure(self, run: Callable[[int], object], limit_s: float = 10.0) -> dict[str, float]:
        """Median, 10th and 90th percentile of run(i), i = 0, 1 ...; fewer repeats if they would take long."""
        self.wait()
        start = time.perf_counter()
        run(0)
        self.wait()
        each = time.perf_counter() - start
        warmup = max(min(1, self.warmup), min(self.warmup, int(limit_s / 6 / each)))
        repeats = max(min(3, self.repeats), min(self.repeats, int(limit_s / each)))
        for i in range(warmup):
            run(i)
        times = self._events(run, repeats) if self.device == "cuda" else self._walls(run, repeats)
        times.sort()
        cut = len(times) // 10
        return {
            "median": statistics.median(times),
            "p10": times[cut],
            "p90": times[-1 - cut],
            "repeats": len(times),
        }

    def _events(self, run: Callable[[int], object], repeats: int) -> list[float]:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        self.wait()
        events[0].record()
        for i in range(repeats):
            run(i)
            events[i + 1].record()
        self.wait()
        return [a.elapsed_time(b) for a, b in pairwise(events)]

    def _walls(self, run: Callable[[int], object], repeats: int) -> list[float]:
        times = []
        for i in range(repeats):
            start = time.perf_counter()
            run(i)
            times.append((time.perf_counter() - start) * 1e3)
        return times


def gemm_tflops(clock: Clock, n: int, d: int, f: int) -> float:
    """bf16 [N, D] x [F, D]^T through the vendor's library; F in parts if the product would be too large."""
    x, w = (torch.randn(rows, d, device=clock.device).bfloat16() for rows in (n, f))
    part = max(1, (1 << 31) // n)
    out = torch.empty(n, min(f, part), dtype=torch.bfloat16, device=clock.device)

    def run(i: int) -> None:
        for rows in w.split(part):
            torch.mm(x, rows.T, out=out[:, : len(rows)] if len(rows) < out.shape[1] else out)

    return 2 * n * d * f / clock.measure(run)["median"] / 1e9


def copy_gb_s(clock: Clock, size: int) -> float:
    """Bytes read and written per second by a copy of `size` bytes."""
    a = torch.empty(size, dtype=torch.uint8, device=clock.device)
    b = torch.empty_like(a)
    return 2 * size / clock.measure(lambda i: b.copy_(a))["median"] / 1e6


def gather_gb_s(clock: Clock, rows: int, width: int, slots: int) -> float:
    """Bytes per second of random bf16 rows of a table, which may fit the cache; summed by a library call."""
    table = torch.randn(rows, width, device=clock.device).bfloat16()
    bags = max(1, min(slots // 64, 4096))
    index = torch.randint(rows, (bags, 64), device=clock.device)
    ms = clock.measure(lambda i: torch.nn.functional.embedding_bag(index, table, mode="sum"))["median"]
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
