"""Which SAE is the best, what a reader is warned of, and files from which the best is trained again."""

import math

import pytest
from sweep.short import SHORT

from sae_train.errors import InputError
from sae_train.sweep.axes import read_axes
from sae_train.sweep.options import SweepConfig, read_options
from sae_train.sweep.page import Page, write_page
from sae_train.sweep.points import all_points
from sae_train.sweep.results import Row, ranked, warnings
from sae_train.sweep.summary import check_experiment, experiment, write_table
from sae_train.sweep.wandb_file import write_wandb


def row(name, status="done", note="", **metrics):
    return Row(name, "main", (name,), status, metrics, "linear, topk", note)


ROWS = [
    row("a", fvu=0.3, l0=16.0, recovered_mean=0.7),
    row("b", fvu=0.1, l0=64.0, recovered_mean=0.95),
    row("c", fvu=0.2, l0=34.0, recovered_mean=0.9),
    row("d", fvu=0.22, l0=30.0, recovered_mean=0.92),
    row("e", fvu=math.nan, l0=32.0, recovered_mean=math.nan),
    row("f", "failed"),
]


def names(rows):
    return [one.name for one in rows]


def test_the_best_has_the_least_error_or_the_most_of_what_is_good():
    assert names(ranked(ROWS, SweepConfig())) == ["b", "c", "d", "a"]
    assert names(ranked(ROWS, SweepConfig(objective="recovered_mean"))) == ["b", "d", "c", "a"]


def test_at_a_fixed_l0_what_is_further_off_is_never_the_best():
    assert names(ranked(ROWS, SweepConfig(l0=32))) == ["c", "d"]
    assert names(ranked(ROWS, SweepConfig(l0=32, l0_tolerance=0.0626))) == ["c", "d"]
    assert names(ranked(ROWS, SweepConfig(l0=32, l0_tolerance=0.06))) == []
    assert any("sweep.l0=32" in line for line in warnings(ROWS, SweepConfig(l0=32, l0_tolerance=0.06)))


def test_a_reader_is_told_that_different_l0_do_not_compare_and_what_is_not_done():
    told = warnings(ROWS, SweepConfig())
    assert any("different L0 (16 to 64)" in line for line in told)
    assert any("1 of 6 SAEs: failed" in line for line in told)
    assert not any("different L0" in line for line in warnings(ROWS, SweepConfig(l0=32)))


@pytest.mark.parametrize(
    "args",
    [
        ["k=3,5"],
        ["sae=gated,matryoshka", "activation=jumprelu,batch_topk", "seed=4,5"],
        ["sae=skip_transcoder", "hook=mlp_in.1", "target=mlp_out.1,mlp_out.0"],
        ["saes={a.b: {}, c: {seed: 3, sae: {name: gated}}}", "optim=muon,schedule_free"],
        ["grid={k: [2, 3], sae.auxk_coefficient: [0.0, 0.5]}", "hook=[a.b,c]", "lr=1e-3,2e-3"],
        ["experiment=demo,gpt2-small", "corpus.name='it\\'s {a}: 3, \"x\"',plain"],
    ],
)
def test_an_experiment_file_composes_to_exactly_the_point_it_was_made_of(composer, args, tmp_path):
    live = ["model.name=a-model", "corpus.name=a-corpus", "hook=resid_post.1"]
    args = [*([] if "experiment" in args[0] else live), *SHORT[5:], *args]
    fixed, axes = read_axes(args)
    for i, point in enumerate(all_points(fixed, axes, composer)):
        path = tmp_path / f"best {i}'s.yaml"
        path.write_text(experiment(point, composer, "The best"))
        check_experiment(path, point, composer)
        assert "defaults" in path.read_text()


def test_an_experiment_file_that_says_something_else_is_found_out(composer, tmp_path):
    fixed, axes = read_axes([*SHORT, "k=3,5"])
    three, five = all_points(fixed, axes, composer)
    (tmp_path / "best.yaml").write_text(experiment(three, composer, "The best"))
    with pytest.raises(AssertionError):
        check_experiment(tmp_path / "best.yaml", five, composer)


@pytest.mark.parametrize("content", [None, b"\xff\xfe", b"- a list\n", b"a: [1\n", b"just text"])
def test_an_experiment_file_that_is_none_is_refused_in_one_line(composer, content, tmp_path):
    path = tmp_path / "bad.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        composer([f"experiment={path}"])
    assert caught.value.field == "experiment"
    assert "\n" not in str(caught.value)


def test_the_page_is_escaped_has_no_secret_and_links_to_every_run(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "s3cret-value")
    bad = row("g", "failed", note="<script>alert(1)</script> s3cret-value \x1b[31m")
    rows = [*ROWS, bad]
    ranking = ranked(rows, SweepConfig())
    page = Page(
        "<b>t</b>",
        "sae-train sweep <i>",
        SweepConfig(),
        ["<u>k</u>"],
        rows,
        ranking,
        ["<p>w"],
        None,
        "x: <y>",
    )
    text = write_page(tmp_path / "report.html", page).read_text()
    for raw in ("<script>", "<b>t", "sweep <i>", "<u>k", "<p>w", "x: <y>", "s3cret-value", "\x1b"):
        assert raw not in text, raw
    for link in ("runs/a/report.html", "runs/b/saes/main/", "runs/c/saes/main/plots/"):
        assert f'href="{link}"' in text
    assert (
        text.index("runs/b/report.html") < text.index("runs/c/report.html") < text.index("runs/a/report.html")
    )
    assert 'src="http' not in text and "default-src 'none'" in text


def test_the_table_has_a_row_for_every_sae_and_is_empty_where_nothing_was_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "s3cret-value")
    _, axes = read_axes(["k=1,2"])
    write_table(tmp_path / "table.csv", [*ROWS, row("g", "failed", note='why, "s3cret-value"\n')], axes)
    lines = (tmp_path / "table.csv").read_text().splitlines()
    assert lines[0] == "name,k,status,fvu,recovered_mean,l0,folder,note"
    assert lines[1] == "a,a,done,0.3,0.7,16.0,runs/a/saes/main,"
    assert lines[5] == "e,e,done,,,32.0,runs/e/saes/main,"
    assert lines[7].startswith('g,g,failed,,,,runs/g,"why, ""***""')


def test_a_file_for_wandb_says_what_varies_and_how_a_run_is_started(tmp_path):
    yaml = pytest.importorskip("yaml")
    fixed, axes = read_axes(
        [
            "experiment=demo",
            "sae.activation.k=16,32",
            "lr=tag(log,interval(1e-4,1e-2))",
            "activation=topk,jumprelu",
            "train.accumulate=int(interval(1,4))",
        ]
    )
    config = read_options(["sweep.trials=7", "sweep.objective=ce_increase"])
    write_wandb(tmp_path / "sweep.yaml", fixed, axes, config, "demo", "main")
    told = yaml.safe_load((tmp_path / "sweep.yaml").read_text())
    assert told["metric"] == {"name": "main/heldout/ce_sae", "goal": "minimize"}
    assert told["parameters"] == {
        "sae.activation.k": {"values": [16, 32]},
        "optim.lr": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2},
        "sae/activation": {"values": ["topk", "jumprelu"]},
        "train.accumulate": {"distribution": "int_uniform", "min": 1, "max": 4},
    }
    assert told["command"][:4] == ["${env}", "sae-train", "train", "experiment=demo"]
    assert told["command"][-1] == "${args_no_hyphens}" and told["run_cap"] == 7
    with pytest.raises(InputError, match=r"sae\.activation\.k"):
        write_wandb(tmp_path / "no.yaml", *read_axes(["k=3,4"]), config, "demo", "main")


@pytest.mark.parametrize(
    ("args", "key"),
    [
        (["sweep.share=maybe"], "sweep.share"),
        (["sweep.trials=0"], "sweep.trials"),
        (["sweep.trials=some"], "sweep.trials"),
        (["sweep.nothing=1"], "sweep.nothing"),
        (["sweep.batch=2"], "sweep.batch"),
        (["sweep.workers=2"], "sweep.workers"),
        (["sweep.objective=lr"], "sweep.objective"),
        (["sweep.objective=l0"], "sweep.objective"),
        (["sweep.l0=0"], "sweep.l0"),
        (["sweep.pruner=axe"], "sweep.pruner"),
        (["sweep.dir=' '"], "sweep.dir"),
    ],
)
def test_keys_of_a_sweep_are_checked(args, key):
    with pytest.raises(InputError) as caught:
        read_options(args)
    assert caught.value.field == key
    assert "\n" not in str(caught.value)
