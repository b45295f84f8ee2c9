"""The commands, run as a user runs them, on a tiny model and corpus that are made here."""

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae_train import load_sae
from sae_train.cli.main import main
from sae_train.log import read_metrics
from sae_train.report.table import METRICS

TINY = [
    "hook=resid_post.1",
    "corpus.context_length=16",
    "corpus.holdout=0.25",
    "source.shard_tokens=256",
    "source.lanes=2",
    "sae.d_sae=48",
    "sae.activation.k=4",
    "train.tokens=640",
    "train.batch_tokens=32",
    "corpus.epochs=2",
    "eval.tokens=200",
    "eval.ce_tokens=64",
    "eval.interval_ce_tokens=32",
    "eval.every=8",
    "logger.every=2",
    "checkpoint.every=5",
    "run.threads=1",
]


def arguments(tiny_model_dir, tiny_corpus_dir) -> list[str]:
    return [f"model.name={tiny_model_dir('llama')}", f"corpus.name={tiny_corpus_dir}", *TINY]


@pytest.fixture
def tiny(tiny_model_dir, tiny_corpus_dir, no_pictures) -> list[str]:
    return arguments(tiny_model_dir, tiny_corpus_dir)


def ok(*args: str) -> None:
    assert main(list(args)) == 0


def published(folder: Path) -> dict[str, torch.Tensor]:
    return {
        path.name + ":" + name: t
        for path in sorted(folder.glob("saes/*/*.safetensors"))
        for name, t in load_file(path).items()
    }


def same_bits(one: Path, two: Path) -> None:
    a, b = published(one), published(two)
    assert a.keys() == b.keys() and a
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.fixture(scope="module")
def finished(tiny_model_dir, tiny_corpus_dir, tmp_path_factory) -> Path:
    """A run to its end, with pictures; what it printed is in `printed.txt` beside it. Leave it as it is."""
    run = tmp_path_factory.mktemp("finished") / "run"
    with contextlib.redirect_stdout(io.StringIO()) as out:
        ok("train", *arguments(tiny_model_dir, tiny_corpus_dir), f"run.dir={run}")
    run.with_name("printed.txt").write_text(out.getvalue())
    return run


def test_training_writes_everything_a_run_promises(finished):
    run, sae_dir = finished, finished / "saes" / "main"
    out = run.with_name("printed.txt").read_text()
    assert str(run / "report.html") in out and "fvu" in out.lower()
    for name in ("run.json", "config.yaml", "metrics.jsonl", "train.log", "report.html", "summary.json"):
        assert (run / name).stat().st_size > 0, name
    for name in ("sae.safetensors", "config.json", "features.safetensors", "metrics.json", "README.md"):
        assert (sae_dir / name).stat().st_size > 0, name
    pictures = list((sae_dir / "plots").glob("*.png"))
    assert len(pictures) >= 4 and all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
    metrics = json.loads((sae_dir / "metrics.json").read_text())
    for key in (
        "fvu",
        "fvu_all",
        "l0",
        "cosine",
        "l2_ratio",
        "ce_clean",
        "ce_sae",
        "ce_zero",
        "ce_mean",
        "kl_sae",
        "dead",
        "dense",
    ):
        assert key in metrics, key
    assert 0 < metrics["l0"] <= 4
    features = load_file(sae_dir / "features.safetensors")
    assert features["train_counts"].dtype == torch.int64
    assert int(features["train_tokens"]) == 640 and int(features["heldout_tokens"]) > 0
    assert int(features["train_counts"].sum()) <= 640 * 4
    steps = [r["step"] for r in read_metrics(run) if "main/loss" in r]
    assert steps == [2, 4, 6, 8, 10, 12, 14, 16, 18, 20]
    kept = [int(p.name.removeprefix("step-")) for p in sorted((run / "checkpoints").iterdir())]
    # A step whose turn comes while the save before it is under way waits for it: a slow disk keeps fewer.
    assert kept[-1] == 20 and 1 < len(kept) <= 3
    sae = load_sae(sae_dir)
    x = torch.randn(5, 32)
    assert sae.decode(sae.encode(x)).shape == (5, 32)
    assert sae.input_scale == 1
    assert 'src="http' not in (run / "report.html").read_text()


def test_every_number_of_a_run_is_explained(finished):
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    for name, shown in METRICS.items():
        meaning = shown.meaning.replace("|", r"\|").replace("<", "&lt;")
        assert f"| `{name}` | {shown.label} | {meaning} | {shown.better} |" in page, name
    explained = set(re.findall("`([^`]+)`", page))
    families = {"NAME/loss": "NAME/loss/TERM", "system": "system/...", "kernels": "kernels/OP"}
    names = {name for line in read_metrics(finished) for name in line}
    assert {"main/grad_norm", "main/loss/mse", "main/heldout/fvu", "system/rss_bytes"} <= names
    for name in (name.replace("main/", "NAME/", 1) for name in names):
        family = families.get(name.rpartition("/")[0], name)
        assert family in explained or name.removeprefix("NAME/heldout/") in METRICS, name
    for tensor in load_file(finished / "saes/main/features.safetensors"):
        assert {tensor, tensor.replace("heldout_", "train_")} & explained, tensor


def test_a_finished_run_is_said_to_be_finished_and_left_alone(tiny, finished, capsys):
    before = (finished / "metrics.jsonl").read_bytes()
    ok("train", *tiny, f"run.dir={finished}")
    assert "finished" in capsys.readouterr().out
    assert (finished / "metrics.jsonl").read_bytes() == before


def same_weights(one: Path, two: Path) -> None:
    first, second = (load_file(run / "saes/main/sae.safetensors") for run in (one, two))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_training_from_disk_gives_the_bits_of_training_from_the_live_model(tiny, finished, tmp_path, capsys):
    live, disk, shards = finished, tmp_path / "disk", tmp_path / "shards"
    # the same budget of rows for both; held-out statistics come from other rows, so compare the SAE itself
    ok("harvest", *tiny, f"out={shards}")
    said = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert said == ["harvested:", "sae-train", "train", *tiny, "source=shards", f"source.path={shards}"]
    ok(*said[2:], f"run.dir={tmp_path / 'as told'}")
    same_weights(live, tmp_path / "as told")
    recipe = [a for a in TINY if not a.startswith(("hook=", "corpus."))]
    ok("train", "source=shards", f"source.path={shards}", *recipe, f"run.dir={disk}")
    same_weights(live, disk)
    features = [load_file(run / "saes/main/features.safetensors") for run in (live, disk)]
    for name in features[0]:
        if name.startswith("train_"):
            assert torch.equal(features[0][name], features[1][name]), name


def test_prefetching_in_a_thread_does_not_change_a_bit(tiny, tmp_path):
    for depth in (0, 2):
        ok("train", *tiny, f"run.dir={tmp_path / str(depth)}", f"source.prefetch={depth}")
    same_bits(tmp_path / "0", tmp_path / "2")


def test_members_on_several_hooks_train_as_they_would_alone(tiny, finished, tmp_path):
    """A member of a run with others sees the same rows as alone when the hooks are the same."""
    together, alone = tmp_path / "together", finished
    saes = "saes={a: {sae: {activation: {k: 4}}}, b: {seed: 7, optim: {lr: 0.01}, sae: {activation: {k: 2}}}}"
    ok("train", *tiny, f"run.dir={together}", saes)
    a, main_sae = (
        load_file(together / "saes/a/sae.safetensors"),
        load_file(alone / "saes/main/sae.safetensors"),
    )
    for name in a:
        assert torch.equal(a[name], main_sae[name]), name
    b = load_file(together / "saes/b/sae.safetensors")
    assert not torch.equal(a["w_enc"], b["w_enc"])
    assert json.loads((together / "saes/b/config.json").read_text())["sae"]["activation"]["k"] == 2
    drawn = {
        run: (run / "report.html").read_text().count("What the SAEs of this run trade")
        for run in (together, alone)
    }
    assert drawn == {together: 1, alone: 0}
    assert all("Wall time by what" in (run / "report.html").read_text() for run in drawn)
    hooks = tmp_path / "hooks"
    ok("train", *tiny, f"run.dir={hooks}", "hook=[resid_post.0,mlp_out.1]")
    assert sorted(p.name for p in (hooks / "saes").iterdir()) == ["mlp_out.1", "resid_post.0"]


def test_transformer_lens_spelling_is_the_same_hook(tiny, finished, tmp_path):
    ok("train", *tiny, f"run.dir={tmp_path / 'tl'}", "hook=blocks.1.hook_resid_post")
    same_bits(finished, tmp_path / "tl")


def start(args: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "sae_train", *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def wait_for_step(run: Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        if (run / "metrics.jsonl").exists() and any(r["step"] >= step for r in read_metrics(run)):
            return
        time.sleep(0.02)
    raise AssertionError(f"no step {step}: {process.communicate()}")


LONGER = ["train.tokens=6400", "corpus.epochs=20", "checkpoint.every=20", "eval.every=40"]


@pytest.fixture(scope="module")
def whole(tiny_model_dir, tiny_corpus_dir, zygote, tmp_path_factory) -> Path:
    """A longer run that nobody ended."""
    run = tmp_path_factory.mktemp("whole") / "run"
    names = arguments(tiny_model_dir, tiny_corpus_dir)
    zygote.run("train", *names, *LONGER, f"run.dir={run}", plots=False)
    return run


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGKILL, -9)])
def test_a_run_that_was_ended_continues_to_the_same_bits(tiny, whole, zygote, tmp_path, number, code):
    cut, longer = tmp_path / "cut", [*tiny, *LONGER]
    process = zygote.start("train", *longer, f"run.dir={cut}")
    process.wait_for_step(cut, 60)
    process.send(number)
    assert process.wait() == code, process.text()
    saved = sorted((cut / "checkpoints").iterdir())
    assert saved, "nothing was saved before the end"
    assert not (cut / "saes").exists()
    if number == signal.SIGTERM:
        assert "SIGTERM" in process.text() and "same command" in process.text()
    ok("train", *longer, f"run.dir={cut}")
    same_bits(whole, cut)
    steps = [r["step"] for r in read_metrics(cut) if "main/loss" in r]
    assert steps == list(range(2, 201, 2))
    resumed_at = [
        line for line in (cut / "train.log").read_text().splitlines() if "continuing from step" in line
    ]
    assert len(resumed_at) == 1 and "step 0 " not in resumed_at[0]


def test_a_second_signal_ends_a_run_at_once(tiny, tmp_path):
    run = tmp_path / "run"
    slow = [*tiny, "train.tokens=640000", "corpus.epochs=9999", "checkpoint.every=20", "eval.every=0"]
    process = start(["train", *slow, f"run.dir={run}"])
    wait_for_step(run, 40, process)
    process.send_signal(signal.SIGSTOP)  # both signals are then waiting when it goes on
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    process.communicate(timeout=30)
    assert process.returncode in (-signal.SIGTERM, -signal.SIGINT)
    assert list((run / "checkpoints").glob("step-*"))


def test_evaluation_while_training_measures_cross_entropy_too(finished):
    while_training = [r for r in read_metrics(finished) if r["step"] == 8 and "main/heldout/fvu" in r]
    assert len(while_training) == 1
    for key in ("ce_clean", "ce_sae", "kl_sae", "recovered_mean", "l0", "dense"):
        assert f"main/heldout/{key}" in while_training[0], key
    at_the_end = json.loads((finished / "saes/main/metrics.json").read_text())
    assert 0 < while_training[0]["main/heldout/tokens"] <= 32 < at_the_end["tokens"] <= 64


def test_evaluation_while_training_takes_the_first_held_out_rows(tmp_path, no_pictures):
    short = [
        "source=synthetic",
        "source.shard_tokens=4096",
        "sae.d_sae=64",
        "train.tokens=2048",
        "eval.every=2",
    ]
    found = {}
    for rows in (256, 1024):
        run = tmp_path / str(rows)
        ok("train", *short, "eval.tokens=1024", f"eval.interval_tokens={rows}", f"run.dir={run}")
        judged = [r["main/heldout/fvu"] for r in read_metrics(run) if "main/heldout/fvu" in r]
        found[rows] = (judged[0], json.loads((run / "saes/main/metrics.json").read_text())["fvu"])
    assert found[256][0] != found[1024][0] and found[256][1] == found[1024][1]


def test_rows_computed_elsewhere_train_an_sae(tmp_path, no_pictures):
    g = torch.Generator().manual_seed(0)
    save_file({"acts": torch.randn(3000, 12, generator=g)}, tmp_path / "a.safetensors")
    source = [f"source.paths=[{tmp_path / 'a.safetensors'}]", "source.key=acts", "source.lanes=2"]
    recipe = ["sae.d_sae=24", "sae.activation.k=3", "train.tokens=2560", "train.batch_tokens=64"]
    run = tmp_path / "run"
    ok(
        "train",
        "source=tensors",
        *source,
        "source.shard_tokens=512",
        *recipe,
        "eval.tokens=50",
        f"run.dir={run}",
    )
    metrics = json.loads((tmp_path / "run/saes/main/metrics.json").read_text())
    assert 0 < metrics["fvu"] < 1 and "ce_sae" not in metrics


def test_a_synthetic_dictionary_trains_an_sae_that_explains_it(tmp_path, no_pictures):
    ok(
        "train", "source=synthetic", "source.shard_tokens=4096", "sae.d_sae=256", "sae.activation.k=4",
        "train.tokens=40_000", "train.batch_tokens=512", "eval.tokens=2048", f"run.dir={tmp_path / 'run'}",
    )  # fmt: skip
    metrics = json.loads((tmp_path / "run/saes/main/metrics.json").read_text())
    assert metrics["fvu"] < 0.5


def test_eval_repeats_the_numbers_of_the_run(finished, tmp_path, capsys):
    run = shutil.copytree(finished, tmp_path / "run")
    ok("eval", f"run={run}")
    told = json.loads((run / "saes/main/metrics.json").read_text())
    again = json.loads((run / "saes/main/eval.json").read_text())
    for key in ("fvu", "l0", "ce_clean", "ce_sae", "ce_mean"):
        # the published weights are folded, which rounds differently
        assert again[key] == pytest.approx(told[key], rel=1e-4), key
    assert "fvu" in capsys.readouterr().out


def test_status_tells_how_far_a_run_is(finished, capsys):
    ok("status", f"run={finished}")
    out = capsys.readouterr().out
    assert "done, step 20 of 20 (100%)" in out and "saved      step 20" in out


def test_an_interrupted_harvest_keeps_its_shards_and_continues(tiny, tmp_path, capsys):
    out = tmp_path / "shards"
    ok("harvest", *tiny, f"out={out}")
    whole = {p.parent.name: p.read_bytes() for p in out.glob("shard-*/*.safetensors")}
    victim = sorted(out.glob("shard-*"))[1]
    for path in victim.iterdir():
        path.unlink()
    victim.rmdir()
    state = json.loads((out / "harvest.json").read_text())
    (out / "harvest.json").write_text(json.dumps(state | {"complete": False}, indent=1))
    ok("harvest", *tiny, f"out={out}")
    assert {p.parent.name: p.read_bytes() for p in out.glob("shard-*/*.safetensors")} == whole


def test_the_run_folder_is_named_by_what_decides_the_result(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    few = [*tiny, "train.tokens=64", "eval.every=0"]
    ok("train", *few)
    ok("train", *few, "logger.every=5")
    assert "finished" in capsys.readouterr().out
    ok("train", *few, "run.seed=3")
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_composed_configuration_and_help_are_printed_without_running(tiny, capsys):
    ok("train", *tiny, "--cfg", "job")
    out = capsys.readouterr().out
    assert "d_sae: 48" in out and "resid_post.1" in out
    ok("--help")
    assert "sae-train train experiment=demo" in capsys.readouterr().out
    ok("train", "--help")
    out = capsys.readouterr().out
    assert "sae.activation" in out and "Peak learning rate" in out and "gpt2-small" in out
    for key in (
        "sae.activation.k = 32",
        "sae.activation.bandwidth = 1.0",
        "sae.prefixes = 1/32",
        "  kernels= ",
    ):
        assert key in out, key
    assert "required" not in out.partition("sae:")[2], "what an SAE is has defaults"
    ok("status", "--help")
    assert "dir=DIR" in capsys.readouterr().out


def test_a_sweep_of_saes_is_one_run_and_with_keys_of_hydra_a_run_for_each(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ok("train", "-m", *tiny, "train.tokens=64", "sae.activation.k=2,3")
    assert len(list((tmp_path / "runs").glob("sweeps/sae-*/runs/grid/saes/k[23]/sae.safetensors"))) == 2
    ok("train", "-m", *tiny, "train.tokens=64", "sae.activation.k=2,3", "hydra.sweep.dir=own")
    runs = sorted((tmp_path / "runs").glob("sae-*/report.html"))
    assert len(runs) == 2
    # Hydra may not silence what the runs have to say
    assert all("micro-batch" in (run.parent / "train.log").read_text() for run in runs)


@pytest.mark.parametrize("command", [["--help"], ["train", "--help"]])
def test_a_reader_that_has_seen_enough_is_no_error(command):
    """As `| head`, which closes the pipe."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as out:
        done = subprocess.run(
            [sys.executable, "-m", "sae_train", *command], stdout=out, stderr=subprocess.PIPE, text=True
        )
    assert (done.returncode, done.stderr) == (141, "")
