"""Going on from a published SAE, on rows and through the model; stopped and continued to the same bits."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from sae_train import load_sae
from sae_train.cli.main import main
from sae_train.train.members import Member
from sae_train.train.record import RunRecord

TINY = [
    "hook=resid_post.1",
    "corpus.context_length=16",
    "corpus.holdout=0.25",
    "corpus.epochs=100",
    "source.shard_tokens=256",
    "source.lanes=2",
    "sae.d_sae=48",
    "sae.activation.k=4",
    "train.tokens=3200",
    "train.batch_tokens=64",
    "optim.lr=3e-3",
    "optim.decay=0.2",
    "eval.tokens=256",
    "eval.ce_tokens=256",
    "run.threads=1",
]


@pytest.fixture(scope="module")
def tiny_run(tiny_model_dir, tiny_corpus_dir) -> list[str]:
    return [f"model.name={tiny_model_dir('llama')}", f"corpus.name={tiny_corpus_dir}", *TINY]


@pytest.fixture
def tiny(tiny_run, no_pictures) -> list[str]:
    return tiny_run


def results(run: Path) -> dict[str, float]:
    return json.loads((run / "summary.json").read_text())["members"]["main"]


def stop_before(patch: pytest.MonkeyPatch, steps: int) -> None:
    begin = Member.begin_step

    def begin_and_stop(member: Member, step: int) -> None:
        if step == steps:
            os.kill(os.getpid(), signal.SIGTERM)
        begin(member, step)

    patch.setattr(Member, "begin_step", begin_and_stop)


@pytest.fixture(scope="module")
def on_rows(tiny_run, zygote, tmp_path_factory) -> Path:
    """A run on rows, to go on from; leave it as it is."""
    run = tmp_path_factory.mktemp("rows") / "run"
    zygote.run("train", *tiny_run, f"run.dir={run}", plots=False)
    return run


def test_training_through_the_model_from_an_sae_costs_the_model_less_than_before(tiny, tmp_path, on_rows):
    more = ["train.loss=kl", f"start={on_rows / 'saes' / 'main'}"]
    assert main(["train", *tiny, *more, f"run.dir={tmp_path / 'kl'}"]) == 0
    before, after = results(on_rows), results(tmp_path / "kl")
    assert after["kl_sae"] < 0.9 * before["kl_sae"]
    log = (tmp_path / "kl" / "train.log").read_text()
    assert "steps go through autograd: train.loss=kl goes through the language model" in log
    first = json.loads((tmp_path / "kl" / "metrics.jsonl").read_text().splitlines()[0])
    assert "main/loss/kl" in first and "main/loss/mse" in first


def test_a_run_through_the_model_that_is_stopped_goes_on_to_the_same_bits(tiny, tmp_path, monkeypatch):
    args = ["train", *tiny, "train.loss=ce", "train.accumulate=2", "eval.ce_tokens=0"]
    assert main([*args, f"run.dir={tmp_path / 'whole'}"]) == 0
    with monkeypatch.context() as patch:
        stop_before(patch, 20)
        assert main([*args, f"run.dir={tmp_path / 'run'}"]) == 75
    assert main([*args, f"run.dir={tmp_path / 'run'}"]) == 0
    whole, run = (load_sae(tmp_path / name / "saes" / "main").state_dict() for name in ("whole", "run"))
    assert all(torch.equal(whole[key], run[key]) for key in whole)
    ledgers = [
        json.loads((tmp_path / n / "summary.json").read_text())["row_ledger"] for n in ("whole", "run")
    ]
    assert ledgers[0] == ledgers[1]


def test_a_run_on_rows_from_an_sae_begins_where_that_one_ended(tiny, tmp_path, on_rows):
    more = [f"start={on_rows / 'saes' / 'main'}", "logger.every=1", "optim.lr=1e-6", "train.tokens=640"]
    assert main(["train", *tiny, *more, f"run.dir={tmp_path / 'run'}"]) == 0
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    lines = (on_rows / "metrics.jsonl").read_text().splitlines()
    fresh = json.loads(lines[0])["main/fvu"]
    assert first["main/fvu"] < 0.7 * fresh
    assert results(tmp_path / "run")["fvu"] == pytest.approx(results(on_rows)["fvu"], rel=0.02)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["train.loss=kl", "source=synthetic", "hook=auto"], "train.loss"),
        (["train.loss=kl", "train.batch_tokens=40"], "train.batch_tokens"),
        (["train.loss=kl", "kernels.stepper=fused"], "kernels.stepper"),
        (["train.loss=mse"], "train.loss"),
        (["train.loss_weight=-1"], "train.loss_weight"),
        (["start=/nowhere"], "start='/nowhere'"),
        (["start=[a,b]"], "start"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(tiny, tmp_path, capsys, arguments, field):
    assert main(["train", *tiny, *arguments, f"run.dir={tmp_path / 'run'}"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sae-train train:")]
    assert len(lines) == 1 and field in lines[0]


def test_an_encoder_has_no_loss_to_train_through(tiny, tiny_model_dir, tmp_path, capsys):
    args = [f"model.name={tiny_model_dir('bert')}", *tiny[1:], "train.loss=ce"]
    assert main(["train", *args, f"run.dir={tmp_path / 'run'}"]) == 2
    assert "one causal language model" in capsys.readouterr().err


def test_dead_latents_are_resampled_when_asked_and_the_run_still_resumes(tiny, tmp_path, monkeypatch):
    options = ["sae.auxk_coefficient=0", "sae.dead_after_tokens=64", "sae.d_sae=256", "sae.activation.k=1"]
    options += ["train.tokens=2560", "eval.ce_tokens=0"]
    for every in (0, 40, 8):
        run = tmp_path / f"every{every}"
        args = ["train", *tiny, *options, f"train.resample_every={every}", f"run.dir={run}"]
        if every == 8:
            with monkeypatch.context() as patch:
                stop_before(patch, 12)
                assert main(args) == 75
        assert main(args) == 0
    assert main(["train", *tiny, *options, "train.resample_every=8", f"run.dir={tmp_path / 'whole'}"]) == 0
    whole, run = (load_sae(tmp_path / name / "saes" / "main").state_dict() for name in ("whole", "every8"))
    assert all(torch.equal(whole[key], run[key]) for key in whole)
    none = load_sae(tmp_path / "every0" / "saes" / "main").state_dict()
    assert not torch.equal(whole["w_dec"], none["w_dec"]), "nothing was dead"
    assert RunRecord.read(tmp_path / "every40").steps == 40
    last = load_sae(tmp_path / "every40" / "saes" / "main").state_dict()
    assert all(torch.equal(none[key], last[key]) for key in none), "some are new after the last step"


def test_evaluations_while_training_look_at_fewer_rows_than_the_last_one(tiny, tmp_path):
    told = []
    for name, tokens in (("few", 32), ("all", 256)):
        run, more = tmp_path / name, [f"eval.interval_tokens={tokens}", "eval.ce_tokens=0", "eval.every=20"]
        assert main(["train", *tiny, *more, "train.tokens=1600", f"run.dir={run}"]) == 0
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        told.append([line["main/heldout/fvu"] for line in lines if "main/heldout/fvu" in line])
    few, whole = told
    assert len(few) == len(whole) == 2
    assert few[0] != whole[0] and few[1] == whole[1]
