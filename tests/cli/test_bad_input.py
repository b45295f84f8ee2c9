"""What a user can get wrong is answered with exit code 2 and one line, before any weights are loaded."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file

from sae_train.cli.main import main

TINY = ["hook=resid_post.1", "corpus.context_length=16", "corpus.holdout=0.25", "source.shard_tokens=256",
        "source.lanes=2", "sae.d_sae=48", "sae.activation.k=4", "train.tokens=320", "train.batch_tokens=32",
        "eval.tokens=100", "eval.ce_tokens=0"]  # fmt: skip


@pytest.fixture
def refused(capsys, tmp_path, monkeypatch):
    """Run a command; it must answer 2 with one line that holds all the given words."""
    monkeypatch.chdir(tmp_path)

    def run(args: list[str], *words: str) -> str:
        started = time.monotonic()
        code = main(args)
        err = capsys.readouterr().err
        lines = [line for line in err.splitlines() if line.startswith("sae-train ")]
        assert code == 2, (code, err)
        assert len(lines) == 1 and "Traceback" not in err, err
        for word in words:
            assert word in lines[0], (word, lines[0])
        assert time.monotonic() - started < 10
        return lines[0]

    return run


@pytest.fixture
def tiny(tiny_model_dir, tiny_corpus_dir) -> list[str]:
    return [f"model.name={tiny_model_dir('llama')}", f"corpus.name={tiny_corpus_dir}", *TINY]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sae.activation.k=49", ("sae.activation.k", "49", "48")),
        ("sae.activation.k=0", ("sae.activation.k", "0", "at least 1")),
        ("sae.activation.k=-3", ("sae.activation.k", "-3")),
        ("sae.activation.k=3.5", ("sae.activation.k", "3.5", "whole number")),
        ("sae.d_sae=0", ("sae.d_sae", "0")),
        ("sae.expansion=0", ("sae.expansion", "0")),
        ("optim.lr=0", ("optim.lr", "0", "positive")),
        ("optim.lr=-1e-3", ("optim.lr", "positive")),
        ("optim.lr=nan", ("optim.lr", "nan")),
        ("optim.lr=fast", ("optim.lr", "fast", "number")),
        ("train.tokens=0", ("train.tokens", "0")),
        ("train.tokens=16", ("train.tokens", "16", "32")),
        ("train.batch_tokens=33", ("train.batch_tokens", "33", "lanes")),
        ("train.accumulate=5", ("train.accumulate", "5", "32")),
        ("train.autocast=int8", ("train.autocast", "int8")),
        ("train.ema=1", ("train.ema", "1")),
        ("corpus.context_length=0", ("corpus.context_length", "0")),
        ("corpus.context_length=100000", ("corpus.context_length", "100000", "at most")),
        ("corpus.holdout=1.5", ("corpus.holdout", "1.5")),
        ("checkpoint.keep=1", ("checkpoint.keep", "1", "2")),
        ("checkpoint.every=0", ("checkpoint.every", "0")),
        ("eval.metrics=[fvu,l1]", ("eval.metrics", "l1", "l0")),
        ("model.dtype=float8", ("model.dtype", "float8")),
        ("model.device=cuda", ("model.device", "cuda")),
        ("model.device=gpu", ("model.device", "gpu")),
        ("hook=resid_post.99", ("hook", "resid_post.99", "resid_post.2")),
        ("hook=resid_pst.1", ("hook", "resid_pst.1", "resid_post.1")),
        ("hook=[resid_post.1,resid_post.1]", ("hook", "once")),
        ("hook=model.layers.*.mlp", ("hook", "model.layers")),
        ("source=streams", ("source", "streams", "stream")),
        ("sae=lineer", ("sae", "lineer", "linear")),
        ("sae/activation=topkk", ("sae/activation", "topkk", "topk")),
        ("experiment=demos", ("experiment", "demos", "demo")),
        ("sae.activatoin.k=3", ("sae.activatoin.k", "sae.activation.k")),
        ("optm.lr=1", ("optm.lr", "optim.lr")),
        ("train.token=5", ("train.token", "train.tokens")),
        ("run.name=a/b", ("run.name", "a/b")),
        ("saes={x: {sae: {activation: {q: 3}}}}", ("saes.x", "q")),
        ("saes={../x: {}}", ("saes",)),
        ("sae.activation.k", ("override", "sae.activation.k", "key=value")),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named_with_what_would_be_accepted(tiny, refused, override, words):
    refused(["train", *tiny, override], *words)


def test_a_wrong_command_or_missing_key_is_answered(refused):
    refused(["trian"], "trian", "train")
    refused(["train"], "hook")
    refused(["train", "hook=resid_post.1"], "model.name")
    refused(["status", "run=nowhere"], "nowhere")
    refused(["eval", "run=nowhere"], "nowhere")
    refused(["eval"], "run")


def test_a_model_that_is_not_there_is_answered(tiny, refused, tmp_path):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_TOKEN": "hf_canary_0123456789"}
    command = [sys.executable, "-m", "sae_train", "train", *tiny, "model.name=nobody/nothing"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "model.name='nobody/nothing'" in done.stderr and "canary" not in done.stderr + done.stdout
    refused(["train", *tiny, f"model.name={tmp_path}"], "model.name", "config.json")


def test_half_a_model_is_refused(tiny, refused, tiny_model_dir, tmp_path):
    import shutil

    half = tmp_path / "half"
    shutil.copytree(tiny_model_dir("llama"), half)
    weights = half / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(["train", *tiny, f"model.name={half}"], "model.name", "half")


def test_a_corpus_that_cannot_serve_is_answered(tiny, refused, tmp_path):
    refused(["train", *tiny, "corpus.name=/nowhere/at/all"], "corpus.name", "/nowhere/at/all")
    refused(["train", *tiny, "corpus.name=null"], "corpus.name")
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    refused(["train", *tiny, f"corpus.name={empty}"], "corpus")
    table = tmp_path / "table.jsonl"
    table.write_text("\n".join(json.dumps({"body": "w1 w2"}) for _ in range(5)))
    refused(["train", *tiny, f"corpus.name={table}"], "text_column", "body")
    table.write_text("\n".join(json.dumps({"text": 5}) for _ in range(5)))
    refused(["train", *tiny, f"corpus.name={table}"], "5")


def test_a_corpus_of_special_tokens_only_is_answered(tiny, refused, tmp_path):
    folder = tmp_path / "special"
    folder.mkdir()
    for i in range(20):
        (folder / f"{i}.txt").write_text(f"{'<eos> ' * (5 + i)}")
    refused(["train", *tiny, f"corpus.name={folder}"], "corpus")


def test_a_corpus_shorter_than_the_budget_loses_nothing_and_says_how_many_rows_there_are(
    tiny, refused, tmp_path
):
    run = tmp_path / "run"
    line = refused(["train", *tiny, "train.tokens=100000", f"run.dir={run}"], "train.tokens", "allow_short")
    assert list((run / "checkpoints").iterdir()), line


def test_a_short_corpus_may_be_allowed(tiny, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["train", *tiny, "train.tokens=100000", "corpus.allow_short=true", f"run.dir={run}"]) == 0
    assert (run / "saes/main/sae.safetensors").exists()
    assert "data ended" in capsys.readouterr().err


def test_one_short_document_is_answered_with_the_count_needed(tiny, refused, tmp_path):
    corpus = tmp_path / "one"
    corpus.mkdir()
    (corpus / "a.txt").write_text("w1 w2 w3")
    refused(["train", *tiny, f"corpus.name={corpus}"], "corpus")


def test_a_run_folder_that_cannot_be_written_is_answered(tiny, refused, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    refused(["train", *tiny, f"run.dir={file}"], "run.dir", "file")


@pytest.mark.parametrize(
    "change", ["optim.lr=0.5", "sae.activation.k=3", "sae.d_sae=40", "run.seed=9", "corpus.context_length=8"]
)
def test_a_run_is_not_continued_with_another_recipe(tiny, refused, tmp_path, change):
    run = tmp_path / "run"
    refused(["train", *tiny, "train.tokens=100000", f"run.dir={run}"], "train.tokens")
    refused(
        ["train", *tiny, "train.tokens=100000", f"run.dir={run}", change], change.split("=")[0], "run.dir"
    )


def test_a_run_is_not_continued_on_changed_text_or_another_tokenizer(
    tiny, refused, tmp_path, tiny_model_dir, tiny_corpus_dir
):
    import shutil

    corpus, model = tmp_path / "corpus", tmp_path / "model"
    shutil.copytree(tiny_corpus_dir, corpus)
    shutil.copytree(tiny_model_dir("llama"), model)
    run = tmp_path / "run"
    args = [
        "train",
        *tiny,
        "train.tokens=100000",
        f"run.dir={run}",
        f"corpus.name={corpus}",
        f"model.name={model}",
    ]
    refused(args, "train.tokens")
    first = sorted(corpus.iterdir())[0]
    text = first.read_text()
    first.write_text(text.replace("w", "w1", 1))
    refused(args, "corpus", "changed")
    first.write_text(text)
    tokenizer = model / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"w10"', '"w10x"'))
    refused(args, "tokenizer", "changed")


def test_all_checkpoints_damaged_is_never_a_silent_fresh_start(tiny, refused, tmp_path):
    run = tmp_path / "run"
    args = ["train", *tiny, "train.tokens=100000", f"run.dir={run}"]
    refused(args, "train.tokens")
    for path in run.glob("checkpoints/step-*/state.safetensors"):
        data = bytearray(path.read_bytes())
        data[-5] ^= 1
        path.write_bytes(bytes(data))
    refused(args, "checkpoints", "damaged")


def test_a_checkpoint_or_run_of_a_newer_version_names_both_versions(tiny, refused, tmp_path):
    run = tmp_path / "run"
    args = ["train", *tiny, "train.tokens=100000", f"run.dir={run}"]
    refused(args, "train.tokens")
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"format_version": 9}))
    refused(args, "9", "1")


def test_tensors_that_do_not_fit_are_answered(refused, tmp_path):
    save_file({"acts": torch.randn(500, 12)}, tmp_path / "a.safetensors")
    save_file({"acts": torch.randn(500, 13)}, tmp_path / "b.safetensors")
    base = ["train", "source=tensors", "sae.d_sae=24", "sae.activation.k=3"]
    refused([*base], "source.paths")
    refused([*base, f"source.paths=[{tmp_path}/none.safetensors]"], "none.safetensors")
    refused([*base, f"source.paths=[{tmp_path}/a.safetensors]"], "activations", "acts")
    refused(
        [*base, f"source.paths=[{tmp_path}/a.safetensors,{tmp_path}/b.safetensors]", "source.key=acts"],
        "13",
        "12",
    )
    refused(["train", "source=shards"], "source.path")
    refused(["train", "source=shards", f"source.path={tmp_path}"], "source.path", "harvest")


def test_control_characters_in_names_do_not_reach_the_terminal(refused):
    line = refused(["train\x1b[31m"])
    assert "\x1b" not in line
