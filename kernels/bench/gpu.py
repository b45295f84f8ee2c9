"""Check and time whole training steps on a GPU: ours in every format, dense torch, and other libraries.

    python kernels/bench/gpu.py --json docs/benchmarks/gpu-h200.json    in ten minutes, most telling first
    python kernels/bench/gpu.py --quick             shapes A and B, one format, dense torch
    python kernels/bench/gpu.py --levels 2 3        what the budget of a first call left out
    python kernels/bench/gpu.py --curve             only the loss curve
    python kernels/bench/gpu.py --together          only ten small SAEs, one by one and sharing launches
    python kernels/bench/gpu.py --rows rows.safetensors     recorded rows too (record_rows.py writes them)
    python kernels/bench/gpu.py --device cpu        no GPU: the same in Triton's interpreter

First what the device can do (copy, matrix product, gather), and last again. Between, waves of processes,
one per implementation, timed in turns. Each is checked before: ours op by op with float64 at full size, with
hostile inputs and over ten steps; it is not timed if it is off or two runs differ in a bit. What does not
fit is reported as out of memory; what the time budget leaves no room for, as not run. Ends with the loss
curve: ours against float32; and with small SAEs together. Exits 1 if anything of ours failed. The file of
--json is written again after every wave: a run that is cut short leaves what it has measured.

Other libraries need an environment each: --peer-python sparsify=.venv-bench/sparsify/bin/python names it
(`make bench-cpu` makes them); without it, what this Python can import is run.
"""

import argparse
import os
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gpu_plan
import gpu_table
from gpu_adversarial import TRIALS
from gpu_plan import IMPLEMENTATIONS, MORE_SHAPES, SHAPES
from gpu_report import Report
from gpu_rounds import Session

TOGETHER_S = 60.0  # to compile the kernels once more, for a small shape
CURVE_S = 150.0  # of a GPU's time for 2,000 steps twice
AFTER_S = 25.0  # left for the second ceilings


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--backend", choices=("triton", "cpu"), default="triton", help="of ours; cpu for a dry run"
    )
    parser.add_argument("--shapes", nargs="+", choices=(*SHAPES, *MORE_SHAPES, "R", "tiny"))
    parser.add_argument("--only", nargs="+", choices=IMPLEMENTATIONS)
    parser.add_argument("--levels", nargs="+", type=int, choices=gpu_plan.LEVELS, default=gpu_plan.LEVELS)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--curve", action="store_true", help="the loss curve and nothing else")
    parser.add_argument("--together", action="store_true", help="several small SAEs and nothing else")
    parser.add_argument("--curve-steps", type=int, help="default 2000, on a CPU 200; 0 leaves it out")
    parser.add_argument("--rows", type=Path, help="file with recorded rows [M, D], safetensors")
    parser.add_argument("--peer-python", nargs="+", action="extend", default=[], metavar="NAME=PATH")
    parser.add_argument(
        "--budget-s", type=float, help="nothing runs on after this; default 550, on a CPU 3600"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=100, help="steps, over all rounds")
    parser.add_argument("--adam-steps", type=int, default=10, help="that ours is followed in float64")
    parser.add_argument("--adversarial", nargs="*", choices=list(TRIALS), default=list(TRIALS))
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    if a.device == "cpu" and a.json and "docs" in a.json.resolve().parts:
        parser.error("times of the interpreter do not belong in docs: give --json another folder")
    if a.device == "cuda" and a.backend != "triton":
        parser.error(f"--backend {a.backend}: expected triton on a GPU")
    if min(a.rounds, a.repeats, a.adam_steps) < 1:
        parser.error("--rounds, --repeats and --adam-steps: expected at least 1")
    a.shapes = a.shapes or (["tiny"] if a.device == "cpu" else ["A", "B"] if a.quick else list(SHAPES))
    if a.device == "cpu" and a.shapes != ["tiny"]:
        parser.error("the interpreter takes hours for real shapes: --shapes tiny")
    a.pythons = dict(pair.partition("=")[::2] for pair in a.peer_python)
    for name, python in a.pythons.items():
        if name not in IMPLEMENTATIONS[1:] or not os.access(python, os.X_OK):
            parser.error(
                f"--peer-python {name}={python}: expected one of {', '.join(IMPLEMENTATIONS[1:])} = a Python"
            )
    if a.rows is not None:
        try:
            a.shapes = [*a.shapes, *gpu_plan.recorded_shapes(a.rows, a.shapes)]
        except (OSError, ValueError) as error:
            parser.error(f"--rows {a.rows}: {error}")
    a.budget_s = a.budget_s or (3600.0 if a.device == "cpu" else 550.0)
    if a.curve_steps is None:
        a.curve_steps = 200 if a.device == "cpu" else 0 if a.quick else 2000
    return a


def run_waves(a: argparse.Namespace, session: Session, report: Report, free: float, end_s: float) -> None:
    """Results of all cases, those of greatest value first; `end_s` seconds of the budget are left alone."""
    plan = {shape: gpu_plan.cases(shape, a.quick, a.only) for shape in a.shapes}
    broken: set[str] = set()  # shapes at which our main case failed: nothing is timed beside it
    for level in (number - 1 for number in a.levels):
        for shape, p in report.problems.items():
            wanted = plan[shape][level] if level < len(plan[shape]) else []
            wanted = [c for c in wanted if not (c.get("anchor") and shape in broken)]
            fits = [c for c in wanted if gpu_plan.least_bytes(p, c) <= 0.97 * free]
            for case in wanted:
                if case not in fits:
                    room = f"parameters take {gpu_plan.least_bytes(p, case) / 1e9:.0f} GB"
                    report.add([case | {"failed": f"out of memory: {room}"}])
            for wave in gpu_plan.waves(p, fits, free) if fits else []:
                needed = sum(gpu_plan.estimated_s(p, c, a.repeats) for c in wave) + 10
                if session.left() - end_s < (needed if a.device == "cuda" else 0):
                    left_out = [c for c in wave if not c.get("anchor")]
                    report.add([c | {"failed": "not run: the time budget"} for c in left_out])
                    continue
                results = session.wave(wave)
                report.add(results)
                if any(gpu_plan.is_main(r) and "failed" in r for r in results):
                    broken.add(shape)


def main() -> int:
    started = time.perf_counter()
    a = parse()
    import torch

    if a.device == "cuda" and not torch.cuda.is_available():
        print("gpu.py: there is no CUDA device; --device cpu tries this script without one", file=sys.stderr)
        return 2
    job = {
        "device": a.device,
        "backend": a.backend,
        "warmup": a.warmup,
        "adam_steps": a.adam_steps,
        "adversarial": a.adversarial,
        "rows": str(a.rows.resolve()) if a.rows else "",
        "curve_steps": a.curve_steps,
    }
    problems = {shape: gpu_plan.problem(shape, str(a.rows or "")) for shape in a.shapes}
    report = Report(a.json, a.device, a.backend, problems)
    report.say(arguments=" ".join(sys.argv[1:]), budget_s=a.budget_s, rounds=a.rounds)
    with tempfile.TemporaryDirectory() as folder:
        session = Session(job, started + a.budget_s, Path(folder), a.pythons, a.rounds, a.repeats)
        everything = not (a.curve or a.together)
        if everything:
            measure(a, session, report)
        curve_s = CURVE_S if a.device == "cuda" else 20
        if a.curve_steps and (a.curve or (everything and session.left() > curve_s)):
            # On a CPU our fast backend stands in for the interpreter, which would take hours.
            curve = {"backend": "cpu"} if a.device == "cpu" else {}
            report.say(curve=session.single("curve", [], 400.0, **curve))
        elif a.curve_steps and everything:
            report.say(curve={"failed": "not run: the time budget; --curve runs it alone"})
        if a.together or (everything and session.left() > TOGETHER_S):
            small = {"repeats": 1, "saes": 2} if a.device == "cpu" else {"saes": 10}
            report.say(together=session.single("together", [], 400.0, **{"repeats": a.repeats} | small))
        elif everything:
            report.say(together={"failed": "not run: the time budget; --together runs it alone"})
        report.say(elapsed_s=time.perf_counter() - started)
    print(gpu_table.table(report.all))
    return 1 if failures(report.all) else 0


def measure(a: argparse.Namespace, session: Session, report: Report) -> None:
    """Everything but the curve and what steps together."""
    before = session.single("ceilings", a.shapes)
    report.ceilings("before", before)
    if "failed" in before:
        return
    free = before["free_bytes"] or float("inf")  # the interpreter's shape takes next to nothing
    references = {shape: str(session.reference(shape)) for shape in a.shapes}
    report.say(shapes=a.shapes, problems={shape: asdict(p) for shape, p in report.problems.items()})
    report.say(references=session.single("reference", a.shapes, references=references))
    # The curve gets what is left, if that is enough: timing side by side comes first.
    run_waves(a, session, report, free, AFTER_S)
    report.ceilings("after", session.single("ceilings", a.shapes))


def failures(report: dict[str, Any]) -> list[str]:
    """What of ours went wrong, ceilings and last jobs included; what did not fit or was not run is none."""
    excused = ("out of memory", "not run")
    found = [
        f"{r['shape']} {gpu_plan.name(r)}: {r['failed']}"
        for r in report["results"]
        if r["impl"] in ("ours", "trainer") and not r.get("failed", "not run").startswith(excused)
    ]
    found += [
        f"ceilings {when}: {top['failed']}" for when, top in report["ceilings"].items() if "failed" in top
    ]
    parts = (("references", "float64 references"), ("curve", "loss curve"), ("together", "SAEs together"))
    for name, told in parts:
        part = report.get(name, {})
        if "wrong" in part or not part.get("failed", "not run").startswith(excused):
            found.append(f"{told}: {part.get('wrong', part.get('failed'))}")
    return found


if __name__ == "__main__":
    sys.exit(main())
