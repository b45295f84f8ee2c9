"""Which kernels and which stepper a run uses: asked for, refused, said in its log, changed on resume."""

from pathlib import Path

import pytest
import torch

from sae_train import load_sae
from sae_train.cli.main import main

TINY = [
    "hook=resid_post.1",
    "corpus.context_length=16",
    "corpus.holdout=0.25",
    "source.shard_tokens=256",
    "source.lanes=2",
    "sae.d_sae=48",
    "sae.activation.k=4",
    "train.tokens=320",
    "train.batch_tokens=32",
    "eval.tokens=100",
    "eval.ce_tokens=0",
    "run.threads=1",
]


@pytest.fixture
def tiny(tiny_model_dir, tiny_corpus_dir) -> list[str]:
    return [f"model.name={tiny_model_dir('llama')}", f"corpus.name={tiny_corpus_dir}", *TINY]


def said(run: Path) -> list[str]:
    """What the log says of the choice of a stepper."""
    lines = (run / "train.log").read_text().splitlines()
    return [line for line in lines if "steps are fused" in line or "steps go through autograd" in line]


def test_steps_are_fused_by_default_and_end_where_those_of_autograd_do(tiny, tmp_path):
    saes = []
    for name, option in (("fused", []), ("autograd", ["kernels.stepper=autograd"])):
        run = tmp_path / name
        assert main(["train", *tiny, *option, f"run.dir={run}"]) == 0
        (line,) = said(run)
        assert name in line
        saes.append(load_sae(run / "saes" / "main"))
    for one, two in zip(saes[0].parameters(), saes[1].parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


def test_what_cannot_be_fused_says_why_in_the_log_or_in_the_refusal(tiny, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["train", *tiny, "train.accumulate=2", f"run.dir={run}"]) == 0
    (line,) = said(run)
    assert "autograd" in line and "train.accumulate is 2" in line
    capsys.readouterr()
    refused = ["train.accumulate=2", "kernels.stepper=fused", f"run.dir={tmp_path / 'other'}"]
    assert main(["train", *tiny, *refused]) == 2
    error = capsys.readouterr().err
    assert (
        "kernels.stepper='fused'" in error and "train.accumulate is 2" in error and "Traceback" not in error
    )


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("kernels.backend=tritn", "did you mean triton"),
        ("kernels.stepper=fast", "auto, autograd or fused"),
        ("kernels=tritn", "did you mean triton"),
    ],
)
def test_unknown_kernels_are_refused_with_what_is_known(tiny, tmp_path, capsys, option, words):
    assert main(["train", *tiny, option, f"run.dir={tmp_path / 'run'}"]) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error


def test_a_run_may_go_on_with_other_kernels_and_is_warned(tiny, tmp_path, monkeypatch, capsys):
    run, save = tmp_path / "run", "checkpoint.every=5"
    stop = iter([None] * 4 + ["asked"] * 9)
    with monkeypatch.context() as patch:
        patch.setattr("sae_train.cli.signals.StopSignals.reason", lambda self: next(stop))
        assert main(["train", *tiny, save, f"run.dir={run}"]) == 75
    again = ["kernels.stepper=autograd", "kernels.backend=reference", f"run.dir={run}"]
    assert main(["train", *tiny, save, *again]) == 0
    first, second = said(run)
    assert "fused" in first and "autograd" in second
    assert "kernels.stepper was 'auto' and is now 'autograd'" in capsys.readouterr().err
