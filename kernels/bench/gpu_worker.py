"""A process of the GPU benchmark: one case, or a job that is one answer (`special`).

Started as `python gpu_worker.py JOB`; answers with a line of JSON on the pipe that it was given (packages
print to stdout), first {"ready": ...}, then to each line on stdin:

    {"do": "prepare"}                             check, warm up    -> {"found": {...}, "once_ms": {part: ms}}
    {"do": "measure", "part": p, "steps": n}      n steps           -> {"ms": [...], "host_ms": per step}
    {"do": "finish"}                              what is known now -> {"found": {...}}

What goes wrong is an answer {"failed": why}; the process then ends. Imports torch alone before it knows its
case, since the environments of other libraries have no more.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import gpu_curve
import gpu_plan
import gpu_reference
import torch
from gpu_timing import Clock, Prepared, ceilings

Answer = dict[str, Any]


def prepare(job: dict[str, Any]) -> Prepared:
    case, device = job["case"], job["device"]
    p = gpu_plan.problem(case["shape"], job["rows"])
    if case["impl"] != "ours":
        import gpu_peers  # not above: what this imports is the case's own business

        return gpu_peers.prepare(p, case, device, job)
    import gpu_ours
    from sae_kernels import use_backend

    use_backend(job["backend"])
    return gpu_ours.prepare(p, case, device, job)


def special(job: dict[str, Any]) -> Answer:
    """The jobs that are one answer: ceilings, reference, curve, several SAEs together."""
    impl, device, names = job["case"]["impl"], job["device"], job["case"]["shapes"]
    problems = [gpu_plan.problem(name, job["rows"]) for name in names]
    if impl == "ceilings":
        free = torch.cuda.mem_get_info()[0] if device == "cuda" else None
        return {"ceilings": ceilings(Clock(device), problems, device == "cpu"), "free_bytes": free}
    if impl == "curve":
        return gpu_curve.run(device, job["curve_steps"], job["backend"])
    if impl == "together":
        import gpu_together  # not above: other libraries' environments have no sae_train
        from sae_kernels import use_backend

        with use_backend(job["backend"]):
            return gpu_together.run(device, job["repeats"], job["saes"])
    failed = []
    for p in problems:
        try:
            gpu_reference.write(p, device, job["references"][p.name])
        except torch.OutOfMemoryError:  # what else goes wrong here goes wrong at every shape
            failed.append(f"{p.name} takes more memory than there is")
    return {"failed": ", ".join(failed)} if failed else {}


def serve(job: dict[str, Any], answer: Callable[[Answer], None]) -> None:
    clock = Clock(job["device"])
    torch.cuda.init() if clock.device == "cuda" else None
    if "shapes" not in job["case"] and job["case"]["impl"] != "ours":
        import gpu_peers

        if package := gpu_peers.missing(job["case"]["impl"]):
            answer({"failed": f"not run: {package} is not installed"})
            return
    answer({"ready": os.getpid()})
    prepared = Prepared({}, {})
    done = 0
    for line in sys.stdin:
        ask = json.loads(line)
        if "shapes" in job["case"]:
            answer({"found": special(job)})
        elif ask["do"] == "prepare":
            prepared = prepare(job)
            warm = 0 if job["warmup"] == 0 else max(1, job["warmup"] // 2)
            once = {}
            for part, run in prepared.parts.items():
                # The first call may compile; on a CPU nothing does, and calls are slow.
                first = clock.once(run)
                once[part] = clock.once(run) if clock.device == "cuda" else first
                for i in range(min(warm, int(2000 / max(once[part], 1e-3)))):
                    run(i)
            answer({"found": prepared.found, "once_ms": once})
        elif ask["do"] == "measure":
            ms, host = clock.steps(prepared.parts[ask["part"]], ask["steps"], done)
            done += ask["steps"]
            answer({"ms": ms, "host_ms": host})
        else:
            answer({"found": prepared.finish()})


def reason(error: Exception) -> str:
    """One line for the table."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    kind = "wrong" if type(error).__name__ == "Wrong" else type(error).__name__
    return f"{kind}: {(str(error).strip().splitlines() or [''])[0]}"


def main() -> None:
    job = json.loads(sys.argv[1])
    answers = os.fdopen(job["pipe"], "w")

    def answer(reply: Answer) -> None:
        answers.write(json.dumps(reply) + "\n")
        answers.flush()

    try:
        serve(job, answer)
    except Exception as error:  # a peer's or a driver's: it belongs in the table, and the rest goes on
        traceback.print_exc()
        answer({"failed": reason(error)})


if __name__ == "__main__":
    main()
