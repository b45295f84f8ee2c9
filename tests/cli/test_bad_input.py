"""What a user can get wrong is answered with exit code 2 and one line, before any weights are loaded."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae_train.activations.topk import TopKConfig
from sae_train.cli import language_model
from sae_train.cli.eval import at_commits
from sae_train.cli.folder import owned
from sae_train.cli.main import main
from sae_train.config import Config
from sae_train.errors import NumericsError, StoppedEarly
from sae_train.harvest.corpus import CorpusConfig, Documents
from sae_train.harvest.model import ModelConfig
from sae_train.places import Widths
from sae_train.sae.base import SAES
from sae_train.sae.io import save_sae
from sae_train.sae.linear import LinearConfig, LinearSAE
from sae_train.train.trainer import Trainer

TINY = ["hook=resid_post.1", "corpus.context_length=16", "corpus.holdout=0.25", "source.shard_tokens=256",
        "source.lanes=2", "sae.d_sae=48", "sae.activation.k=4", "train.tokens=320", "train.batch_tokens=32",
        "eval.tokens=100", "eval.ce_tokens=0"]  # fmt: skip


@pytest.fixture
def refused(capsys, tmp_path, monkeypatch):
    """Run a command; it must answer 2 with one line that holds all the given words."""
    monkeypatch.chdir(tmp_path)

    def run(args: list[str], *words: str) -> str:
        code = main(args)
        err = capsys.readouterr().err
        lines = [line for line in err.splitlines() if line.startswith("sae-train ")]
        assert code == 2, (code, err)
        assert len(lines) == 1 and "Traceback" not in err, err
        for word in words:
            assert word in lines[0], (word, lines[0])
        return lines[0]

    return run


@pytest.fixture
def no_weights(monkeypatch, request):
    """Loading a model's weights fails the test (only transformers itself can judge an attention's name)."""
    if "attn_implementation" in request.node.name:
        return

    def load(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(language_model, "load_model", load)


@pytest.fixture
def tiny(tiny_model_dir, tiny_corpus_dir, no_pictures) -> list[str]:
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
        ("k=3", ("k='3'", "sae.activation.k=3")),
        ("sae.k=3", ("sae.k='3'", "sae.activation.k=3")),
        ("activation=jumprelu", ("activation='jumprelu'", "sae/activation=jumprelu")),
        ("hook=resid_post.1,resid_post.2", ("hook", "[resid_post.1,resid_post.2]", "sweep")),
        ("sae/activation=jumprelu", ("sae.activation.k", "jumprelu", "target_l0")),
        ("optm.lr=1", ("optm.lr", "optim.lr")),
        ("train.token=5", ("train.token", "train.tokens")),
        ("run.name=a/b", ("run.name", "a/b")),
        ("saes={x: {sae: {activation: {q: 3}}}}", ("saes.x.sae.activation.q=3", "k_start")),
        ("saes={x: {optim: {lr: fast}}}", ("saes.x.optim.lr='fast'", "a number")),
        ("saes={x: {hok: 3}}", ("saes.x.hok=3", "a key of a member: hook, target")),
        ("saes={x: {sae: 3}}", ("saes.x=", "what differs")),
        ("grid={kk: [4, 8]}", ("grid.kk=[4, 8]", "a key of a member", "a short name: k,")),
        ("grid={k: [4], target_l0: [3]}", ("grid.target_l0=[3]", "a key of sae.activation: name, k")),
        ("grid={k: [many]}", ("grid.k=['many']", "a whole number")),
        ("corpus.name=[a,b]", ("corpus.name=", "one text, not a list")),
        ("corpus.name=no/such/*.jsonl", ("corpus.name='no/such/*.jsonl'", "some file matches")),
        ("saes={../x: {}}", ("saes",)),
        ("sae.activation.k", ("override", "sae.activation.k", "key=value")),
        ("~optim.lr", ("override", "deleted")),
        ("+extra=1", ("extra", "train")),
        ("hook=[]", ("hook", "at least one")),
        ("hook=[resid_post.1,blocks.1.hook_resid_post]", ("hook", "once", "resid_post.1")),
        ("saes={a: 3}", ("saes.a", "3")),
        ("saes={a: {sae: {d_sae: 3}}}", ("sae.activation.k", "4", "d_sae=3")),
        ("saes={a: {seed: -1}}", ("saes.a.seed", "-1")),
        ("saes={a: {hook: [resid_post.1]}}", ("saes.a.hook",)),
        ("saes=5", ("saes", "5")),
        ("sae.name=foo", ("sae.name", "foo", "linear")),
        ("sae.d_sae=1000000000000", ("sae.d_sae", "1000000000000")),
        ("run.seed=99999999999999999999999", ("run.seed",)),
        ("run.threads=100000", ("run.threads", "100000")),
        ("run.dir=", ("run.dir",)),
        ("source.shard_tokens=1", ("source.shard_tokens", "lanes")),
        ("corpus.sources=3", ("corpus.sources", "3", "list")),
        ("model.attn_implementation=foo", ("model.attn_implementation",)),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named_before_weights_load(tiny, refused, no_weights, override, words):
    refused(["train", *tiny, override], *words)


def test_keys_of_the_chosen_architecture_are_known_ones(tiny, refused, no_weights):
    refused(
        ["train", *tiny, "sae=matryoshka", "sae.prefixes=[0.25,1]"], "sae.prefixes", "one text, not a list"
    )


def test_several_hooks_beside_named_members_are_refused(tiny, refused, no_weights):
    hooks = "hook=[resid_post.1,mlp_out.1]"
    refused(["train", *tiny, hooks, "saes={a: {}, b: {}}"], "hook=", "saes.NAME.hook")


def test_an_sae_that_cannot_be_the_start_is_named_before_weights_load(tiny, refused, no_weights, tmp_path):
    for name, more in (("gated", {}), ("linear", {"d_sae": 40}), ("linear", {"kind": "transcoder"})):
        config = SAES.config(name)(**{"d_sae": 48, "activation": TopKConfig(k=4)} | more)
        (tmp_path / "saes").mkdir()
        save_sae(SAES.build(config, Widths((32,), (32,) if more.get("kind") else ())), tmp_path / "saes", {})
        told = "not a " if name == "gated" or more.get("kind") else "of shape [48, 32], not [40, 32]"
        refused(["train", *tiny, f"start={tmp_path / 'saes'}"], "start=", told)
        shutil.rmtree(tmp_path / "saes")
    refused(["train", *tiny, f"start={tmp_path}"], "start=", "config.json")


def test_more_rows_than_there_are_is_answered_before_any_is_read(refused, tmp_path, monkeypatch):
    """With rows of the user's own, made up, and harvested; a text has to be read to know."""
    monkeypatch.setattr(Trainer, "fit", None)
    save_file({"activations": torch.randn(100, 8)}, tmp_path / "rows.safetensors")
    shared = [
        "sae.d_sae=16",
        "sae.activation.k=2",
        "train.batch_tokens=8",
        "source.lanes=2",
        "source.shard_tokens=16",
    ]
    made = [
        "source=synthetic",
        "source.synthetic={d: 8, features: 16, groups: 2, group_size: 4, l0: 2, rows: 90}",
    ]
    own = ["source=tensors", f"source.paths=[{tmp_path / 'rows.safetensors'}]", "source.holdout=0.1"]
    assert main(["harvest", *made, *shared[2:], "train.tokens=64", "eval.tokens=8", "out=shards"]) == 0
    harvested = ["source=shards", "source.path=shards"]
    for source, rows in ((made, 90), (own, 90), (harvested, 64)):
        refused(
            ["train", *source, *shared], "train.tokens=10000000", f"at most {rows}, the rows that source="
        )
        refused(["train", *source, *shared, f"train.tokens={rows + 8}"], "train.tokens", f"at most {rows}")
        twice = [f"train.tokens={2 * rows + 8}", "source.epochs=2"]
        refused(["train", *source, *shared, *twice], "train.tokens", f"at most {2 * rows}")
    assert not list(tmp_path.glob("runs/*/checkpoints/step-*"))


def test_a_model_beside_shards_that_were_not_harvested_from_it_is_said_to_have_no_effect(
    tiny, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main(["harvest", *tiny, "out=shards"]) == 0
    own = next(argument for argument in tiny if argument.startswith("model.name="))
    rest = ["source=shards", "source.path=shards", *TINY, "eval.every=0"]
    for model, said in (([], False), ([own], False), (["model.name=gpt2"], True)):
        capsys.readouterr()
        assert main(["train", *rest, *model, f"run.dir=run{len(model)}{said}"]) == 0
        assert ("model.name=gpt2 has no effect" in capsys.readouterr().err) == said


def test_keys_that_made_no_row_are_named_in_one_warning(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["harvest", *tiny, "filter.sinks=false", "model.dtype=float32", "out=shards"]) == 0
    rest = ["train", *tiny, "source=shards", "source.path=shards", "eval.every=0", "model.device=cpu"]
    capsys.readouterr()
    assert main([*rest, "filter.sinks=false", "model.dtype=float32", "run.dir=same"]) == 0
    assert "no effect" not in capsys.readouterr().err
    changed = ["filter.sink_multiple=3", "corpus.bos=none", "model.dtype=bfloat16"]
    assert main([*rest, *changed, "corpus.allow_short=true", "run.dir=other"]) == 0
    [line] = [line for line in capsys.readouterr().err.splitlines() if "no effect" in line]
    assert "model.dtype=bfloat16, corpus.bos=none, filter.sink_multiple=3.0 have no effect" in line
    assert "model.dtype=float32, corpus.bos=auto, filter.sink_multiple=10.0" in line

    save_file({"activations": torch.randn(1000, 8)}, tmp_path / "rows.safetensors")
    own = ["source=tensors", "source.paths=[rows.safetensors]", "source.holdout=0.1", "sae.d_sae=16"]
    own += ["source.lanes=2", "source.shard_tokens=64", "train.batch_tokens=8", "train.tokens=64"]
    own += ["sae.activation.k=2", "eval.tokens=32"]
    for keys, said in (
        ([], None),
        (["filter.nonfinite=false", "corpus.seed=3"], "corpus.seed=3, filter.nonf"),
    ):
        assert main(["train", *own, *keys, f"run.dir=own{len(keys)}"]) == 0
        lines = [line for line in capsys.readouterr().err.splitlines() if "no effect" in line]
        assert len(lines) == (said is not None) and (said is None or said in lines[0])


def test_a_wrong_command_or_missing_key_is_answered(refused):
    refused(["trian"], "trian", "train")
    refused(["train"], "hook")
    refused(["train", "hook=resid_post.1"], "model.name")
    refused(["status", "run=nowhere"], "nowhere")
    refused(["eval", "run=nowhere"], "nowhere")
    refused(["eval"], "run")


def test_a_model_that_is_not_there_is_answered(tiny, refused, zygote, tmp_path):
    canary = {"HF_TOKEN": "hf_canary_0123456789"}
    told = zygote.run("train", *tiny, "model.name=nobody/nothing", env=canary, code=2)  # it is offline
    assert "Traceback" not in told and "model.name='nobody/nothing'" in told and "canary" not in told
    refused(["train", *tiny, f"model.name={tmp_path}"], "model.name", "config.json")


def test_half_a_model_is_refused(tiny, refused, tiny_model_dir, tmp_path):
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
    told, last = capsys.readouterr().err, json.loads((run / "summary.json").read_text())
    assert "data ended" in told
    end = told.strip().splitlines()[-1]
    assert f"{last['tokens']:,} of 100,000 tokens" in end and "done" in end and "left" not in end
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any(line["step"] == last["steps"] and "main/loss" in line for line in logged)


@pytest.mark.parametrize("text", ["w1", "w1 w2 w3", "w1 w2 w3 " * 500])
def test_one_document_is_answered_before_weights_load(tiny, refused, no_weights, tmp_path, text):
    (tmp_path / "one.txt").write_text(text)
    refused(["train", *tiny, f"corpus.name={tmp_path / 'one.txt'}"], "corpus.")


def test_too_little_text_is_answered_with_the_count_needed(tiny, refused, no_weights, tmp_path):
    corpus = tmp_path / "few"
    corpus.mkdir()
    for i in range(6):
        (corpus / f"{i}.txt").write_text(f"w{i} w7 w8")
    args = ["train", *tiny, f"corpus.name={corpus}", "source.lanes=8", "corpus.holdout=0.5"]
    refused(args, "corpus.name", "8 training windows of 16 tokens", "not ")


def test_a_corpus_that_stays_away_is_saved_and_may_be_continued(tiny, tmp_path, monkeypatch, capsys):
    real, seen, run = Documents.__next__, [], tmp_path / "run"

    def read(self):
        if self.split == "train" and len(seen) >= 200:
            raise StoppedEarly("could not be read in 3 attempts")
        seen.append(1)
        return real(self)

    monkeypatch.setattr(Documents, "__next__", read)
    few = ["train.tokens=64000", "corpus.epochs=99", "corpus.shuffle_windows=8", "source.prefetch=0"]
    assert main(["train", *tiny, *few, f"run.dir={run}"]) == 75
    assert "3 attempts" in capsys.readouterr().err
    assert list((run / "checkpoints").glob("step-*"))


def test_a_tokenizer_with_ids_beyond_the_model_is_answered(
    tiny, refused, no_weights, tiny_model_dir, tmp_path
):
    other = tmp_path / "other"
    shutil.copytree(tiny_model_dir("llama"), other)
    tree = json.loads((other / "tokenizer.json").read_text())
    tree["model"]["vocab"]["w999"] = 500
    (other / "tokenizer.json").write_text(json.dumps(tree))
    refused(["train", *tiny, f"model.tokenizer={other}"], "model.tokenizer", "500", "128")


def test_modules_that_are_no_hooks_are_answered(tiny, refused, no_weights):
    refused(["train", *tiny, "hook=model.rotary_emb"], "hook", "model.rotary_emb")
    refused(["train", *tiny, "hook=model.embed_tokens:in"], "hook", "int64")


def test_an_sae_of_another_width_is_answered(tiny, refused, tmp_path):
    run = tmp_path / "run"
    assert main(["train", *tiny, f"run.dir={run}"]) == 0
    other = LinearSAE(LinearConfig(d_sae=48), 20)
    save_sae(other, run / "saes/main", {"hook": "resid_post.1"})
    refused(["eval", f"run={run}"], "20", "32")


def test_two_runs_never_share_a_folder(tiny, refused, tmp_path):
    run = tmp_path / "run"
    with owned("run.dir", run):
        refused(["train", *tiny, f"run.dir={run}"], "run.dir", str(os.getpid()))
        refused(["harvest", *tiny, f"out={run}"], "out", str(os.getpid()))
    assert main(["train", *tiny, f"run.dir={run}"]) == 0


def test_a_harvest_into_a_file_is_answered_before_weights_load(tiny, refused, no_weights, tmp_path):
    (tmp_path / "file").write_text("")
    refused(["harvest", *tiny, f"out={tmp_path / 'file'}"], "out", "file")


def test_a_lost_record_does_not_let_another_recipe_in(tiny, refused, tmp_path):
    run = tmp_path / "run"
    args = ["train", *tiny, "train.tokens=100000", f"run.dir={run}"]
    refused(args, "train.tokens")
    (run / "run.json").unlink()
    refused([*args, "optim.lr=0.5"], "optim.lr")
    refused(args, "train.tokens")


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"format_version": 1}'])
def test_a_damaged_record_is_answered(tiny, refused, tmp_path, damage):
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text(damage)
    for args in (["train", *tiny, f"run.dir={run}"], ["status", f"run={run}"], ["eval", f"run={run}"]):
        refused(args, "run.json")


def test_tensors_without_usable_rows_are_answered(refused, tmp_path):
    recipe = ["sae.d_sae=24", "sae.activation.k=3", "train.tokens=320", "train.batch_tokens=32"]
    save_file({"activations": torch.full((500, 12), float("nan"))}, tmp_path / "nan.safetensors")
    save_file({"activations": torch.zeros(0, 12)}, tmp_path / "none.safetensors")
    base = ["train", "source=tensors", *recipe]
    refused([*base, f"source.paths=[{tmp_path}/nan.safetensors]"], "source.paths", "finite")
    refused([*base, f"source.paths=[{tmp_path}/none.safetensors]"], "source.paths", "more rows")


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_rows_without_variance_still_end_in_a_report(tmp_path, value):
    save_file({"activations": torch.full((4000, 12), value)}, tmp_path / "flat.safetensors")
    run, recipe = tmp_path / "run", ["sae.d_sae=24", "sae.activation.k=3", "train.tokens=320"]
    source = ["source=tensors", f"source.paths=[{tmp_path}/flat.safetensors]"]
    assert main(["train", *source, *recipe, "train.batch_tokens=32", f"run.dir={run}"]) == 0
    assert (run / "report.html").exists()
    assert "NaN" not in (run / "summary.json").read_text()


def test_numbers_gone_bad_end_with_exit_code_3(tiny, tmp_path, monkeypatch, capsys):
    def fit(*args):
        raise NumericsError("gradients were not finite")

    monkeypatch.setattr(Trainer, "fit", fit)
    assert main(["train", *tiny, f"run.dir={tmp_path / 'run'}"]) == 3
    assert "gradients were not finite" in capsys.readouterr().err


def test_gradients_that_stay_bad_end_the_run_and_keep_the_last_good_step(tmp_path, capsys):
    x = torch.randn(4000, 12)
    save_file({"activations": x}, tmp_path / "x.safetensors")
    recipe = ["sae.d_sae=24", "sae.activation.k=3", "train.tokens=1600", "train.batch_tokens=32"]
    run = tmp_path / "run"
    args = ["train", "source=tensors", f"source.paths=[{tmp_path}/x.safetensors]", *recipe]
    every = ["checkpoint.every=10", "logger.every=1", "optim.lr=1e38", "optim.clip=null", "optim.eps=1e-30"]
    assert main([*args, *every, f"run.dir={run}"]) == 3
    assert "not finite" in capsys.readouterr().err


def test_a_run_whose_data_ended_goes_on_when_it_may_be_short(tiny, refused, tmp_path):
    run = tmp_path / "run"
    args = ["train", *tiny, "train.tokens=2000", f"run.dir={run}"]
    refused(args, "train.tokens", "corpus.epochs")
    assert main([*args, "corpus.epochs=20"]) == 0
    steps = json.loads((run / "run.json").read_text())["step"]
    assert steps == 2000 // 32


def test_emulated_bfloat16_is_said_once(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("sae_train.cli.train.native_bfloat16", lambda device: False)
    run = tmp_path / "run"
    assert main(["train", *tiny, "train.autocast=bfloat16", f"run.dir={run}"]) == 0
    assert (run / "train.log").read_text().count("emulates") == 1


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


def test_a_run_is_not_judged_on_changed_text_or_another_model(
    tiny, refused, tmp_path, tiny_model_dir, tiny_corpus_dir
):
    corpus, model, run = tmp_path / "corpus", tmp_path / "model", tmp_path / "run"
    shutil.copytree(tiny_corpus_dir, corpus)
    shutil.copytree(tiny_model_dir("llama"), model)
    places = [f"corpus.name={corpus}", f"model.name={model}", f"run.dir={run}"]
    assert main(["train", *tiny, *places]) == 0
    judge, export = ["eval", f"run={run}"], ["export", f"run={run}", "format=saelens", "out=out"]
    assert main(judge) == 0
    numbers = (run / "saes/main/eval.json").read_bytes()
    first = sorted(corpus.iterdir())[0]
    text = first.read_text()
    first.write_text(text.replace("w", "w1", 1))
    for command in (judge, export):
        refused(command, "corpus.0.files", "changed")
    first.write_text(text)
    weights = load_file(model / "model.safetensors")
    save_file({key: x * 1.1 for key, x in weights.items()}, model / "model.safetensors", {"format": "pt"})
    for command in (judge, export):
        refused(command, "model_revision", "changed")
    assert (run / "saes/main/eval.json").read_bytes() == numbers
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"fingerprint": {}}))
    assert main(judge) == 0


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


def test_what_the_hub_has_now_is_not_what_a_run_is_judged_on():
    commits = {"model_revision": "a" * 40, "corpus.0.revision": "b" * 40}
    config = Config(model=ModelConfig(name="me/model"), corpus=CorpusConfig(name="me/text"))
    judged = at_commits(config, commits)
    assert (judged.model.revision, judged.corpus.revision) == ("a" * 40, "b" * 40)
    local = {"model_revision": "c" * 32, "corpus.0.files": "d" * 32}  # digests
    assert at_commits(config, local) == config
