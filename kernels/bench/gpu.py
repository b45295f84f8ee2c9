"""Check and time whole training steps on a GPU: ours in every format, dense torch, and other libraries.

    python kernels/bench/gpu.py --json docs/benchmarks/gpu-h200.json    everything, under ten minutes
    python kernels/bench/gpu.py --quick             shapes A and B, one format, dense torch
    python kernels/bench/gpu.py --device cpu        no GPU: the same in Triton's interpreter

First what the device can do (copy, matrix product, gather), then each implementation in a process of its
own per shape. Ours is compared with float64 at full size before it is timed and refuses to be timed if it
is off or if two runs differ in a bit. What does not fit is reported as out of memory; what the time budget
leaves no room for, as not run. Exits 1 if anything of ours failed.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
import traceback
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

SHAPES = ("A", "B", "S", "C", "D")
MORE_SHAPES = ("S-k16", "S-k64", "S-k128", "S-k192")  # when asked for: they would not fit the budget
OURS = (  # format, clip, encoder: the first is what the table calls ours
    ("split", "exact", "auto"),
    ("split", "exact", "e1"),
    ("split", "exact", "e2"),
    ("fp32", "exact", "auto"),
    ("split", "lag1", "auto"),
    ("split", "none", "auto"),
    ("bf16-moments", "lag1", "auto"),
    ("lazy", "lag1", "auto"),
)
MARK = "RESULT "


def describe(device: str) -> dict[str, Any]:
    """Hardware and versions."""
    import torch
    import triton

    found = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    if device == "cpu":
        return found | {"device": "interpreter", "note": "times are those of Triton's interpreter"}
    card = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError) as error:  # ROCm has another tool
        driver = f"unknown ({error})"
    return found | {
        "device": card.name,
        "memory_bytes": card.total_memory,
        "multiprocessors": card.multi_processor_count,
        "driver, power limit, clock": driver,
        "cuda": torch.version.cuda or torch.version.hip,
    }


def work(job: dict[str, Any]) -> None:
    """In a process of its own: one implementation at one shape, or the ceilings; a line per result."""
    import torch
    from gpu_check import Wrong
    from gpu_problem import PROBLEMS
    from gpu_timing import Clock, ceilings

    clock = Clock(job["device"], job["warmup"], job["repeats"])

    def answer(key: dict[str, Any], run: Any) -> None:
        start = time.perf_counter()
        try:
            found = run()
        except torch.OutOfMemoryError:
            found = {"failed": "out of memory"}
        except Wrong as error:
            found = {"failed": f"wrong: {error}"}
        except Exception as error:  # a peer's or a driver's: it belongs in the table, and the rest goes on
            traceback.print_exc()
            found = {"failed": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
        found["seconds"] = round(time.perf_counter() - start, 2)
        print(MARK + json.dumps(key | found), flush=True)
        if clock.device == "cuda":
            torch.cuda.empty_cache()

    if job["impl"] == "ceilings":
        tiny = job["device"] == "cpu"
        answer({"impl": "ceilings"}, lambda: ceilings(clock, [PROBLEMS[s] for s in job["shapes"]], tiny))
        return
    p = PROBLEMS[job["shape"]]
    if job["impl"] != "ours":
        import gpu_peers

        answer({"impl": job["impl"], "shape": p.name}, lambda: gpu_peers.run(p, job["impl"], clock))
        return
    import gpu_ours

    for number, (fmt, clip, encoder) in enumerate(job["configs"]):
        key = {"impl": "ours", "shape": p.name, "format": fmt, "clip": clip, "encoder": encoder}
        held = p.parameter_bytes(fmt)
        if clock.device == "cuda" and held > 0.97 * torch.cuda.get_device_properties(0).total_memory:
            answer(key, lambda held=held: {"failed": f"out of memory: parameters take {held / 1e9:.0f} GB"})
            continue
        answer(key, lambda c=(fmt, clip, encoder), s=number < 3: gpu_ours.run(p, *c, clock, stages=s))


def start_worker(job: dict[str, Any], timeout_s: float) -> list[dict[str, Any]]:
    """Results of a worker, those before its end if it was stopped."""
    key = {k: job[k] for k in ("impl", "shape") if k in job}
    if timeout_s < 5:
        return [key | {"failed": "not run: the time budget is spent"}]
    env = {**os.environ, **({"TRITON_INTERPRET": "1"} if job["device"] == "cpu" else {})}
    command = [sys.executable, __file__, "--worker", json.dumps(job)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    try:
        out, _ = process.communicate(timeout=timeout_s)
        ended = f"ended with {process.returncode}" if process.returncode else None
    except subprocess.TimeoutExpired:
        process.kill()
        out, _ = process.communicate()
        ended = f"stopped after {timeout_s:.0f} s"
    lines = [line for line in out.splitlines() if line.startswith(MARK)]
    results = [json.loads(line.removeprefix(MARK)) for line in lines]
    return [*results, key | {"failed": ended}] if ended else results


def floors(p: Any, fmt: str, clip: str, active: float, top: dict[str, float]) -> dict[str, float]:
    """Milliseconds that each stage would take at this device's measured ceilings."""
    slots = p.n * p.k * p.d * 2  # bytes of gathered bf16 rows
    gathers = 2 * (2 if clip == "exact" else 1)  # x and residual, once more for the norm of this very step
    return {
        "encode": p.gemm_flops / top[f"gemm_{p.name}_tflops"] / 1e9,
        "decode": slots / top[f"gather_w_{p.name}_gb_s"] / 1e6,
        "update": p.adam_traffic(fmt, active) / top["copy_gb_s"] / 1e6
        + gathers * slots / top[f"gather_x_{p.name}_gb_s"] / 1e6,
    }


def add_shares(result: dict[str, Any], top: dict[str, float]) -> None:
    """Tokens per second, multiples of the encoder's product, and shares of what the device can do."""
    from gpu_problem import PROBLEMS

    if "ms" not in result:
        return
    p, ms = PROBLEMS[result["shape"]], result["ms"]["median"]
    result["rows_per_s"] = p.n / ms * 1e3
    result["times_gemm"] = ms / (p.gemm_flops / top[f"gemm_{p.name}_tflops"] / 1e9)
    if result["impl"] == "ours":
        floor = floors(p, result["format"], result["clip"], result["active"], top)
        result["share_of_ceiling"] = sum(floor.values()) / ms
        result["stage_shares"] = {k: floor[k] / t["median"] for k, t in result.get("stages", {}).items()}


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    about, top = report["about"], report["ceilings"]
    unit = "ms in the interpreter" if about["device"] == "interpreter" else "ms"
    lines = [", ".join(f"{k} {v}" for k, v in about.items())]
    if "failed" in top:
        return "\n".join([*lines, f"ceilings: {top['failed']}"])
    lines.append("ceilings: " + ", ".join(f"{k} {v:.4g}" for k, v in top.items()))
    for shape in report["shapes"]:
        p = report["problems"][shape]
        lines.append(f"\nshape {shape}: N={p['n']} D={p['d']} F={p['f']} k={p['k']}; {unit}")
        head = f"{'':38}{'median':>9}{'p10':>9}{'p90':>9}{'rows/s':>11}{'x GEMM':>8}{'ceiling':>8}"
        lines.append(head + f"{'peak GB':>9}{'fallback':>9}  bits  graph")
        for r in (r for r in report["results"] if r.get("shape") == shape):
            name = " ".join(str(r[k]) for k in ("impl", "format", "clip", "encoder") if k in r)
            if "failed" in r:
                lines.append(f"{name:38} {r['failed']}")
                continue
            peak = f"{r['peak_bytes'] / 1e9:9.2f}" if r["peak_bytes"] is not None else f"{'-':>9}"
            line = f"{name:38}" + "".join(f"{r['ms'][k]:9.3f}" for k in ("median", "p10", "p90"))
            line += f"{r['rows_per_s']:11.0f}{r['times_gemm']:8.2f}"
            if r["impl"] == "ours":
                graph = r.get("graph_ms", "-")
                line += f"{r['share_of_ceiling']:8.0%}{peak}{r['fallback_rows']:9}  same  "
                line += f"{graph['median']:.3f}" if isinstance(graph, dict) else str(graph)
            else:
                line += f"{'':8}{peak}"
            lines.append(line)
            for stage, t in r.get("stages", {}).items():
                share = f"{r['stage_shares'][stage]:8.0%}"
                lines.append(
                    f"    {stage:34}"
                    + "".join(f"{t[k]:9.3f}" for k in ("median", "p10", "p90"))
                    + f"{'':19}{share}"
                )
            if r.get("host_waits"):
                lines.append(f"    the host waits for the device: {r['host_waits']}")
            if r["impl"] == "ours":
                errors = {f"{op} {k}": v for op, found in r["errors"].items() for k, v in found.items()}
                worst = sorted(errors.items(), key=lambda e: -e[1])[:3]
                shown = ", ".join(f"{k} {v:.1e}" for k, v in worst)
                lines.append(
                    f"    active {r['active']:.1%}, busiest latent {r['busiest']} rows; errors: {shown}"
                )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shapes", nargs="+", choices=(*SHAPES, *MORE_SHAPES, "tiny"))
    parser.add_argument("--only", nargs="+", help="implementations: ours, dense, compiled, sparsify, ...")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--budget-s", type=float, default=570, help="no worker runs on after this")
    parser.add_argument("--warmup", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.worker:
        work(json.loads(a.worker))
        return 0
    if a.device == "cpu" and a.json and "docs" in a.json.resolve().parts:
        parser.error("times of the interpreter do not belong in docs: give --json another folder")

    import torch
    from gpu_peers import PEERS, missing
    from gpu_problem import PROBLEMS

    if a.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu --shapes tiny tries this script without one")
    shapes = a.shapes or (["tiny"] if a.device == "cpu" else ["A", "B"] if a.quick else list(SHAPES))
    if a.device == "cpu" and shapes != ["tiny"]:
        parser.error("the interpreter takes hours for real shapes: --shapes tiny")
    if unknown := set(a.only or []) - {"ours", *PEERS}:
        parser.error(f"--only {' '.join(sorted(unknown))}: expected some of ours, {', '.join(PEERS)}")
    peers = ["dense"] if a.quick else list(PEERS)
    end = time.perf_counter() + a.budget_s
    common = {"device": a.device, "warmup": a.warmup, "repeats": a.repeats}

    def launch(most_s: float = 240.0, **job: Any) -> list[dict[str, Any]]:
        left = end - time.perf_counter()
        found = start_worker({**common, **job}, min(most_s, left))
        for r in found:
            name = " ".join(str(r[k]) for k in ("impl", "shape", "format", "clip", "encoder") if k in r)
            said = r.get("failed") or (f"{r['ms']['median']:.3f} ms" if "ms" in r else "measured")
            print(f"[{a.budget_s - left:5.0f} s] {name}: {said}", file=sys.stderr, flush=True)
        return found

    top = launch(impl="ceilings", shapes=shapes)[0]
    results: list[dict[str, Any]] = []
    wanted = a.only or ["ours", *peers]
    for shape in shapes:
        if "ours" in wanted:
            results += launch(impl="ours", shape=shape, configs=OURS[:1] if a.quick else OURS)
        for peer in (name for name in PEERS if name in wanted):
            if package := missing(peer):
                results.append(
                    {"impl": peer, "shape": shape, "failed": f"not run: {package} is not installed"}
                )
            else:
                results += launch(most_s=90.0, impl=peer, shape=shape)
    if "failed" not in top:
        for result in results:
            add_shares(result, top)
    report = {
        "about": describe(a.device),
        "ceilings": {k: v for k, v in top.items() if k not in ("impl", "seconds")},
        "shapes": shapes,
        "problems": {shape: asdict(PROBLEMS[shape]) for shape in shapes},
        "results": results,
    }
    print(table(report))
    if a.json:
        a.json.parent.mkdir(parents=True, exist_ok=True)
        a.json.write_text(json.dumps(report, indent=1) + "\n")
    lost = [
        r for r in results if r["impl"] == "ours" and "failed" in r and "out of memory" not in r["failed"]
    ]
    return 1 if lost or "failed" in top else 0


if __name__ == "__main__":
    sys.exit(main())
