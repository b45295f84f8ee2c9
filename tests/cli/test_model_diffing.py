"""A crosscoder over two models at one hook, by the commands that a user gives: a tiny model and the same with
its weights perturbed, as fine-tuning leaves them."""

import json
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from faults.tools import kill_once_saved
from safetensors.torch import load_file, save_file

from sae_train import load_sae
from sae_train.cli import language_model
from sae_train.cli.main import main
from sae_train.metrics.sharing import decoder_shares
from sae_train.shards.disk import DiskShards

BOTH = ["hook=resid_post.1+resid_post.1@other", "sae.kind=crosscoder"]
TINY = [
    "corpus.context_length=16", "corpus.holdout=0.25", "corpus.epochs=2", "source.shard_tokens=256",
    "source.lanes=2", "sae.d_sae=48", "sae.activation.k=4", "train.tokens=640", "train.batch_tokens=32",
    "eval.tokens=200", "eval.ce_tokens=64", "eval.every=0", "logger.every=2", "checkpoint.every=5",
    "run.threads=1",
]  # fmt: skip
pytestmark = pytest.mark.usefixtures("no_pictures")
SCORES = ("ce_clean", "ce_sae", "ce_zero", "ce_mean", "kl_sae", "recovered_mean")


@pytest.fixture(scope="module")
def tuned_dir(
    tiny_model_dir: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[], Path]:
    """A folder of its own with the tiny Llama, every weight moved a little."""

    def make() -> Path:
        folder = tmp_path_factory.mktemp("tuned") / "model"
        shutil.copytree(tiny_model_dir("llama"), folder)
        weights, generator = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(5)
        moved = {name: w + 0.03 * torch.randn(w.shape, generator=generator) for name, w in weights.items()}
        save_file(moved, folder / "model.safetensors", {"format": "pt"})
        return folder

    return make


@pytest.fixture(scope="module")
def tuned(tuned_dir: Callable[[], Path]) -> Path:
    return tuned_dir()


@pytest.fixture
def one(tiny_model_dir: Callable[[str], Path], tiny_corpus_dir: Path) -> list[str]:
    return [f"model.name={tiny_model_dir('llama')}", f"corpus.name={tiny_corpus_dir}", *TINY]


@pytest.fixture
def two(one: list[str], tuned: Path) -> list[str]:
    return [*one, f"model.other={tuned}", *BOTH]


def ok(*args: str) -> None:
    assert main(list(args)) == 0


def numbers(run: Path, member: str = "main", name: str = "metrics") -> dict[str, float]:
    return json.loads((run / "saes" / member / f"{name}.json").read_text())


def same_bits(one: Path, two: Path) -> None:
    a, b = (load_file(run / "saes/main/sae.safetensors") for run in (one, two))
    assert a.keys() == b.keys() and a
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run `train`; it must answer 2 with one line that holds all the given words."""

    def run(args: list[str], *words: str) -> str:
        capsys.readouterr()
        code = main(["train", *args])
        err = capsys.readouterr().err
        lines = [line for line in err.splitlines() if line.startswith("sae-train ")]
        assert code == 2, (code, err)
        assert len(lines) == 1 and "Traceback" not in err, err
        assert all(word in lines[0] for word in words), (words, lines[0])
        return lines[0]

    return run


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language_model, "load_model", lambda *_: pytest.fail("weights were loaded"))


# -- what a run gives -------------------------------------------------------------------------------


def test_a_crosscoder_of_two_models_is_trained_judged_in_both_and_says_which_they_were(
    two, tuned, tiny_model_dir, tmp_path
):
    run = tmp_path / "run"
    ok("train", *two, f"run.dir={run}")
    told = numbers(run)
    for key in SCORES:
        assert key in told and f"other/{key}" in told, key
    assert told["ce_clean"] != told["other/ce_clean"] and told["other/tokens"] == told["tokens"]
    assert {"fvu/resid_post.1", "fvu/resid_post.1@other"} <= told.keys()
    published = json.loads((run / "saes/main/config.json").read_text())
    meta = published["meta"]
    assert published["widths"]["inputs"] == [32, 32] and meta["hook"] == "resid_post.1+resid_post.1@other"
    assert meta["model"] == str(tiny_model_dir("llama")) and meta["other_model"] == str(tuned)
    revisions = [meta[key] for key in ("model_revision", "other_model_revision")]
    assert all(revision.startswith("xxh3:") for revision in revisions) and len(set(revisions)) == 2
    fingerprint = json.loads((run / "run.json").read_text())["fingerprint"]
    assert fingerprint["other_model"] == str(tuned) and fingerprint["other_model_revision"] == revisions[1]
    ok("eval", f"run={run}")
    again = numbers(run, name="eval")
    assert again.keys() == told.keys() - {"dead"}
    assert any(again[key] is not None for key in again if "recovered" in key)
    for key in again:
        if again[key] is None:  # nan: of random weights, which an ablation may improve
            assert "recovered" in key and told[key] is None
            continue
        # the published weights are folded, which rounds differently
        assert again[key] == pytest.approx(told[key], rel=1e-4, abs=1e-6), key


def test_shards_of_two_models_train_to_the_bits_of_the_live_models(two, tmp_path):
    live, disk, shards = tmp_path / "live", tmp_path / "disk", tmp_path / "shards"
    ok("train", *two, f"run.dir={live}")
    ok("harvest", *two, f"out={shards}")
    recipe = [arg for arg in TINY if not arg.startswith("corpus.")]
    ok("train", "source=shards", f"source.path={shards}", *BOTH, *recipe, f"run.dir={disk}")
    same_bits(live, disk)
    assert "ce_sae" not in numbers(disk)
    harvest = json.loads((shards / "harvest.json").read_text())
    assert harvest["dims"] == {"resid_post.1": 32, "resid_post.1@other": 32}
    assert {"model_revision", "other_model_revision"} <= harvest["fingerprint"].keys()


def test_harvested_rows_of_two_models_are_those_of_each_harvested_alone(
    two, one, tuned, tiny_model_dir, tmp_path
):
    # All hooks decide on sinks: where those are kept, the same positions are in every harvest.
    keep = ["filter.sinks=false", "source.prefetch=0"]
    ok("harvest", *two, *keep, f"out={tmp_path / 'both'}")
    for name, model in (("resid_post.1", tiny_model_dir("llama")), ("resid_post.1@other", tuned)):
        folder = tmp_path / model.parent.name
        ok("harvest", *one, *keep, "hook=resid_post.1", f"model.name={model}", f"out={folder}")
        both, alone = DiskShards(tmp_path / "both").next_shard(), DiskShards(folder).next_shard()
        assert torch.equal(both.ids, alone.ids)
        assert torch.equal(both.rows[name], alone.rows["resid_post.1"]), name


def test_of_one_model_twice_every_latent_is_shared(one, tiny_model_dir, tmp_path):
    run = tmp_path / "run"
    same = [*one, f"model.other={tiny_model_dir('llama')}", *BOTH]
    longer = ["train.tokens=12800", "corpus.epochs=40", "eval.every=0", "sae.auxk_coefficient=0"]
    ok("train", *same, *longer, f"run.dir={run}")
    told = numbers(run)
    assert told["fvu/resid_post.1"] == pytest.approx(told["fvu/resid_post.1@other"], rel=0.02)
    for key in ("ce_clean", "ce_zero", "ce_mean"):
        assert told[f"other/{key}"] == told[key], key
    sae, features = load_sae(run / "saes/main"), load_file(run / "saes/main/features.safetensors")
    fired = features["train_counts"] > 500
    assert fired.sum() >= 8, "too few latents to say anything"
    shares = decoder_shares(sae)[fired]  # in raw units: the two hooks have one scale
    # Written in the units of training, where the two scales are computed each from its own, equal rows.
    assert torch.allclose(features["decoder_shares"][fired], shares, rtol=1e-5)
    report, card = (run / "report.html").read_text(), (run / "saes/main/README.md").read_text()
    assert "Whose latents are whose" in report and "second model" in report
    assert card.count(str(tiny_model_dir("llama"))) == 2
    here, there = sae.w_dec[fired].split(32, dim=-1)
    cosine = torch.cosine_similarity(here, there, dim=-1)
    # Decoders start as random unit vectors, whose halves have shares of 0.5 +- 0.06 and cosines of 0 +- 0.18.
    assert (shares - 0.5).abs().max() < 0.03, shares
    assert cosine.min() > 0.9, cosine


def test_members_of_one_model_each_and_of_both_share_a_harvest_and_can_be_judged_alone(
    one, tuned, tmp_path, monkeypatch
):
    run = tmp_path / "run"
    members = (
        "saes={base: {hook: resid_post.1}, tuned: {hook: resid_post.1@other}, "
        "both: {hook: resid_post.1+resid_post.1@other, sae: {kind: crosscoder}}, "
        "across: {hook: resid_post.1, target: resid_post.1@other, sae: {kind: transcoder}}}"
    )
    ok("train", *one, "hook=resid_post.1", f"model.other={tuned}", members, f"run.dir={run}")
    found = {name: numbers(run, name) for name in ("base", "tuned", "both", "across")}
    for name in ("base", "tuned", "across"):
        assert not [key for key in found[name] if key.startswith("other/")], name
    assert found["base"]["ce_clean"] == pytest.approx(found["both"]["ce_clean"], rel=1e-5)
    assert found["tuned"]["ce_clean"] == pytest.approx(found["both"]["other/ce_clean"], rel=1e-5)
    assert found["across"]["ce_clean"] == found["tuned"]["ce_clean"] != found["base"]["ce_clean"]
    real, loaded = language_model.load_model, []
    monkeypatch.setattr(
        language_model, "load_model", lambda config, *rest: loaded.append(config.name) or real(config, *rest)
    )
    for name, models in (("base", 1), ("tuned", 2), ("both", 2)):
        loaded.clear()
        ok("eval", f"run={run / 'saes' / name}")
        assert len(loaded) == models, (name, loaded)
        again = numbers(run, name, "eval")
        assert again["ce_clean"] == pytest.approx(found[name]["ce_clean"], rel=1e-5), name
        assert again["fvu_all"] == pytest.approx(found[name]["fvu_all"], rel=0.1), name


# -- resume -----------------------------------------------------------------------------------------


def test_a_killed_run_over_two_models_continues_to_the_same_bits(two, zygote, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    often = [*two, "checkpoint.every=3"]
    ok("train", *often, f"run.dir={whole}")
    zygote.run("train", *often, f"run.dir={cut}", before=kill_once_saved(cut, 10), code=-signal.SIGKILL)
    assert not (cut / "saes").exists()
    ok("train", *often, f"run.dir={cut}")
    (again,) = re.findall(r"continuing from step (\d+) of 20", (cut / "train.log").read_text())
    assert 3 <= int(again) < 20
    same_bits(whole, cut)


def test_a_run_is_not_continued_with_another_second_model(one, tuned_dir, tmp_path, refused):
    model, run = tuned_dir(), tmp_path / "run"
    args = [*one, f"model.other={model}", *BOTH, "train.tokens=100000", f"run.dir={run}"]
    refused(args, "train.tokens")
    weights = model / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    refused(args, "other_model_revision", "changed")
    refused([*args, f"model.other={tuned_dir()}"], "model.other", str(model))


# -- refusals ---------------------------------------------------------------------------------------


def test_a_second_model_and_hooks_in_it_come_together(two, one, tuned, refused, no_weights):
    refused([*one, *BOTH], "model.other=None", "resid_post.1@other", "folder")
    refused([*two, "hook=resid_post.1", "sae.kind=autoencoder"], "model.other", str(tuned), "@other")
    refused([*two, "hook=resid_post.0+resid_post.1"], "model.other", "@other")
    refused([*one, *BOTH, "model.other_revision=main"], "model.other_revision", "model.other")
    refused([*two, "sae.kind=autoencoder"], "sae.kind", "crosscoder")


def test_a_second_model_that_cannot_be_read_as_the_first_is_refused_before_weights_load(
    two, tmp_path, tuned_dir, refused, no_weights
):
    refused([*two, "model.other=./nowhere"], "model.other='./nowhere'", "folder that exists")
    refused([*two, f"model.other={tmp_path}"], "model.other", "config.json")
    refused([*two, "hook=resid_post.1+resid_post.9@other"], "resid_post.9@other", "model.other", "0 to 2")
    refused([*two, "hook=resid_post.1@other+blocks.1.hook_resid_post@other"], "resid_post.1@other", "once")

    def edited(file: str, edit: Callable[[dict], object]) -> str:
        folder = tuned_dir()
        tree = json.loads((folder / file).read_text())
        edit(tree)
        (folder / file).write_text(json.dumps(tree))
        return f"model.other={folder}"

    short = edited("config.json", lambda tree: tree.update(max_position_embeddings=8))
    refused([*two, short], "corpus.context_length=16", "at most 8", "model.other")
    few = edited("config.json", lambda tree: tree.update(vocab_size=100))
    refused([*two, few], "model.other", "127", "100")
    words = edited("tokenizer.json", lambda tree: tree["model"]["vocab"].update(w5=8, w4=9))
    refused([*two, words], "model.other", "2 tokens have other ids", "'w4'", "model.tokenizer")
    (Path(words.partition("=")[2]) / "tokenizer.json").write_text("{")
    refused([*two, words], "model.other", "transformers")


def test_naming_one_tokenizer_for_both_lets_a_second_model_with_another_in(
    two, tuned_dir, tiny_model_dir, tmp_path
):
    folder = tuned_dir()
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace('"w100"', '"<|user|>"'))
    args = [f"model.other={folder}", f"model.tokenizer={tiny_model_dir('llama')}", "train.tokens=64"]
    ok("train", *two, *args, f"run.dir={tmp_path / 'run'}")
    assert "other/ce_sae" in numbers(tmp_path / "run")
