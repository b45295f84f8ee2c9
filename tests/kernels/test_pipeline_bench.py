"""The benchmark of harvest and training together, tried at a size that says nothing about speed."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "kernels" / "bench"
TINY = ["--model", "tiny", "--device", "cpu", "--shards", "1", "--warmup", "1", "--rounds", "1"]


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("pipeline")


@pytest.fixture
def trace(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("pipeline_trace")


def test_a_dry_run_measures_each_way_and_traces_both_sides(tmp_path):
    report_file, trace_file = tmp_path / "report.json", tmp_path / "trace.json.gz"
    command = [sys.executable, str(BENCH / "pipeline.py"), *TINY]
    out = subprocess.run(
        [*command, "--json", str(report_file), "--trace", str(trace_file)], capture_output=True, text=True
    )
    assert out.returncode == 0, out.stdout + out.stderr
    report = json.loads(report_file.read_text())
    assert report["bits"] == "same"
    assert report["rows_per_s"].keys() == {"forward", "step", "in turns", "ahead"}
    assert min(report["rows_per_s"].values()) > 0
    of_round = report["rounds"][0]
    slower = min(of_round["forward"]["rows_per_s"], of_round["step"]["rows_per_s"])
    for way in ("in turns", "ahead"):
        assert report["of_the_slower"][way] == of_round[way]["rows_per_s"] / slower
    spent = of_round["in turns"]["spent"]
    assert 0 < spent["forward"] + spent["filter"] <= spent["wait"] <= of_round["in turns"]["seconds"]
    assert "wait" in of_round["step"]["spent"] and "forward" not in of_round["step"]["spent"]
    shares = report["trace"]
    assert shares["training"] > 0 and shares["harvest"] > 0
    covered = shares["training"] + shares["harvest"] - shares["both"] + shares["neither"]
    assert covered == pytest.approx(1)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [(["--shard", "500"], "8 windows of 16"), (["--k", "0"], "--k 0"), (["--batch", "9"], "9")],
)
def test_sizes_that_cannot_be_are_refused_before_a_model_is_made(
    pipeline, monkeypatch, capsys, arguments, told
):
    monkeypatch.setattr(sys, "argv", ["pipeline.py", *TINY, *arguments])
    with pytest.raises(SystemExit) as refused:
        pipeline.parse()
    assert refused.value.code == 2
    assert told in capsys.readouterr().err


def test_ways_that_train_other_weights_are_an_error(pipeline, monkeypatch, capsys):
    monkeypatch.setattr(pipeline.Bench, "bits", lambda self, prefetch: prefetch)
    monkeypatch.setattr(sys, "argv", ["pipeline.py", *TINY])
    assert pipeline.main() == 1
    assert "weights differ" in capsys.readouterr().err


def test_bits_are_those_of_what_was_trained(pipeline, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pipeline.py", *TINY])
    bench = pipeline.Bench(pipeline.parse())
    before = bench.bits(0)
    assert bench.bits(1) == before
    bench.a.batch //= 2
    assert bench.bits(0) != before


def event(cat: str, lane: int, start: float, end: float, name: str = "op") -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "pid": 0, "tid": lane, "ts": start, "dur": end - start, "name": name}


def test_shares_of_streams_count_what_runs_at_once_and_pass_over_the_host(trace):
    events = [
        event("cpu_op", 99, 0, 1000),
        event("gpu_user_annotation", 7, 0, 50, trace.MARK),
        event("kernel", 7, 0, 30),
        event("kernel", 7, 20, 50),  # overlaps the one before: counted once
        event("gpu_memcpy", 13, 40, 70),
        event("kernel", 13, 80, 100),
    ]
    assert trace.shares(events) == pytest.approx(
        {"seconds": 100e-6, "training": 0.5, "harvest": 0.5, "both": 0.1, "neither": 0.1}
    )


def test_a_trace_in_which_nothing_is_marked_is_refused(trace):
    with pytest.raises(ValueError, match="no work in 'training step'"):
        trace.shares([event("kernel", 7, 0, 30)])
