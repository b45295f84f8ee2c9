"""The card of a repository, the folder of each SAE in it, and what of a run's records goes into both."""

import contextlib
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from sae_train.activations.jumprelu import JumpReLUConfig
from sae_train.activations.topk import TopKConfig
from sae_train.errors import InputError
from sae_train.hub.card import Publication, draw_pareto, front_matter, repo_card
from sae_train.hub.runs import TrainedSAE, trained_saes
from sae_train.places import Widths
from sae_train.registry import discover
from sae_train.report import plots
from sae_train.report.card import card, metric_rows
from sae_train.sae.base import SAES
from sae_train.sae.io import save_sae
from sae_train.sae.linear import LinearConfig
from sae_train.train.checkout import project_commit
from sae_train.train.optim import OptimConfig
from sae_train.train.record import RunRecord

HOSTILE = "x\n---\nlicense: gpl\n---\n# owned | `rm` <script>alert(1)</script> ![](http://a/b) ```\n[x](y)"


def make_run(
    folder: Path,
    members: dict[str, Any] | None = None,
    meta: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    numbers: dict[str, Any] | None = None,
    lr: float | None = None,
) -> Path:
    """A finished run folder as training leaves it, without having trained."""
    discover("sae_train.activations")
    discover("sae_train.sae")
    members = members if members is not None else {"main": LinearConfig(d_sae=64, activation=TopKConfig(k=4))}
    record = RunRecord(
        "done",
        {"model": {"name": "me/model"}, "corpus": {"name": "me/text"}},
        {"a": "1"},
        {"threads": 1},
        10,
        10,
        640,
    )
    record.config |= config or {}
    record.versions = {"sae-train": "0.1.0", "torch": "2.13.0", "machine": "x86_64"}
    about = {
        "model": "me/model",
        "model_revision": "c" * 40,
        "hook": "resid_post.1",
        "tokens": 640,
        "seed": 0,
    }
    about |= {"corpus": "me/text"} | (meta or {})
    record.config["members"] = {}
    for name, sae_config in members.items():
        sae = SAES.build(sae_config, Widths((16,), ()))
        (folder / "saes" / name).mkdir(parents=True)
        save_sae(sae, folder / "saes" / name, about)
        told = {"fvu": 0.25, "l0": 4.0, "ce_clean": 3.0, "ce_sae": 3.5, "dead": None} | (numbers or {})
        (folder / "saes" / name / "metrics.json").write_text(json.dumps(told))
        record.config["members"][name] = {
            "optim": asdict(OptimConfig(lr=lr)),
            "sae": {"d_sae": 64},
            "seed": 0,
        }
    record.write(folder)
    return folder


def publication(*runs: Path, **more: Any) -> Publication:
    return Publication("me/saes", trained_saes([str(run) for run in runs], None, None), **more)


def matter(text: str) -> dict[str, Any]:
    """The front matter, read as the hub reads it: between the first two lines of dashes."""
    head, _, _ = text.removeprefix("---\n").partition("\n---\n")
    known: dict[str, Any] = yaml.safe_load(head)
    return known


def test_an_sae_is_named_by_hook_width_and_sparsity(tmp_path):
    members = {
        "k": LinearConfig(d_sae=2048, activation=TopKConfig(k=4)),
        "jump": LinearConfig(d_sae=64, activation=JumpReLUConfig(target_l0=12.5)),
    }
    saes = trained_saes([str(make_run(tmp_path / "r", members))], None, None)
    assert [sae.id for sae in saes] == ["resid_post.1/width_64/l0_12.5", "resid_post.1/width_2k/k_4"]
    run = make_run(tmp_path / "t", meta={"hook": "a.b:in+c", "target": "d/e"})
    (only,) = trained_saes([str(run)], "main", None)
    assert only.id == "a.b_in_c_to_d_e/width_64/k_4"


def test_saes_of_one_place_and_size_are_told_apart_by_what_differs_and_no_more(tmp_path):
    one, two = make_run(tmp_path / "one"), make_run(tmp_path / "two", meta={"seed": 1}, lr=0.5)
    three = make_run(tmp_path / "three", meta={"seed": 1}, lr=0.25)
    ids = [sae.id for sae in trained_saes([str(one), str(two)], None, None)]
    assert ids == [f"resid_post.1/width_64/k_4__seed_{seed}" for seed in (0, 1)]
    ids = [sae.id for sae in trained_saes([str(one), str(two), str(three)], None, None)]
    assert ids[1:] == [f"resid_post.1/width_64/k_4__seed_1__lr_{lr}" for lr in ("0.5", "0.25")]
    assert len(trained_saes([str(one), str(one)], None, None)) == 1, "a run given twice is one"


def test_the_configuration_hash_ends_the_name_of_a_run_folder(tmp_path):
    from sae_train.cli.compose import compose
    from sae_train.config import as_tree, run_folder, to_config

    config = to_config(compose("train", ["hook=resid_post.1", "model.name=me/model", "corpus.name=me/text"]))
    run = make_run(tmp_path / "r", config=as_tree(config))
    (sae,) = trained_saes([str(run)], None, None)
    assert run_folder(config).name == f"sae-{sae.config_hash[:8]}"


def test_the_front_matter_holds_what_the_hub_filters_by(tmp_path):
    what = publication(make_run(tmp_path / "r"), license="mit", forms={"saelens": {"x": "x"}})
    known = matter(repo_card(what))
    assert known["library_name"] == "saelens" and known["license"] == "mit"
    assert known["base_model"] == "me/model" and known["base_model_revision"] == "c" * 40
    assert known["datasets"] == ["me/text"]
    (result,) = known["model-index"][0]["results"]
    metrics = {m["type"]: m["value"] for m in result["metrics"]}
    assert metrics == {"fvu": 0.25, "l0": 4.0, "ce_increase": 0.5}


def test_a_card_without_metrics_or_hub_names_is_still_one(tmp_path):
    numbers = {"fvu": None, "l0": None, "ce_sae": None}
    run = make_run(
        tmp_path / "r",
        meta={"model": "/m", "corpus": None},
        config={"model": {"name": "/m"}},
        numbers=numbers,
    )
    known = matter(text := repo_card(publication(run)))
    assert not known.keys() & {"base_model", "datasets", "model-index", "license"}
    assert "`local:m`" in text and "none was stated" in text
    draw_pareto(publication(run).saes, tmp_path / "pareto.png")
    assert (tmp_path / "pareto.png").stat().st_size > 1000


def test_names_that_others_chose_cannot_break_out_of_the_card(tmp_path):
    run = make_run(
        tmp_path / "r",
        meta={
            "model": HOSTILE,
            "model_revision": HOSTILE,
            "hook": HOSTILE,
            "hooks": {HOSTILE: {"module": HOSTILE, "side": HOSTILE, "transformer_lens": HOSTILE}},
        },
        config={
            "model": {"name": HOSTILE},
            "corpus": {"name": HOSTILE, "subset": HOSTILE},
            "filter": {"name": "a ``` b"},
        },
    )
    what = publication(run, commit="0" * 40)
    text = repo_card(what)
    known = matter(text)
    assert "license" not in known and "datasets" not in known
    body = text.split("\n---\n", 1)[1]
    assert body.count("```") == 4
    fences = [line for line in body.splitlines() if line.startswith("```")]
    assert fences == ["```python", "```", "```yaml", "```"]
    outside = "".join(part for i, part in enumerate(body.split("```")) if i % 2 == 0)
    assert "<script" not in outside and "](http" not in outside and "](y)" not in outside
    assert not [line for line in outside.splitlines() if line.startswith(("---", "# owned", "license:"))]
    for table in re.findall(r"(?:^\|.*\n)+", outside, re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1, table
    own = card(what.saes[0].description, what.saes[0].numbers, what.saes[0].meta)
    assert "<script" not in own and not [
        line for line in own.splitlines() if line.startswith(("---", "license:"))
    ]


def test_a_card_is_the_same_bytes_each_time(tmp_path):
    run = make_run(tmp_path / "r")
    assert repo_card(publication(run)) == repo_card(publication(run))
    for name in ("one.png", "two.png"):
        draw_pareto(publication(run).saes, tmp_path / name)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def test_what_two_runs_share_is_said_once(tmp_path):
    one = make_run(tmp_path / "one", config={"train": {"tokens": 640}})
    two = make_run(
        tmp_path / "two",
        {"main": LinearConfig(d_sae=128, activation=TopKConfig(k=4))},
        config={"train": {"tokens": 1280}},
    )
    text = repo_card(publication(one, two))
    assert text.count("lr_base: 0.001") == 1
    assert text.count("tokens: 640\n") == 1 and text.count("tokens: 1280\n") == 1
    assert "2 sparse autoencoders" in text


def test_a_metric_whose_meaning_is_a_formula_stays_in_its_cell():
    (row,) = metric_rows({"relative_reconstruction_bias": 1.0})
    assert row.replace("\\|", "").count("|") == 4 and "<" not in row
    (row,) = metric_rows({"fvu": None})
    assert "not finite" in row


def test_the_pareto_plot_joins_the_saes_of_a_series_and_leaves_out_what_has_no_place(tmp_path, monkeypatch):
    drawn: list[Any] = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure) or path)
    bad = {"nan": (float("nan"), 0.1), "inf": (4.0, float("inf")), "zero": (0.0, 1.0)}
    plots.pareto({"topk": {"b": (32.0, 0.1), "a": (16.0, 0.2)} | bad, "none": bad}, tmp_path / "x.png")
    (axes,) = drawn[0].axes
    assert axes.lines[0].get_xydata().tolist() == [[16.0, 0.2], [32.0, 0.1]]
    assert len(axes.lines[1].get_xydata()) == 0
    assert {text.get_text() for text in axes.texts} == {"a", "b"}
    assert axes.get_xscale() == "log" and axes.get_ylim()[0] == 0


@pytest.mark.parametrize("kind", ["detached", "branch", "packed", "worktree"])
def test_the_commit_of_a_checkout_is_found_without_git(tmp_path, kind):
    commit, git = "ab" * 20, tmp_path / "main" / ".git"
    (git / "refs/heads").mkdir(parents=True)
    root = tmp_path / "main"
    (git / "HEAD").write_text(f"{commit}\n" if kind == "detached" else "ref: refs/heads/main\n")
    if kind == "packed":
        (git / "packed-refs").write_text(
            f"# pack-refs\n{'0' * 40} refs/heads/other\n{commit} refs/heads/main\n"
        )
    else:
        (git / "refs/heads/main").write_text(f"{commit}\n")
    if kind == "worktree":
        own = git / "worktrees" / "w"
        own.mkdir(parents=True)
        (own / "HEAD").write_text("ref: refs/heads/main\n")
        (own / "commondir").write_text("../..\n")
        root = tmp_path / "w"
        root.mkdir()
        (root / ".git").write_text(f"gitdir: {own}\n")
    assert project_commit(root) == commit
    assert project_commit(tmp_path) is None


def test_a_learning_rate_that_was_chosen_by_width_is_shown_as_it_was(tmp_path):
    (sae,) = trained_saes([str(make_run(tmp_path / "r"))], None, None)
    assert isinstance(sae, TrainedSAE)
    assert sae.lr == pytest.approx(OptimConfig().peak_lr(64, 10))
    assert f"| {sae.lr:.3g} |" in repo_card(publication(sae.run))


@pytest.mark.parametrize(
    ("where", "value"),
    [
        *(("model", 7), ("corpus", [1]), ("members", {"main": [1]}), ("source", "x"), ("start", {"a": 1})),
        *(("corpus", {"sources": ["x"]}), ("run", [1]), ("members", [1])),
    ],
)
def test_a_record_of_another_shape_is_no_bug_of_ours(tmp_path, where, value):
    run = make_run(tmp_path / "r")
    record = json.loads((run / "run.json").read_text())
    record["config"][where] = value
    (run / "run.json").write_text(json.dumps(record))
    with contextlib.suppress(InputError):  # or a card that says less
        repo_card(publication(run))


def test_a_run_of_another_kind_is_refused_by_name(tmp_path):
    run = make_run(tmp_path / "r")
    (run / "saes/main/metrics.json").write_text("[1]")
    with pytest.raises(InputError, match="saes/main"):
        trained_saes([str(run)], None, None)
    torch.save({}, run / "saes/main/metrics.json")
    with pytest.raises(InputError, match="saes/main"):
        trained_saes([str(run)], None, None)


def test_the_front_matter_ends_where_it_should(tmp_path):
    text = front_matter(publication(make_run(tmp_path / "r")))
    assert text.startswith("---\n") and text.endswith("\n---\n\n") and text.count("\n---\n") == 1
