"""Waves of the GPU benchmark: workers that live side by side and are timed in turns, round after round.

All processes of a wave start at once, since importing takes them seconds. They are then prepared one at a
time, so that none is checked, compiled or tuned while another uses the device, and timed one at a time in
rounds: whatever the clocks of the device do over the minutes, they do to all of them.
"""

import json
import math
import os
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import gpu_plan
from gpu_timing import summary

HERE = Path(__file__).parent
START_S, PREPARE_S, ASK_S = 120.0, 240.0, 60.0  # most seconds of a GPU for an answer; a busy CPU gets
PATIENCE = 5  # times as long
LOG_END = 8000  # characters
QUIET = {"WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
ON_CPU = {"TRITON_INTERPRET": "1", "SPARSIFY_DISABLE_TRITON": "1", "CUDA_VISIBLE_DEVICES": ""}
ON_CPU["OMP_NUM_THREADS"] = "1"  # the interpreter's shape has no work for two


@dataclass
class Worker:
    """A process with one case; `failed` says why there is none any more."""

    case: gpu_plan.Case
    log: Path
    process: subprocess.Popen | None = None
    answers: TextIO | None = None
    failed: str = ""
    found: dict[str, Any] = field(default_factory=dict)
    once_ms: dict[str, float] = field(default_factory=dict)
    rounds: dict[str, list[list[float]]] = field(default_factory=dict)
    host_ms: list[float] = field(default_factory=list)

    def start(self, job: dict[str, Any], python: str) -> None:
        read_end, write_end = os.pipe()
        self.answers = os.fdopen(read_end)
        env = os.environ | QUIET | (ON_CPU if job["device"] == "cpu" else {})
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [
                    python,
                    str(HERE / "gpu_worker.py"),
                    json.dumps(job | {"case": self.case, "pipe": write_end}),
                ],
                env=env,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=[write_end],
                text=True,
            )
        os.close(write_end)  # so that the end of the worker is the end of its answers

    def ask(self, timeout_s: float, **command: Any) -> dict[str, Any]:
        """The answer to a command, empty if there is none: `failed` then says why."""
        if self.failed or self.process is None or self.process.stdin is None:
            return {}
        try:
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:  # it has ended; its last answer says how
            pass
        return self.reply(timeout_s)

    def reply(self, timeout_s: float) -> dict[str, Any]:
        assert self.answers is not None and self.process is not None
        ready, _, _ = select.select([self.answers], [], [], max(0.0, timeout_s))
        line = self.answers.readline() if ready else ""
        if line:
            reply: dict[str, Any] = json.loads(line)
            self.failed = reply.get("failed", "")
        elif ready:
            self.failed = f"ended with {self.process.wait()}: {_last_line(self.log)}"
        else:
            self.failed = f"stopped after {timeout_s:.0f} s"
        if self.failed:
            self.stop()
            return {}
        return reply

    def stop(self) -> None:
        if self.process is None:
            return
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            self.process.wait(timeout=0 if self.failed.startswith("stopped") else 10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def failure(self) -> dict[str, str]:
        """Why there is no answer, and the end of what the process has printed: its folder will be gone."""
        if self.failed.startswith("not run"):
            return {"failed": self.failed}
        return {"failed": self.failed, "log": self.log.read_text(errors="replace")[-LOG_END:]}

    def result(self) -> dict[str, Any]:
        """What the report has of this case."""
        settings = ("adversarial", "anchor", "checked", "stages")
        base = {k: v for k, v in self.case.items() if k not in settings}
        base |= self.found
        if self.failed:
            return base | self.failure()
        timed = {part: summary(rounds) for part, rounds in self.rounds.items() if rounds}
        base |= {"ms": timed.pop("step"), "host_ms": sum(self.host_ms) / len(self.host_ms)}
        if "graph" in timed:
            base["graph_ms"] = timed.pop("graph")
        return base | ({"stages": timed} if timed else {})


def _last_line(path: Path) -> str:
    lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or ["no message"])[-1][:160]


class Session:
    """What all workers of a run share.

    Args:
        job: what every worker is told.
        end: time.perf_counter() at which the budget ends.
        folder: for logs and references.
        pythons: implementation -> another Python to run it with.
        rounds: times that every part of every case is measured.
        repeats: steps over all rounds, if they are short.
    """

    def __init__(
        self,
        job: dict[str, Any],
        end: float,
        folder: Path,
        pythons: dict[str, str],
        rounds: int,
        repeats: int,
    ) -> None:
        self.job, self.end, self.folder, self.pythons = job, end, folder, pythons
        self.rounds, self.repeats, self.started, self.num_waves = rounds, repeats, time.perf_counter(), 0

    def left(self) -> float:
        return self.end - time.perf_counter()

    def within(self, seconds: float) -> float:
        """Seconds to wait for an answer that should take at most so many."""
        return min(seconds * (PATIENCE if self.job["device"] == "cpu" else 1), self.left())

    def say(self, text: str) -> None:
        print(f"[{time.perf_counter() - self.started:5.0f} s] {text}", file=sys.stderr, flush=True)

    def start(self, case: gpu_plan.Case) -> Worker:
        label = f"{self.num_waves}-" + "-".join(str(v) for v in case.values() if isinstance(v, str))
        worker = Worker(case, self.folder / f"{label.replace('/', '_').replace(' ', '_')}.log")
        reference = str(self.reference(case["shape"])) if "shape" in case else ""
        python = self.pythons.get(case["impl"], sys.executable)
        worker.start({"reference": reference} | self.job | case.get("job", {}), python)
        return worker

    def reference(self, shape: str) -> Path:
        return self.folder / f"reference-{shape}.pt"

    def single(self, impl: str, shapes: Sequence[str], most_s: float = START_S, **job: Any) -> dict[str, Any]:
        """The answer of a job that is one answer, or {"failed": why}."""
        worker = self.start({"impl": impl, "shapes": list(shapes), "job": job})
        try:
            worker.reply(self.within(START_S))
            found: dict[str, Any] = worker.ask(self.within(most_s), do="run").get("found", {})
        finally:
            worker.stop()
        self.say(f"{impl} {' '.join(shapes)}: {worker.failed or 'done'}")
        return worker.failure() if worker.failed else found

    def wave(self, cases: list[gpu_plan.Case]) -> list[dict[str, Any]]:
        """Results of cases that are alive together, in their order; those timed beside ours with a ratio."""
        self.num_waves += 1
        workers: list[Worker] = []
        begun = time.perf_counter()
        try:
            for case in cases:
                workers.append(self.start(case))
            for worker in workers:
                worker.reply(self.within(START_S))
                reply = worker.ask(self.within(PREPARE_S), do="prepare")
                worker.found |= reply.get("found", {})
                worker.once_ms = reply.get("once_ms", {})
                self.say(f"{worker.case['shape']} {gpu_plan.name(worker.case)}: {worker.failed or 'ready'}")
            for _ in range(self.rounds):
                for worker in workers:
                    self._measure(worker)
            for worker in workers:
                worker.found |= worker.ask(self.within(ASK_S), do="finish").get("found", {})
        finally:
            for worker in workers:
                worker.stop()
        return self._results(workers, time.perf_counter() - begun)

    def _measure(self, worker: Worker) -> None:
        for part, once in worker.once_ms.items():
            most_s = gpu_plan.STEP_S if part == "step" else gpu_plan.PART_S
            least = 1 if self.job["device"] == "cpu" else 3
            wanted = math.ceil(self.repeats / self.rounds)
            steps = max(min(least, wanted), min(wanted, int(most_s * 1e3 / self.rounds / max(once, 1e-6))))
            reply = worker.ask(self.within(ASK_S), do="measure", part=part, steps=steps)
            if reply:
                worker.rounds.setdefault(part, []).append(reply["ms"])
                if part == "step":
                    worker.host_ms.append(reply["host_ms"])

    def _results(self, workers: list[Worker], seconds: float) -> list[dict[str, Any]]:
        results = [w.result() | {"wave": self.num_waves} for w in workers]
        main = next((r for w, r in zip(workers, results, strict=True) if gpu_plan.is_main(w.case)), None)
        for result in results:
            if main is not None and "ms" in main and "ms" in result:
                pairs = zip(result["ms"]["rounds"], main["ms"]["rounds"], strict=True)
                ratios = sorted(theirs / ours for theirs, ours in pairs)
                result["times_ours"] = ratios[len(ratios) // 2]
            said = result.get("failed") or f"{result['ms']['median']:.3f} ms"
            self.say(f"{result['shape']} {gpu_plan.name(result)}: {said}")
        self.say(f"wave {self.num_waves}: {seconds:.0f} s")
        return [r for w, r in zip(workers, results, strict=True) if not w.case.get("anchor")]
