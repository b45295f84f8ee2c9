"""Processes that share a run: each harvests some lanes, trains some SAEs, and no bit shows that."""

import json
from pathlib import Path
from typing import Any

import pytest
from faults.tools import DYING, SYNTHETIC, differences, final_state, told

from sae_train.checkpoint import Checkpointer

GRID = "grid={k: [2, 4], seed: [0, 1]}"
SHORT = ["train.tokens=1280", "eval.every=20"]
"""40 steps."""


def members(run: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return summary


@pytest.mark.parametrize(
    ("source", "size", "threads"), [("model", 3, 1), ("synthetic", 2, 1), ("synthetic", 2, 4)]
)
def test_a_run_of_several_processes_is_bit_for_bit_that_of_one(
    source, size, threads, launch, zygote, tiny, tmp_path
):
    """With threads for it, SAEs of one process step at a time."""
    args = [*(tiny if source == "model" else SYNTHETIC), *SHORT, *DYING, "source.lanes=4", GRID]
    args.append(f"run.threads={threads}")
    zygote.run("train", *args, f"run.dir={tmp_path / 'one'}", plots=False)
    launch(size, "train", *args, f"run.dir={tmp_path / 'several'}").wait(0)
    assert differences(final_state(tmp_path / "one"), final_state(tmp_path / "several")) == []
    one, several = members(tmp_path / "one"), members(tmp_path / "several")
    assert several["members"] == one["members"] and list(several["members"]) == list(one["members"])
    assert len(one["members"]) == 4 and several["row_ledger"] == one["row_ledger"]
    assert several["rows"] == one["rows"]
    assert told(tmp_path / "several") == told(tmp_path / "one")
    for name in one["members"]:
        paths = [tmp_path / run / "saes" / name / "sae.safetensors" for run in ("one", "several")]
        assert paths[0].read_bytes() == paths[1].read_bytes()
    parts = {path.name for path in Checkpointer(tmp_path / "several" / "checkpoints").path(40).iterdir()}
    assert {f"state-{rank}.safetensors" for rank in range(1, size)} <= parts
    report = (tmp_path / "several" / "report.html").read_text()
    assert all(name in report for name in one["members"])
