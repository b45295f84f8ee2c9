"""Sweeps as a user runs them: what they train, what they leave, and how they go on after any end."""

import json
import os
import shlex
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch
from faults.tools import at_step, differences, final_state, send
from safetensors.torch import load_file
from sweep.short import FORKED, LONGER, SHORT, table

from sae_train.cli.compose import compose
from sae_train.cli.main import main
from sae_train.config import to_config
from sae_train.launch.record import read_jobs, read_legs
from sae_train.member_set import members
from sae_train.shards.disk import Harvest
from sae_train.train.record import RunRecord

pytestmark = pytest.mark.timeout(2400)
KILL = send(signal.SIGKILL)


def done(run: Path) -> bool:
    record = RunRecord.read(run)
    return record is not None and record.status == "done"


def same_weights(one: Path, two: Path) -> None:
    a, b = load_file(one / "sae.safetensors"), load_file(two / "sae.safetensors")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_sweep_over_saes_is_one_run_whose_best_trains_again_to_the_same_bits(zygote, tmp_path):
    """`train -m` is the same command, and finds it done."""
    folder = tmp_path / "s"
    axes = [
        "sae/activation=topk,jumprelu",
        "k=2,4",
        f"sweep.dir={folder}",
        "sweep.l0=4",
        "sweep.l0_tolerance=0.5",
    ]
    text = zygote.run("sweep", *SHORT, *axes)
    assert "4 SAEs in one run, on one harvest" in text and text.count("Held-out documents") == 1
    rows = table(folder)
    assert list(rows) == [
        "activationtopk-k2",
        "activationtopk-k4",
        "activationjumprelu-k2",
        "activationjumprelu-k4",
    ]
    assert {row["status"] for row in rows.values()} == {"done"}
    numbers = json.loads((folder / "runs/grid/summary.json").read_text())["members"]
    assert {name: float(row["fvu"]) for name, row in rows.items()} == {
        n: m["fvu"] for n, m in numbers.items()
    }
    page = (folder / "report.html").read_text()
    assert 'href="runs/grid/report.html"' in page and "data:image/png;base64," in page
    assert (folder / "runs/grid/report.html").exists() and (folder / "pareto.png").stat().st_size > 1000

    before = (folder / "runs/grid/metrics.jsonl").read_bytes()
    again = zygote.run("train", "-m", *SHORT, *axes)
    assert (folder / "runs/grid/metrics.jsonl").read_bytes() == before
    (command,) = [line for line in again.splitlines() if line.startswith("best: ")]
    name, _, command = command.removeprefix("best: ").partition("; ")
    assert float(rows[name]["fvu"]) == min(float(r["fvu"]) for r in rows.values() if 2 <= float(r["l0"]) <= 6)
    verb, *args = shlex.split(command)[1:]
    zygote.run(verb, *args, f"run.dir={tmp_path / 'best'}", plots=False)
    same_weights(tmp_path / "best/saes/main", folder / "runs/grid/saes" / name)
    config = to_config(composed := compose("train", args))
    (best,) = members(config, composed)
    record = RunRecord.read(folder / "runs/grid")
    assert (
        record is not None
        and record.config["members"][name]["sae"]["activation"]["name"] == best.sae.activation.name
    )


def test_a_sweep_in_one_run_that_is_killed_goes_on_from_its_checkpoint(zygote, tmp_path):
    folder, whole = tmp_path / "s", tmp_path / "whole"
    zygote.run("sweep", *SHORT, "k=2,4", f"sweep.dir={whole}", plots=False)
    args = [*SHORT, "k=2,4", f"sweep.dir={folder}"]
    zygote.run("sweep", *args, before=at_step(14, KILL), code=-signal.SIGKILL, plots=False)
    assert not done(folder / "runs/grid") and not (folder / "table.csv").exists()
    text = zygote.run("sweep", *args, before=at_step(16, send(signal.SIGTERM)), code=75, plots=False)
    assert "saved at step 16" in text and "Traceback" not in text
    assert "continuing" in zygote.run("sweep", *args, plots=False)
    assert differences(final_state(folder / "runs/grid"), final_state(whole / "runs/grid")) == []
    assert table(folder).keys() == table(whole).keys()


BAD = [
    (["sae.activation.k=4"], "at least one key with several values"),
    (["sae.activation.kk=3,4"], "did you mean sae.activation.k"),
    (["optim.lr=interval(1e-4,1e-2)"], "sweep.trials=N"),
    (["k=3,4", "run.dir=x"], "sweep.dir=FOLDER"),
    (["k=3,4", "hydra.sweep.dir=x"], "sae-train train -m with these keys"),
    (["k=3,4", "--cfg"], "flags are for sae-train train"),
    (["train.accumulate=1,2,4", "sweep.max_runs=2"], "at least 3 for so many runs"),
    (["k=3,4", "sweep.batch=2"], "sweep.trials=N to search"),
    (["k=3,4", "sae=nonsense"], "linear"),
    (["k=3,-4"], "at least 1"),
    (["k=3,4", "launch=nowhere"], "local"),
    (["train.accumulate=1,2", "k=3,4", "sweep.trials=4", "sweep.batch=2"], "train.accumulate is of the run"),
    (["k=3,4", "sweep.trials=4", "saes={a: {}, b: {}}"], "one SAE for each trial"),
    (["k=3,4", "sweep.trials=4", "sweep.share=true"], "auto"),
]


@pytest.mark.parametrize(("args", "said"), BAD, ids=[" ".join(args) for args, _ in BAD])
def test_bad_input_is_one_line_before_anything_starts(args, said, tmp_path, capsys):
    assert main(["sweep", *SHORT, *args, f"sweep.dir={tmp_path / 's'}"]) == 2
    err = capsys.readouterr().err
    (line,) = err.splitlines()
    assert line.startswith("sae-train sweep: ") and said in line
    assert not (tmp_path / "s" / "runs").exists()


def test_without_optuna_a_search_says_what_to_install(tmp_path, capsys, monkeypatch):
    find = __import__("importlib.util").util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *more: None if name == "optuna" else find(name, *more)
    )
    assert main(["sweep", *SHORT, "k=3,4", "sweep.trials=2", f"sweep.dir={tmp_path}"]) == 2
    assert "pip install 'sae-train[sweep]'" in capsys.readouterr().err


def test_another_sweep_in_the_same_folder_is_refused(tmp_path, capsys, composer):
    from sae_train.cli.sweep_setting import keep_record, take_apart

    first = take_apart([*SHORT, "k=2,4", f"sweep.dir={tmp_path}"])
    assert keep_record(tmp_path, first, {"members_per_run": 3}) == {"members_per_run": 3}
    assert keep_record(tmp_path, first, {"members_per_run": None}) == {"members_per_run": 3}
    assert main(["sweep", *SHORT, "k=2,5", f"sweep.dir={tmp_path}"]) == 2
    assert "k=2,4" in capsys.readouterr().err


def test_the_file_for_wandb_is_written_and_nothing_is_started(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", *SHORT, "sae.activation.k=2,4", "sweep.wandb=w.yaml"]) == 0
    assert "wandb sweep --project sae-train w.yaml" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["w.yaml"]


@pytest.fixture
def live(tiny_model_dir, tiny_corpus_dir) -> list[str]:
    """A run on a tiny language model."""
    model = [f"model.name={tiny_model_dir('llama')}", f"corpus.name={tiny_corpus_dir}", "hook=resid_post.1"]
    windows = ["corpus.context_length=16", "corpus.holdout=0.25", "corpus.epochs=2"]
    return [*model, *windows, *SHORT[4:], "train.tokens=320"]


def test_several_runs_read_rows_that_are_harvested_once(live, zygote, tmp_path):
    """With the bits of runs that harvest for themselves."""
    folder = tmp_path / "s"
    args = [*live, "train.batch_tokens=32,64,16", "train.accumulate=4", "k=2,4", f"sweep.dir={folder}"]
    text = zygote.run("sweep", *args, "launch.parallel=2", timeout_s=300, plots=False, before=FORKED)
    assert "6 SAEs in 3 runs" in text and "harvested once" in text
    found = Harvest.read(folder / "shards")
    assert found is not None and found.complete and list(found.dims) == ["resid_post.1"]
    assert len(table(folder)) == 6
    alone = tmp_path / "alone"
    zygote.run(
        "train",
        *live,
        "train.batch_tokens=64",
        "train.accumulate=4",
        "sae.activation.k=4",
        f"run.dir={alone}",
    )
    same_weights(alone / "saes/main", folder / "runs/batch_tokens64/saes/k4")
    legs = {one.job.name: read_legs(one.log).starts for one in read_jobs(folder)["local"]}
    assert legs == {"shards": 1, "batch_tokens32": 1, "batch_tokens64": 1, "batch_tokens16": 1}


def kill_run(folder: Path, name: str) -> None:
    """SIGKILL for the process that a job's record names."""
    (log,) = [one.log for jobs in read_jobs(folder).values() for one in jobs if one.job.name == name]
    process = psutil.Process(read_legs(log).process)
    process.kill()
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)


@pytest.mark.parametrize(
    "orphan", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["with its run", "alone"]
)
def test_a_killed_sweep_repeats_nothing_that_is_done(zygote, orphan, tmp_path):
    """Killed in its second of three runs; one that goes on by itself is waited for and not started again."""
    folder = tmp_path / "s"
    args = [*SHORT, *LONGER, "train.accumulate=1,2,4", "k=2,4", f"sweep.dir={folder}"]
    before = None if orphan else FORKED
    sweep = zygote.start("sweep", *args, before=before, plots=False)
    sweep.wait_for_step(folder / "runs/accumulate2", 60, timeout_s=900)
    sweep.send(signal.SIGKILL)
    sweep.wait()
    if not orphan:
        kill_run(folder, "accumulate2")
    assert done(folder / "runs/accumulate1") and not done(folder / "runs/accumulate2")
    files = [folder / "runs/accumulate1" / name for name in ("metrics.jsonl", "run.json")]
    stamps = [file.stat().st_mtime_ns for file in files]
    text = zygote.run("sweep", *args, timeout_s=900, before=before, plots=False)
    assert [file.stat().st_mtime_ns for file in files] == stamps
    assert "accumulate1 running" not in text
    logs = {one.job.name: one.log for one in read_jobs(folder)["local"]}
    assert {name: read_legs(log).starts for name, log in logs.items()} == (
        {"accumulate1": 1, "accumulate2": 1 if orphan else 2, "accumulate4": 1}
    )
    assert ("continuing" in logs["accumulate2"].read_text()) == (not orphan)
    assert {row["status"] for row in table(folder).values()} == {"done"}
    assert len(table(folder)) == 6


@pytest.mark.slow
def test_a_sweep_that_is_asked_to_stop_saves_its_run_and_goes_on(zygote, tmp_path):
    folder = tmp_path / "s"
    args = [*SHORT, *LONGER, "train.accumulate=1,2", f"sweep.dir={folder}"]
    sweep = zygote.start("sweep", *args, before=FORKED, plots=False)
    sweep.wait_for_step(folder / "runs/accumulate1", 60, timeout_s=900)
    sweep.send(signal.SIGTERM)
    assert sweep.wait(600) == 75, sweep.text()
    assert "Traceback" not in sweep.text() and "the same command continues" in sweep.text()
    record = RunRecord.read(folder / "runs/accumulate1")
    assert record is not None and record.status == "stopped" and 60 <= record.step < 300
    assert not (folder / "runs/accumulate2").exists()
    zygote.run("sweep", *args, timeout_s=900, before=FORKED, plots=False)
    assert len(table(folder)) == 2


@pytest.mark.slow
def test_a_run_that_fails_is_reported_with_its_reason_and_the_others_end(zygote, tmp_path):
    folder = tmp_path / "s"
    args = [*SHORT, "train.tokens=640,999999", f"sweep.dir={folder}"]
    text = zygote.run("sweep", *args, code=2, timeout_s=900, before=FORKED, plots=False)
    rows = table(folder)
    assert (rows["tokens640"]["status"], rows["tokens999999"]["status"]) == ("done", "failed")
    assert "the data gave" in rows["tokens999999"]["note"] and "1 runs failed" in text
    assert "the data gave" in (folder / "report.html").read_text()


def trials(folder: Path):
    import optuna
    from optuna.storages.journal import JournalFileBackend

    storage = optuna.storages.JournalStorage(JournalFileBackend(str(folder / "optuna.journal")))
    return optuna.load_study(study_name="sweep", storage=storage).get_trials()


def test_a_search_trains_what_is_suggested_in_batches_on_one_harvest(zygote, tmp_path):
    folder = tmp_path / "s"
    args = [
        *SHORT,
        "lr=tag(log,interval(1e-4,1e-1))",
        "k=2,3,4",
        "sweep.trials=2",
        "sweep.batch=2",
        f"sweep.dir={folder}",
    ]
    zygote.run("sweep", *args, timeout_s=300, before=FORKED, plots=False)
    found = trials(folder)
    assert [trial.state.name for trial in found] == ["COMPLETE"] * 2
    rows = table(folder)
    assert list(rows) == ["t0000", "t0001"]
    record = RunRecord.read(folder / "runs/t0000-t0001")
    assert record is not None
    for trial, row in zip(found, rows.values(), strict=True):
        assert trial.value == float(row["fvu"])
        member = record.config["members"][f"t{trial.number:04}"]
        assert [str(member["sae"]["activation"]["k"]), member["optim"]["lr"]] == [row["k"], float(row["lr"])]
        assert 1e-4 <= member["optim"]["lr"] <= 1e-1
        assert set(trial.intermediate_values) == {5, 10, 15}
    assert (folder / "best.yaml").exists()


@pytest.mark.slow
def test_a_killed_search_goes_on_with_the_trials_that_were_running(zygote, tmp_path):
    """It suggests what a search that nobody killed suggests, and starts no trial anew."""
    folder, whole = tmp_path / "s", tmp_path / "whole"
    args = [
        *SHORT,
        *LONGER,
        "lr=tag(log,interval(1e-4,1e-1))",
        "sweep.trials=4",
        "sweep.batch=2",
        "sweep.pruner=none",
    ]
    sweep = zygote.start("sweep", *args, f"sweep.dir={folder}", before=FORKED, plots=False)
    sweep.wait_for_step(folder / "runs/t0002-t0003", 60, timeout_s=900)
    sweep.send(signal.SIGKILL)
    sweep.wait()
    kill_run(folder / "batches/t0002-t0003", "t0002-t0003")
    before = (folder / "runs/t0000-t0001/run.json").stat().st_mtime_ns
    assert [trial.state.name for trial in trials(folder)] == ["COMPLETE"] * 2 + ["RUNNING"] * 2
    zygote.run("sweep", *args, f"sweep.dir={folder}", timeout_s=900, before=FORKED, plots=False)
    assert [trial.state.name for trial in trials(folder)] == ["COMPLETE"] * 4
    assert (folder / "runs/t0000-t0001/run.json").stat().st_mtime_ns == before
    log = folder / "batches/t0002-t0003/logs/t0002-t0003.log"
    assert "continuing" in log.read_text() and read_legs(log).starts == 2
    zygote.run("sweep", *args, f"sweep.dir={whole}", timeout_s=900, before=FORKED, plots=False)
    assert [t.params for t in trials(folder)] == [t.params for t in trials(whole)]
    assert [t.value for t in trials(folder)] == [t.value for t in trials(whole)]


@pytest.mark.slow
def test_a_trial_that_falls_behind_is_ended_and_marked_and_others_are_compared_at_one_l0(zygote, tmp_path):
    """Learning rates of 1e-9 learn nothing. A k of 12 is far from the wanted L0, and never the best."""
    folder = tmp_path / "s"
    args = [*SHORT, *LONGER, "train.tokens=14336", "eval.every=20", "lr=choice(1e-9,1e-2)", "k=choice(2,12)"]
    options = ["sweep.trials=8", "sweep.warmup_trials=3", "sweep.l0=2", "sweep.seed=1", f"sweep.dir={folder}"]
    zygote.run("sweep", *args, *options, timeout_s=900, before=FORKED, plots=False)
    found = trials(folder)
    ended = [trial for trial in found if trial.state.name == "PRUNED"]
    assert ended and len(found) == 8
    for trial in ended:
        record = RunRecord.read(folder / f"runs/t{trial.number:04}")
        assert record is not None and record.status == "stopped" and record.step < 448
    statuses = {name: row["status"] for name, row in table(folder).items()}
    assert [statuses[f"t{trial.number:04}"] for trial in ended] == ["pruned"] * len(ended)
    config = to_config(compose("train", [f"experiment={folder / 'best.yaml'}"]))
    assert (config.sae.activation.k, config.optim.lr) == (2, 1e-2)
    assert all(bool(trial.constraints) for trial in found if trial.state.name == "COMPLETE")


@pytest.mark.slow
def test_workers_share_a_search_and_rows_and_one_that_is_killed_is_replaced(live, zygote, tmp_path):
    folder = tmp_path / "s"
    args = [
        *live,
        "lr=tag(log,interval(1e-4,1e-1))",
        "sweep.trials=6",
        "sweep.workers=2",
        f"sweep.dir={folder}",
    ]
    sweep = zygote.start("sweep", *args, before=FORKED, plots=False)
    deadline = time.monotonic() + 900
    while not list(folder.glob("runs/*/metrics.jsonl")):
        assert sweep.poll() is None and time.monotonic() < deadline, sweep.text()
        time.sleep(0.1)
    worker = next(one for one in read_jobs(folder)["local"] if one.job.name.startswith("worker"))
    os.kill(read_legs(worker.log).process, signal.SIGKILL)
    code = sweep.wait(900)
    if code != 0:
        zygote.run("sweep", *args, timeout_s=900, before=FORKED, plots=False)
    found = trials(folder)
    assert [trial.state.name for trial in found if trial.state.name != "PRUNED"].count("COMPLETE") >= 1
    assert len(found) == 6 and all(trial.state.is_finished() for trial in found)
    assert len([one for one in read_jobs(folder)["local"] if one.job.name == "shards"]) == 1
    assert len({trial.user_attrs["run"] for trial in found}) == 6
