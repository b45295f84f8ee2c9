"""What the GPU benchmark knows so far, in a file that is whole after every wave."""

import json
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import gpu_table
from gpu_problem import Problem


def describe(device: str, backend: str) -> dict[str, Any]:
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
        interpreted = "ms in the interpreter" if backend == "triton" else "ms on a CPU"
        return found | {"device": "interpreter" if backend == "triton" else "cpu", "unit": interpreted}
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
        "unit": "ms",
    }


class Report:
    """What is known so far; every addition is written to the file, so a run that ends early has left it."""

    def __init__(self, file: Path | None, device: str, backend: str, problems: dict[str, Problem]) -> None:
        self.file, self.problems = file, problems
        self.top: dict[str, float] = {}
        self.all: dict[str, Any] = {"about": describe(device, backend)}
        self.all |= {"ceilings": {}, "shapes": [], "problems": {}, "results": []}

    def say(self, **known: Any) -> None:
        self.all |= known
        if self.file is None:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        part = self.file.with_name(f"{self.file.name}.part")
        part.write_text(json.dumps(self.all, indent=1) + "\n")
        part.replace(self.file)

    def add(self, results: list[dict[str, Any]]) -> None:
        """Results of cases, with their shares of the ceilings, which may move a little at the end."""
        for result in results:
            gpu_table.add_shares(result, self.problems[result["shape"]], self.top)
        self.say(results=[*self.all["results"], *results])

    def ceilings(self, when: str, found: dict[str, Any]) -> None:
        """Shares are of the mean of those before and after."""
        known = self.all["ceilings"] | {when: found.get("ceilings", found)}
        self.top = gpu_table.mean_ceilings([top for top in known.values() if "failed" not in top])
        for result in self.all["results"]:
            gpu_table.add_shares(result, self.problems[result["shape"]], self.top)
        self.say(ceilings=known)
