"""Every architecture and kind by the commands that a user gives: train, resume, judge, publish, load."""

import json
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faults.tools import TINY, at_step, differences, final_state, resumed_at, send
from safetensors.torch import load_file

from sae_train import load_sae
from sae_train.cli import language_model
from sae_train.cli.main import main
from sae_train.places import Widths

SHORT = [*TINY, "train.tokens=1280", "checkpoint.every=50", "eval.every=0"]
"""40 steps."""
ARCHITECTURES: dict[str, tuple[list[str], Widths, dict[str, Any]]] = {
    "transcoder": (
        ["sae=transcoder", "hook=mlp_in.1", "target=mlp_out.1"],
        Widths((32,), (32,)),
        {"hook": "mlp_in.1", "target": "mlp_out.1"},
    ),
    "skip transcoder": (
        ["sae=skip_transcoder", "hook=resid_pre.1", "target=attn_out.1"],
        Widths((32,), (32,)),
        {"hook": "resid_pre.1", "target": "attn_out.1"},
    ),
    "crosscoder": (
        ["sae=crosscoder", "hook=resid_post.0+blocks.1.hook_resid_post"],
        Widths((32, 32)),
        {"hook": "resid_post.0+resid_post.1"},
    ),
    "matryoshka": (["sae=matryoshka", "sae.sampled=3"], Widths((32,)), {"hook": "resid_post.1"}),
    "gated": (["sae=gated"], Widths((32,)), {"hook": "resid_post.1"}),
}


@pytest.fixture
def tiny(tiny_model_dir: Callable[[str], Path], tiny_corpus_dir: Path) -> list[str]:
    return [f"model.name={tiny_model_dir('llama')}", f"corpus.name={tiny_corpus_dir}", *SHORT]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_it_trains_resumes_to_the_same_bits_is_judged_published_and_loaded(name, tiny, zygote, tmp_path):
    asked, widths, where = ARCHITECTURES[name]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    zygote.run("train", *tiny, *asked, f"run.dir={whole}", plots=False)
    zygote.run("train", *tiny, *asked, f"run.dir={cut}", before=at_step(13, send(signal.SIGTERM)), code=75)
    told = zygote.run("train", *tiny, *asked, f"run.dir={cut}", plots=False)
    assert resumed_at(told) in (13, 14)
    assert differences(final_state(whole), final_state(cut)) == []

    published = whole / "saes" / "main"
    config = json.loads((published / "config.json").read_text())
    assert config["sae"]["kind"] == name.split()[-1] or config["sae"]["name"] == name
    sae = load_sae(published)
    other = load_file(cut / "saes" / "main" / "sae.safetensors")
    assert all(torch.equal(other[key], tensor) for key, tensor in sae.state_dict().items())
    assert sae.widths == widths and sae(torch.randn(5, sum(widths.inputs))).shape == (5, sum(widths.outputs))
    features = load_file(published / "features.safetensors")
    assert int(features["train_tokens"]) == 1280 and features["heldout_counts"].shape == (48,)

    numbers = json.loads((published / "metrics.json").read_text())
    for key in ("fvu", "cosine", "l0", "ce_clean", "ce_sae", "ce_zero", "ce_mean", "kl_sae"):
        assert math.isfinite(numbers[key]), key
    assert numbers["fvu"] < 1 and 0 < numbers["l0"] <= 4 and numbers["kl_sae"] > 0
    assert numbers["ce_zero"] != numbers["ce_clean"] != numbers["ce_sae"]
    several = {key for key in numbers if key.startswith("fvu/")}
    assert several == ({"fvu/resid_post.0", "fvu/resid_post.1"} if name == "crosscoder" else set())
    first = {key for key in numbers if key.startswith("fvu_first/")}
    assert first == ({f"fvu_first/{n}" for n in (2, 5, 11, 23)} if name == "matryoshka" else set())
    assert all(numbers["fvu"] < numbers[key] for key in first)

    zygote.run("eval", f"run={whole}")
    again = json.loads((published / "eval.json").read_text())
    for key in ("fvu", "l0", "ce_clean", "ce_sae", "ce_mean", "kl_sae", *several):
        # the published weights are folded, which rounds differently
        assert again[key] == pytest.approx(numbers[key], rel=1e-3), key
    assert where.items() <= config["meta"].items() and ("target" in config["meta"]) == ("target" in where)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (["sae=transcoder"], ("sae.kind='transcoder'", "autoencoder", "hook=NAME")),
        (["target=mlp_out.1"], ("sae.kind='autoencoder'", "expected transcoder", "target=NAME")),
        (
            ["hook=resid_post.0+resid_post.1"],
            ("sae.kind='autoencoder'", "expected crosscoder", "hook=NAME+NAME"),
        ),
        (["sae=crosscoder"], ("sae.kind='crosscoder'", "autoencoder")),
        (
            ["sae=crosscoder", "hook=resid_post.0+resid_post.1", "target=mlp_out.1"],
            ("sae.kind", "transcoder"),
        ),
        (["sae=crosscoder", "hook=resid_post.1+resid_post.1"], ("hook", "each once")),
        (["sae=crosscoder", "hook=resid_post.1+blocks.1.hook_resid_post"], ("hook", "once")),
        (["sae=crosscoder", "hook=resid_post.1+"], ("hook", "joined by +")),
        (["sae=transcoder", "target=mlp_out.99"], ("mlp_out.99", "mlp_out.2")),
        (["sae=transcoder", "target=[mlp_out.1,mlp_out.2]"], ("target", "one hook name")),
        (["sae=gated", "sae.kind=crosscodder"], ("sae.kind='crosscodder'", "crosscoder")),
        (["sae=skip_transcoder", "sae.kind=autoencoder"], ("sae.skip=True", "false")),
        (["sae=gated", "sae.skip=true"], ("sae.skip=True", "sae.kind=transcoder")),
        (["sae=matryoshka", "sae.prefixes=1/2"], ("sae.prefixes='1/2'", "rising shares")),
        (["sae=matryoshka", "sae.sampled=1"], ("sae.sampled=1", "2 to 64")),
        (["sae=matryoshka", "sae.sampled=49"], ("sae.sampled=49", "48")),
        (["sae=gated", "sae.skipp=true"], ("sae.skipp", "sae.skip")),
        (["sae=transcodder"], ("transcodder", "transcoder")),
        (["saes={a: {sae: {kind: transcoder}}}"], ("sae.kind='transcoder'", "autoencoder")),
        (["saes={a: {target: mlp_out.1}}"], ("sae.kind='autoencoder'", "transcoder")),
    ],
)
def test_what_does_not_fit_together_is_answered_in_one_line_before_weights_load(
    asked, words, tiny, tmp_path, capsys, monkeypatch
):
    def load(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(language_model, "load_model", load)
    code = main(["train", *tiny, *asked])
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("sae-train ")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in err, (code, err)
    for word in words:
        assert word in lines[0], (word, lines[0])


def test_members_of_other_architectures_and_kinds_train_side_by_side(tiny, zygote, tmp_path):
    saes = (
        "saes={plain: {}, gated: {sae: {name: gated, activation: {k: 2}}}, "
        "through: {hook: mlp_in.1, target: mlp_out.1, sae: {kind: transcoder, skip: true}}, "
        "across: {hook: resid_post.0+resid_post.2, sae: {kind: crosscoder}}}"
    )
    zygote.run("train", *tiny, saes, f"run.dir={tmp_path / 'run'}", plots=False)
    saved = {folder.name: load_sae(folder).config for folder in (tmp_path / "run" / "saes").iterdir()}
    assert {name: (sae.name, sae.kind) for name, sae in saved.items()} == {
        "plain": ("linear", "autoencoder"),
        "gated": ("gated", "autoencoder"),
        "through": ("linear", "transcoder"),
        "across": ("linear", "crosscoder"),
    }
    steps = (tmp_path / "run" / "train.log").read_text()
    assert "steps of plain, across are fused, the others go through autograd: gated is not a linear" in steps
