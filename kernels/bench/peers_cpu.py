"""Whole TopK training steps on a CPU: ours, dense torch, and three other libraries as they ship.

    make bench-cpu [ARGS="--rounds 9 --json docs/benchmarks/cpu-step.json"]

A step is everything that is done to a batch: encode, decode, loss, backward, clipping and the decoder's
constraint where the implementation has them, Adam, and its bookkeeping of latents. No latent is dead, so
no auxiliary loss runs. Every implementation lives in a process of its own, started before the first round;
the processes then work in turns, so that what else the machine does meets all of them alike. All start
from the same weights and see the same rows. One whose first loss is not that of dense float64, or whose
loss does not fall, is not timed.

Of the columns "x ours", the first is the median over rounds of (its median in that round / ours in the same
dtype), so a busy spell longer than a round cancels; the others divide least times, and least CPU times over
all threads. Where other processes keep the machine busy, the CPU times with --threads 1 are the ones to
believe. "Peak" is the largest resident size of a process; "step" is the part of it that came after model,
data and libraries were in memory: optimizer state, gradients and everything temporary.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor

HERE = Path(__file__).parent
ENVIRONMENTS = HERE.parent.parent / ".venv-bench"
FP32_LIMIT = 1e-5
"""Relative difference of the first loss, whose errors are sums of D terms, each right to 2^-24."""
BF16_LIMIT = 5e-3
"""The same where operands, and with some the reconstruction too, are rounded to 2^-9 of their size."""


@dataclass(frozen=True)
class Entry:
    """One row of the table: which worker, in which environment ("" is this one)."""

    label: str
    worker: str
    environment: str = ""
    variant: str = ""
    dtypes: tuple[str, ...] = ("fp32", "bf16")


ENTRIES = [
    Entry("ours", "ours"),
    Entry("ours, autograd", "ours", variant="autograd"),
    Entry("dense torch", "dense"),
    Entry("sparsify", "sparsify", "sparsify"),
    Entry("dictionary_learning", "dictionary_learning", "dictionary_learning"),
    Entry("SAELens", "saelens", "saelens"),
    Entry("SAELens, sparse", "saelens", "saelens", "sparse", ("fp32",)),
]


@dataclass
class Worker:
    """A running implementation, or the reason why there is none."""

    entry: Entry
    dtype: str
    log: Path
    process: subprocess.Popen | None = None
    answers: TextIO | None = None
    package: str = ""
    failure: str = ""
    first_loss: float = float("nan")
    off: float = float("nan")
    rounds_ms: list[list[float]] = field(default_factory=list)
    rounds_cpu_ms: list[list[float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    peak: int = 0
    growth: int = 0

    @property
    def name(self) -> str:
        return f"{self.entry.label} {self.dtype}"

    def start(self, job: dict) -> None:
        python = Path(sys.executable)
        if self.entry.environment:
            python = ENVIRONMENTS / self.entry.environment / "bin" / "python"
            if not list(python.parent.parent.glob(".installed-*")):
                self.failure = f"not installed: {_last_line(ENVIRONMENTS / f'{self.entry.environment}.log')}"
                return
        read_end, write_end = os.pipe()
        self.answers = os.fdopen(read_end)
        job = job | {"variant": self.entry.variant, "bf16": self.dtype == "bf16", "pipe": write_end}
        threads = str(job["threads"])
        quiet = {"WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1", "SPARSIFY_DISABLE_TRITON": "1"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [python, "-m", f"peers.{self.entry.worker}", json.dumps(job)],
                cwd=HERE,
                env=os.environ | quiet | {"OMP_NUM_THREADS": threads, "CUDA_VISIBLE_DEVICES": ""},
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=[write_end],
                text=True,
            )
        os.close(write_end)  # so that the end of the worker is the end of its answers
        reply = self._reply()
        self.package = reply.get("ready", "")

    def ask(self, **command: int) -> dict:
        """The answer to a command; empty if the worker has ended, which is then its failure."""
        assert self.process is not None and self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return self._reply()  # the worker has ended, and its reply, which is none, notes how
        return self._reply()

    def _reply(self) -> dict:
        assert self.process is not None and self.answers is not None
        line = self.answers.readline()
        if line:
            return json.loads(line)
        self.failure = f"ended with code {self.process.wait()}: {_last_line(self.log)}"
        return {}

    def run(self, steps: int) -> list[float]:
        """Run steps and keep their times; returns the losses."""
        reply = self.ask(steps=steps)
        if reply:
            self.rounds_ms.append(reply["wall_ms"])
            self.rounds_cpu_ms.append(reply["cpu_ms"])
            self.losses += reply["loss"]
        return reply.get("loss", [])

    def check(self, want: float, warmup: int) -> None:
        """First step against dense float64, then warm-up; a disagreement ends the worker."""
        losses = self.run(1)
        if not self.failure:
            self.first_loss = losses[0]
            self.off = abs(losses[0] - want) / want
            limit = FP32_LIMIT if self.dtype == "fp32" else BF16_LIMIT
            if not self.off <= limit:
                self.failure = f"first loss is {losses[0]:.6g}, dense float64 has {want:.6g}; not timed"
        if not self.failure:
            losses = self.run(warmup)
        if not self.failure and not losses[-1] < self.first_loss:
            self.failure = f"loss went from {self.first_loss:.6g} to {losses[-1]:.6g}; not timed"
        self.rounds_ms.clear()
        self.rounds_cpu_ms.clear()
        if self.failure:
            self.stop()

    def measure_memory(self) -> None:
        reply = self.ask(memory=1)
        self.peak, self.growth = reply.get("peak", 0), reply.get("growth", 0)

    def stop(self) -> None:
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()
            self.process.wait()


def _last_line(path: Path) -> str:
    """The line of a log that is likely to say what went wrong."""
    lines = [line.strip() for line in path.read_text().splitlines() if line.strip()] if path.exists() else []
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or ["no message"])[-1][:160]


def make_data(n: int, d: int, f: int, k: int, batches: int) -> dict[str, Tensor]:
    """Batches of rows, mean norm sqrt(D) about an offset, and the weights that everybody starts from.

    The rows are sparse sums over a dictionary of F directions with Zipf frequencies in no order, and the
    weights lie near it: latents fire as unequally as those of a trained SAE, and keep doing so."""
    draw = torch.Generator().manual_seed(0)
    atoms = torch.nn.functional.normalize(torch.randn(f, d, generator=draw), dim=-1)
    often = 1 / (1 + torch.randperm(f, generator=draw)) ** 0.8
    rows = batches * n
    picks = torch.multinomial(often.expand(rows, f), k, generator=draw)
    strengths = torch.empty(rows, k).exponential_(generator=draw) + 0.5
    x = torch.nn.functional.embedding_bag(picks, atoms, per_sample_weights=strengths, mode="sum")
    x += 0.02 * torch.randn(rows, d, generator=draw)
    x *= d**0.5 / x.norm(dim=-1).mean()
    offset = torch.randn(d, generator=draw)
    w = torch.nn.functional.normalize(atoms + 0.04 * torch.randn(f, d, generator=draw), dim=-1)
    return {
        "batches": (x + offset).view(batches, n, d),
        "w_enc": w,
        "b_enc": 0.01 * torch.randn(f, generator=draw),
        "w_dec": w.clone(),
        "b_dec": offset,
    }


def float64_loss(data: dict[str, Tensor], k: int) -> float:
    """Squared error of a row summed over D, mean over the first batch, by dense float64."""
    x, w_enc, b_enc, w_dec, b_dec = (
        data[name].double() for name in ("batches", "w_enc", "b_enc", "w_dec", "b_dec")
    )
    x = x[0]
    top = ((x - b_dec) @ w_enc.T + b_enc).relu().topk(k, dim=-1)
    codes = torch.zeros(len(x), len(w_enc), dtype=torch.float64).scatter_(1, top.indices, top.values)
    return float((x - codes @ w_dec - b_dec).square().sum(dim=-1).mean())


def summary(worker: Worker, ours: Worker | None, n: int) -> dict:
    """The numbers of one row of the table."""
    name = {"implementation": worker.entry.label, "dtype": worker.dtype, "package": worker.package}
    if worker.failure:
        return name | {"failure": worker.failure}
    times = sorted(t for part in worker.rounds_ms for t in part)
    cpu = [t for part in worker.rounds_cpu_ms for t in part]
    out = name | {
        "ms_median": statistics.median(times),
        "ms_min": times[0],
        "ms_p10": times[len(times) // 10],
        "ms_p90": times[len(times) * 9 // 10],
        "cpu_ms_min": min(cpu),
        "tokens_per_s_median": n / statistics.median(times) * 1e3,
        "tokens_per_s_best": n / times[0] * 1e3,
        "peak_bytes": worker.peak,
        "growth_bytes": worker.growth,
        "first_loss": worker.first_loss,
        "first_loss_off": worker.off,
        "last_loss": worker.losses[-1],
        "rounds_ms": worker.rounds_ms,
        "rounds_cpu_ms": worker.rounds_cpu_ms,
    }
    if ours is not None and not ours.failure:
        pairs = zip(worker.rounds_ms, ours.rounds_ms, strict=True)
        out["ratio_median"] = statistics.median(statistics.median(a) / statistics.median(b) for a, b in pairs)
        out["ratio_min"] = times[0] / min(t for part in ours.rounds_ms for t in part)
        out["ratio_cpu"] = min(cpu) / min(t for part in ours.rounds_cpu_ms for t in part)
    return out


def table(rows: list[dict]) -> str:
    nan = float("nan")
    head = f"{'':20}{'':>6}{'ms per step':>18}{'':>8}{'':>10}{'x ours':>21}{'MiB':>13}{'loss':>19}\n"
    head += f"{'':20}{'dtype':>6}{'median':>10}{'least':>8}{'CPU':>8}{'tokens/s':>10}"
    head += f"{'median':>8}{'least':>7}{'CPU':>6}{'peak':>7}{'step':>6}{'first off':>11}{'last':>8}"
    lines = [head]
    for row in rows:
        name = f"{row['implementation']:20}{row['dtype']:>6}"
        if "failure" in row:
            lines.append(f"{name}  {row['failure']}")
            continue
        ratios = [row.get(key, nan) for key in ("ratio_median", "ratio_min", "ratio_cpu")]
        lines.append(
            f"{name}{row['ms_median']:>10.0f}{row['ms_min']:>8.0f}{row['cpu_ms_min']:>8.0f}"
            f"{row['tokens_per_s_median']:>10,.0f}{ratios[0]:>8.2f}{ratios[1]:>7.2f}{ratios[2]:>6.2f}"
            f"{row['peak_bytes'] / 2**20:>7.0f}{row['growth_bytes'] / 2**20:>6.0f}"
            f"{row['first_loss_off']:>11.0e}{row['last_loss']:>8.2f}"
        )
    return "\n".join(lines)


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown CPU"
    )


def main() -> None:
    load = [round(os.getloadavg()[0], 1)]
    parser = argparse.ArgumentParser(
        prog="peers_cpu.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    defaults = {"n": 2048, "d": 576, "f": 4608, "k": 32, "rounds": 7, "steps": 3, "warmup": 4, "batches": 6}
    for name, default in {**defaults, "threads": len(os.sched_getaffinity(0))}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--lr", type=float, default=4e-4, help="of every Adam; constant (default 4e-4)")
    parser.add_argument("--only", nargs="+", help="names in the table, in any case, e.g. ours sparsify")
    parser.add_argument("--dtypes", nargs="+", choices=("fp32", "bf16"), default=("fp32", "bf16"))
    parser.add_argument("--json", type=Path, help="write the raw results here")
    a = parser.parse_args()

    chosen = [e for e in ENTRIES if a.only is None or e.label.lower() in map(str.lower, a.only)]
    if unknown := {name.lower() for name in a.only or ()} - {e.label.lower() for e in ENTRIES}:
        parser.error(f"--only {min(unknown)!r}: expected among {', '.join(repr(e.label) for e in ENTRIES)}")
    data = make_data(a.n, a.d, a.f, a.k, a.batches)
    want = float64_loss(data, a.k)
    machine = f"{cpu_name()}, {torch.backends.cpu.get_cpu_capability()}, {a.threads} threads"
    shape = f"N={a.n} D={a.d} F={a.f} k={a.k}, {a.rounds} rounds of {a.steps} steps"
    print(
        f"{shape}\n{machine}, torch {torch.__version__}\nfirst loss in dense float64: {want:.6f}", flush=True
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.pt"
        torch.save(data, path)
        del data
        job = {"data": str(path), "rows": a.n, "k": a.k, "lr": a.lr, "threads": a.threads}
        workers = [
            Worker(entry, dtype, Path(folder) / f"{entry.worker}{entry.variant}-{dtype}.log")
            for dtype in a.dtypes
            for entry in chosen
            if dtype in entry.dtypes
        ]
        try:
            for worker in workers:
                print(f"starting {worker.name}", file=sys.stderr, flush=True)
                worker.start(job)
                if not worker.failure:
                    worker.check(want, a.warmup)
            for number in range(a.rounds):
                print(f"round {number + 1} of {a.rounds}", file=sys.stderr, flush=True)
                for worker in workers:
                    if not worker.failure:
                        time.sleep(0.05)  # the threads of the one before stop spinning
                        worker.run(a.steps)
            for worker in workers:
                if not worker.failure:
                    worker.measure_memory()
        finally:
            for worker in workers:
                worker.stop()
    ours = {w.dtype: w for w in workers if w.entry.label == "ours"}
    rows = [summary(w, ours.get(w.dtype), a.n) for w in workers]
    load.append(round(os.getloadavg()[0], 1))
    print(table(rows))
    print(f"load average: {load[0]} before, {load[1]} after; {a.threads} of it this benchmark's own")
    if a.json is not None:
        a.json.parent.mkdir(parents=True, exist_ok=True)
        facts = {
            "date": time.strftime("%Y-%m-%d"),
            "machine": machine,
            "platform": platform.platform(terse=True),
            "torch": torch.__version__,
            "load_average": load,
            "arguments": {key: value for key, value in vars(a).items() if key != "json"},
            "float64_loss": want,
        }
        a.json.write_text(json.dumps(facts | {"results": rows}, indent=1) + "\n")
        print(f"raw results: {a.json}")


if __name__ == "__main__":
    main()
