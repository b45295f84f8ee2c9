"""Where each library is installed, how it is given its jobs (`peers/work.py`), and what agreeing means."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_train.sae.base import SAE

PEERS = Path(__file__).resolve().parent / "peers"
BENCH = Path(__file__).resolve().parents[2] / ".venv-bench"
JOINING = {
    "llamascopium": "saelens",
    "sae_dashboard": "saelens",
    "sae_bench": "saelens",
    "delphi": "sparsify",
}
"""Packages in folders of their own -> whose environment they run in: they need little that it has not."""
TOLERANCE = 1e-4


def python_of(peer: str) -> Path:
    """The interpreter of a peer's environment; skips the test where that is not installed."""
    if peer == "ours":
        return Path(sys.executable)
    found = BENCH / JOINING.get(peer, peer) / "bin" / "python"
    if not found.exists() or (peer in JOINING and not (BENCH / peer / peer).exists()):
        pytest.skip(f"{peer} is not installed: make test-interop does that")
    return found


def do(peer: str, jobs: list[dict[str, Any]], folder: Path, **variables: str) -> None:
    """Have a peer do its jobs, in one process of its own."""
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs))
    environment = os.environ | {
        "SPARSIFY_DISABLE_TRITON": "1",
        "OMP_NUM_THREADS": "1",
        "PEER_PACKAGES": str(BENCH / peer),
    }
    command = [python_of(peer), PEERS / f"{peer}.py", file]
    known = environment | variables
    done = subprocess.run(command, capture_output=True, text=True, timeout=800, env=known)
    assert done.returncode == 0, done.stderr[-4000:]


def agree(sae: SAE, x: torch.Tensor, answer: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Relative differences of codes and reconstructions; which latents are active is the same."""
    codes, y = sae.encode(x).dense(), sae(x)
    assert torch.equal(codes != 0, answer["codes"] != 0) and bool((codes != 0).any())
    apart = [
        float((ours - theirs).norm() / theirs.norm())
        for ours, theirs in ((codes, answer["codes"]), (y, answer["y"]))
    ]
    assert max(apart) < TOLERANCE
    return apart[0], apart[1]
