"""`sae-train export` and `import` as a user runs them: on runs of a tiny model, with proof."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from faults.tools import TINY
from format_cases import write_slightly_wrong
from safetensors.torch import load_file

from sae_train import load_sae
from sae_train.cli import export as export_command
from sae_train.cli.main import main
from sae_train.formats.blocks import Matrix

SHORT = [*TINY, "train.tokens=640", "checkpoint.every=50", "eval.every=0"]
"""20 steps."""


@pytest.fixture(scope="module")
def runs(
    tiny_model_dir: Callable[[str], Path], tiny_corpus_dir: Path, zygote: Any, tmp_path_factory: Any
) -> Callable[..., Path]:
    """overrides -> a finished run; trained once."""
    root = tmp_path_factory.mktemp("runs")
    source = [f"model.name={tiny_model_dir('llama')}", f"corpus.name={tiny_corpus_dir}", *SHORT]
    made: dict[tuple[str, ...], Path] = {}

    def train(*asked: str) -> Path:
        if asked not in made:
            made[asked] = root / str(len(made))
            zygote.run("train", *source, *asked, f"run.dir={made[asked]}", plots=False)
        return made[asked]

    return train


def told(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "export.json").read_text())


def command(capsys: Any, *args: str, code: int = 0) -> str:
    """Run a command in this process; its output, or its one line of error."""
    found = main(list(args))
    out = capsys.readouterr()
    assert found == code and "Traceback" not in out.err, (found, out.err)
    lines = [line for line in out.err.splitlines() if line.startswith("sae-train ")]
    assert code == 0 or len(lines) == 1, out.err
    return out.out if code == 0 else lines[0]


def test_an_export_is_proved_on_held_out_rows_and_comes_back_as_ours(runs, tmp_path, capsys):
    run, out = shutil.copytree(runs(), tmp_path / "run"), tmp_path / "lens"
    said = command(capsys, "export", f"run={run}", "format=saelens", f"out={out}", "model=me/tiny")
    assert "main: same on" in said and "held-out rows" in said
    proof = told(out)["saes"]["main"]
    assert proof["holds"] and proof["codes"] < 1e-4 and proof["differing"] == 0 and proof["rows"] > 100
    assert told(out)["rows_from"] == "held-out"
    table = json.loads((out / "cfg.json").read_text())
    assert table["architecture"] == "topk" and table["k"] == 4
    assert table["metadata"]["model_name"] == "me/tiny"
    assert table["metadata"]["hook_name"] == "blocks.1.hook_resid_post"
    assert table["metadata"]["hf_hook_name"] == "model.layers.1"
    text = "".join(path.read_text() for path in out.glob("*.json"))
    assert "/tmp" not in text and str(tmp_path.parent) not in text, "no path of this machine"

    back = run / "saes" / "back"
    command(capsys, "import", f"path={out}", f"out={back}")
    sae, twin = load_sae(run / "saes" / "main"), load_sae(back)
    x = torch.randn(50, 32)
    torch.testing.assert_close(twin(x), sae(x))
    assert json.loads((back / "config.json").read_text())["meta"]["hook"] == "resid_post.1"
    said = command(capsys, "eval", f"run={back}")
    numbers = json.loads((back / "eval.json").read_text())
    command(capsys, "eval", f"run={run / 'saes' / 'main'}")
    assert numbers["fvu"] == pytest.approx(
        json.loads((run / "saes" / "main" / "eval.json").read_text())["fvu"], rel=1e-4
    )
    again = tmp_path / "again"
    command(capsys, "export", f"run={back}", "format=sparsify", f"out={again}", "tokens=0")
    assert told(again)["saes"]["back"]["holds"] and told(again)["rows_from"] == "random"
    said = command(capsys, "publish", f"run={run}", "repo=me/saes", "dry_run=true")
    assert "nobody was asked" in said and "back" not in said, "what was not trained here is left out"
    line = command(capsys, "publish", f"run={run}", "sae=back", "repo=me/saes", "dry_run=true", code=2)
    assert "sae='back'" in line and "was not trained in it" in line
    alone = tmp_path / "alone"
    shutil.copytree(back, alone)
    lone = [f"run={alone}", "format=gemma_scope", f"out={tmp_path / 'scope'}"]
    line = command(capsys, "export", *lone, code=2)
    assert f"run='{alone}'" in line and "held-out rows: the format has no top-k" in line


def test_training_goes_on_from_an_imported_sae(
    runs, tmp_path, capsys, zygote, tiny_model_dir, tiny_corpus_dir
):
    out, ours, run = tmp_path / "sparsify", tmp_path / "ours", tmp_path / "run"
    command(capsys, "export", f"run={runs()}", "format=sparsify", f"out={out}")
    command(capsys, "import", f"path={out}", f"out={ours}", "hook=resid_post.1")
    source = [f"model.name={tiny_model_dir('llama')}", f"corpus.name={tiny_corpus_dir}", *SHORT]
    zygote.run("train", *source, f"start={ours}", f"run.dir={run}", plots=False)
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first = [json.loads(line) for line in (runs() / "metrics.jsonl").read_text().splitlines()]
    fvu = [[s["main/fvu"] for s in log if "main/fvu" in s] for log in (steps, first)]
    assert fvu[0][0] < fvu[1][0], "it starts where the other ended"


def test_what_was_imported_into_a_run_is_not_in_the_way_of_exporting_the_one_it_trained(
    runs, tmp_path, capsys
):
    run = tmp_path / "run"
    shutil.copytree(runs(), run)
    command(capsys, "export", f"run={run}", "format=sparsify", f"out={tmp_path / 'sparsify'}")
    command(capsys, "import", f"path={tmp_path / 'sparsify'}", f"out={run / 'saes' / 'back'}")
    command(capsys, "export", f"run={run}", "format=saelens", f"out={tmp_path / 'saelens'}")
    assert (tmp_path / "saelens" / "cfg.json").exists()


@pytest.mark.parametrize(
    ("format_name", "files"),
    [
        ("saelens", {"cfg.json", "sae_weights.safetensors", "sparsity.safetensors"}),
        ("sparsify", {"cfg.json", "sae.safetensors"}),
        ("merged", {"cfg.json", "sae_weights.safetensors", "sae.safetensors", "sparsity.safetensors"}),
        ("dictionary_learning", {"config.json", "ae.pt"}),
        ("openmoss", {"config.json", "sae_weights.safetensors"}),
        ("gemma_scope", {"config.json", "params.safetensors"}),
    ],
)
def test_every_format_of_one_sae_is_written_whole_and_loads_again(format_name, files, runs, tmp_path, capsys):
    out = tmp_path / "out"
    said = command(capsys, "export", f"run={runs()}", f"format={format_name}", f"out={out}")
    assert {path.name for path in out.iterdir()} == files | {"export.json", "MANIFEST.json"}
    proofs = told(out)["saes"]
    assert proofs and all(proof["holds"] for proof in proofs.values())
    assert len(proofs) == (2 if format_name == "merged" else 1)
    sae, x = load_sae(out), torch.randn(20, 32)
    if format_name != "gemma_scope":
        torch.testing.assert_close(sae(x), load_sae(runs() / "saes" / "main")(x), rtol=1e-4, atol=1e-5)
        assert "became thresholds" not in said
        return
    (proof,) = proofs.values()
    assert proof["rule"] == "top-k" and "L0 4.0 in training" in said
    assert proof["l0_with_thresholds"] == pytest.approx(proof["l0_in_training"], rel=0.01)
    assert 0.5 < proof["shared"] < 1


LAYERS = [f"l{i}: {{hook: mlp_in.{i}, target: mlp_out.{i}, sae: {{kind: transcoder}}}}" for i in range(3)]
SET = f"saes={{{', '.join(LAYERS)}}}"


def test_a_set_of_transcoders_is_exported_whole_and_comes_back_as_one_folder_each(runs, tmp_path, capsys):
    run, out = runs(SET), tmp_path / "set"
    command(capsys, "export", f"run={run}", "format=circuit_tracer", f"out={out}")
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["feature_input_hook"] == "mlp.hook_in" and config["feature_output_hook"] == "hook_mlp_out"
    assert sorted(told(out)["saes"]) == ["l0", "l1", "l2"]
    assert all(proof["holds"] for proof in told(out)["saes"].values())
    command(capsys, "import", f"path={out}", f"out={tmp_path / 'ours'}")
    for i in range(3):
        w = load_file(out / f"layer_{i}.safetensors")["W_dec"]
        sae = load_sae(tmp_path / "ours" / f"layer_{i}")
        assert torch.equal(sae.w_dec, w) and torch.equal(w, load_sae(run / "saes" / f"l{i}").w_dec)
        meta = json.loads((tmp_path / "ours" / f"layer_{i}" / "config.json").read_text())["meta"]
        assert (meta["hook"], meta["target"]) == (f"mlp_in.{i}", f"mlp_out.{i}")


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (("format=circuit_tracer", "sae=l0"), ("all 3 layers", "none of 1, 2")),
        (("format=circuit_tracer", "sae=l1"), ("none of 0, 2",)),
        (("format=saelens",), ("sae=None", "l0, l1, l2")),
        (("format=saelens", "sae=l7"), ("sae='l7'", "l0, l1, l2")),
        (("format=saelens", "sae=l1"), ("SAELens has no top-k transcoder", "sparsify")),
        (("format=gguf", "sae=l1"), ("format.name='gguf'", "sparsify")),
        (("format=gemma_scope", "sae=l1", "tokens=0"), ("tokens=0", "held-out rows")),
        (("format=sparsify", "sae=l1", "tokens=-1"), ("tokens=-1",)),
        (("format=sparsify", "sae=l1", "dtype=float16"), ("dtype='float16'", "bfloat16")),
        (("format=sparsify", "sae=l1", "modle=x"), ("modle", "model")),
        (("sae=l1",), ("format", "a value")),
    ],
)
def test_what_cannot_be_exported_is_answered_in_one_line_and_leaves_nothing(
    asked, words, runs, tmp_path, capsys
):
    line = command(capsys, "export", f"run={runs(SET)}", *asked, f"out={tmp_path / 'out'}", code=2)
    for word in words:
        assert word in line, (word, line)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_over(runs, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    line = command(capsys, "export", f"run={runs()}", "format=saelens", f"out={tmp_path / 'out'}", code=2)
    assert "not there yet" in line and list((tmp_path / "out").iterdir()) == []
    line = command(capsys, "export", f"run={tmp_path}", "format=saelens", f"out={tmp_path / 'x'}", code=2)
    assert "a run that has published an SAE" in line


def test_an_export_that_is_not_the_same_is_an_error_and_leaves_nothing(runs, tmp_path, capsys, monkeypatch):
    write_slightly_wrong(monkeypatch)
    line = command(capsys, "export", f"run={runs()}", "format=saelens", f"out={tmp_path / 'out'}", code=2)
    assert "does the same as" in line and "reconstructions by" in line
    assert list(tmp_path.iterdir()) == []


def test_large_saes_are_proved_in_blocks_and_nobody_holds_them_whole(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export_command, "IN_MEMORY", 0)

    def whole(self: Matrix) -> torch.Tensor:
        raise AssertionError("all weights in memory")

    monkeypatch.setattr(Matrix, "whole", whole)
    monkeypatch.setattr(export_command, "load_sae", lambda folder: whole(None))
    for format_name in ("saelens", "sparsify", "merged", "openmoss", "gemma_scope"):
        out = tmp_path / format_name
        command(capsys, "export", f"run={runs()}", f"format={format_name}", f"out={out}")
        assert all(proof["holds"] for proof in told(out)["saes"].values())


def test_a_threshold_that_was_learned_is_said_with_the_l0_it_has_on_held_out_rows(runs, tmp_path, capsys):
    out = tmp_path / "out"
    said = command(
        capsys, "export", f"run={runs('sae/activation=batch_topk')}", "format=saelens", f"out={out}"
    )
    (proof,) = told(out)["saes"].values()
    assert proof["l0_in_training"] == 4 and proof["l0"] == proof["active"] / proof["rows"]
    assert f"its threshold was learned for L0 4, here it is {proof['l0']:.1f}" in said
    assert json.loads((out / "cfg.json").read_text())["architecture"] == "jumprelu"


def test_a_learned_threshold_is_found_anew_on_held_out_rows_when_asked_for(runs, tmp_path, capsys):
    run, levels = runs("sae/activation=batch_topk"), []
    for name, calibrate in (("was", "false"), ("now", "true")):
        args = [f"run={run}", "format=saelens", f"out={tmp_path / name}", f"calibrate={calibrate}"]
        said = command(capsys, "export", *args)
        levels.append(load_file(tmp_path / name / "sae_weights.safetensors")["threshold"].unique().item())
    (proof,) = told(tmp_path / "now")["saes"].values()
    assert proof["l0"] == pytest.approx(4, abs=0.01) == proof["l0_with_thresholds"]
    assert "its learned threshold was found anew: L0 4.0 in training, 4.0 with them" in said
    assert levels[0] != levels[1]


def test_only_a_threshold_is_found_anew(runs, tmp_path, capsys):
    args = [f"run={runs()}", "format=saelens", f"out={tmp_path / 'out'}", "calibrate=true"]
    line = command(capsys, "export", *args, code=2)
    assert "calibrate=True" in line and line.endswith("with top-k"), line


def test_two_runs_where_one_is_wanted_are_no_sweep(runs, tmp_path, capsys):
    line = command(capsys, "export", f"run={runs()},b", "format=saelens", f"out={tmp_path / 'out'}", code=2)
    assert line.endswith("one value; several are a list: run=[A,B]"), line


def test_bfloat16_is_asked_for_by_name(runs, tmp_path, capsys):
    out = tmp_path / "out"
    command(capsys, "export", f"run={runs()}", "format=saelens", f"out={out}", "dtype=bfloat16")
    assert {t.dtype for t in load_file(out / "sae_weights.safetensors").values()} == {torch.bfloat16}
    proof = told(out)["saes"]["main"]
    assert 1e-4 < proof["codes"] < proof["tolerance"] < 0.05


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (("path=nowhere",), ("path='nowhere'", "a folder that holds an SAE")),
        (("path={lens}", "format=gguf"), ("format.name='gguf'",)),
        (("path={lens}", "format=sparsify"), ("d_in", "sae.safetensors")),
        (("path={run}/saes/main",), ("ours needs no import",)),
        (("path={lens}", "hook=a+b"), ("hook='a+b'", "1 hook")),
        (("path={lens}", "target=mlp_out.1"), ("target='mlp_out.1'", "an autoencoder with top-k")),
        (("path={lens}", "out={lens}"), ("not there yet",)),
    ],
)
def test_what_cannot_be_imported_is_answered_in_one_line_and_leaves_nothing(
    asked, words, runs, tmp_path, tmp_path_factory, capsys
):
    lens = tmp_path_factory.mktemp("exports") / "lens"
    command(capsys, "export", f"run={runs()}", "format=saelens", f"out={lens}", "tokens=0")
    filled = [one.format(lens=lens, run=runs()) for one in asked]
    out = [] if any(one.startswith("out=") for one in filled) else [f"out={tmp_path / 'out'}"]
    line = command(capsys, "import", *filled, *out, code=2)
    assert any(word in line for word in words[:1]) or words[0] == "d_in", line
    assert words[-1] in line, line
    assert list(tmp_path.iterdir()) == []
