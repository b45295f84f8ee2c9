"""`load_sae` and `sae-train import` of SAEs that others published: from a hub on this machine, end to end."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from format_cases import KINDS, about, built, rows
from hub_server import HubServer, Repo

from sae_train import load_sae
from sae_train.cli.main import main
from sae_train.formats.base import FORMATS, FormatConfig
from sae_train.formats.plain import of_sae
from sae_train.hub import outcome
from sae_train.sae.io import save_sae

pytestmark = pytest.mark.usefixtures("one_thread")

Case = tuple[str, str, str]
CASES: dict[str, tuple[Case, Case]] = {
    "saelens": (("linear", "autoencoder", "jumprelu"), ("gated", "autoencoder", "jumprelu")),
    "sparsify": (("linear", "autoencoder", "topk"), ("linear", "autoencoder", "group_max")),
    "dictionary_learning": (("linear", "autoencoder", "topk"), ("gated", "autoencoder", "relu")),
    "openmoss": (("linear", "autoencoder", "topk"), ("linear", "transcoder", "relu")),
    "gemma_scope": (("linear", "autoencoder", "batch_topk"), ("linear", "transcoder", "jumprelu")),
    "ours": (("gated", "autoencoder", "topk"), ("linear", "crosscoder", "batch_topk")),
}
"""What a folder held at first, and what it holds now."""
FOREIGN = [name for name in CASES if name != "ours"]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    monkeypatch.setattr(outcome, "RETRY", outcome.Retry(attempts=2, initial_s=0.01, max_s=0.02))
    with HubServer() as server:
        server.connect(monkeypatch, tmp_path / "home", token=None)
        server.repos["them/saes"] = Repo()
        yield server


@pytest.fixture
def put(hub: HubServer, tmp_path: Path) -> Callable[[str, Case], str]:
    """Commit an SAE in a format to them/saes, in the folder a/b of it; returns the commit."""

    def commit(name: str, case: Case) -> str:
        repo = hub.repos["them/saes"]
        made = tmp_path / f"made-{len(repo.commits)}"
        made.mkdir()
        if name == "ours":
            save_sae(built(*case), made, {"hook": "resid_post.1"})
        else:
            FORMATS.build(FormatConfig(name)).write(
                [(of_sae(built(*case)), about(case[1]))], made, torch.float32
            )
        files: dict[str, bytes | None] = dict.fromkeys(repo.files() or {})
        files |= {f"a/b/{path.name}": path.read_bytes() for path in made.iterdir()}
        return repo.add(files | {"README.md": b"card", "a/b/run.py": b"raise SystemExit"})

    return commit


def same(loaded: Any, case: Case) -> None:
    x = rows(KINDS[case[1]], seed=5)
    torch.testing.assert_close(loaded(x), built(*case)(x), rtol=1e-4, atol=1e-4)
    codes, wanted = loaded.encode(x).dense(), built(*case).encode(x).dense()
    torch.testing.assert_close(codes, wanted, rtol=1e-4, atol=1e-4)
    assert bool((wanted != 0).any())


@pytest.mark.parametrize("name", CASES)
def test_an_address_gives_the_sae_of_its_revision_and_no_other(hub, put, name):
    first, second = CASES[name]
    old = put(name, first)
    hub.repos["them/saes"].tags["v1.0"] = old
    new = put(name, second)
    url = "hf://them/saes/a/b"
    for revision, case in ((f"@{old}", first), ("@v1.0", first), (f"@{new}", second), ("@main", second)):
        same(load_sae(url + revision), case)
    same(load_sae(url), second)
    asked = {path.split("/resolve/")[1].split("/")[0] for _, path, _ in hub.requests if "/resolve/" in path}
    assert asked == {old, new}, "files are asked for by commit, whatever the address says"
    assert not any("run.py" in path for _, path, _ in hub.requests)


@pytest.mark.parametrize("name", FOREIGN)
def test_an_import_of_a_pinned_address_is_one_of_our_folders(hub, put, tmp_path, capsys, name):
    first, second = CASES[name]
    old = put(name, first)
    put(name, second)
    out = tmp_path / "ours"
    assert main(["import", f"path=hf://them/saes/a/b@{old}", f"out={out}"]) == 0
    assert "40 latents of width 12" in capsys.readouterr().out
    same(load_sae(out), first)
    meta = json.loads((out / "config.json").read_text())["meta"]
    assert meta["imported_from"] == name
    if name not in ("sparsify", "dictionary_learning"):  # they do not say, or not so that it can be known
        assert meta["hook"] in ("mlp_in.0", "transformer.h.0.mlp:in")
    asked = len(hub.requests)
    again = tmp_path / "again"
    assert main(["import", f"path=hf://them/saes/a/b@{old}", f"out={again}"]) == 0
    assert len(hub.requests) == asked, "a commit that was fetched is not asked for again"
    same(load_sae(again), first)


def one_line(capsys: Any, tmp_path: Path, *args: str) -> str:
    """The line that a refused import says; it leaves nothing."""
    capsys.readouterr()
    assert main(["import", *args, f"out={tmp_path / 'out'}"]) == 2
    told = capsys.readouterr().err
    (line,) = [text for text in told.splitlines() if text.startswith("sae-train import:")]
    assert "Traceback" not in told and not (tmp_path / "out").exists()
    return line


def test_what_an_address_does_not_hold_is_said_in_one_line(hub, put, tmp_path, capsys):
    put("saelens", CASES["saelens"][0])
    for path, word in (
        ("hf://them/saes/a", "it holds the folders a/b"),
        ("hf://them/saes/a/b@v9", "a branch, a tag or a commit"),
        ("hf://them/nothing", "a repository that is there"),
    ):
        assert word in one_line(capsys, tmp_path, f"path={path}")
    put("ours", CASES["ours"][0])
    assert "ours needs no import" in one_line(capsys, tmp_path, "path=hf://them/saes/a/b")
    assert "cfg.json" in one_line(capsys, tmp_path, "path=hf://them/saes/a/b", "format=saelens")


@pytest.mark.parametrize("damage", ["weights that end early", "a header of terabytes", "a rule that is none"])
def test_a_hostile_folder_is_refused_after_it_arrived_as_one_here_is(hub, put, tmp_path, capsys, damage):
    put("saelens", CASES["saelens"][0])
    repo = hub.repos["them/saes"]
    files = repo.files()
    assert files is not None
    weights, config = files["a/b/sae_weights.safetensors"], json.loads(files["a/b/cfg.json"])
    if damage == "weights that end early":
        repo.add({"a/b/sae_weights.safetensors": weights[:-9]})
    elif damage == "a header of terabytes":
        entry = {"dtype": "F32", "shape": [2**20, 2**20], "data_offsets": [0, 2**42]}
        text = json.dumps({"W_enc": entry}).encode()
        repo.add({"a/b/sae_weights.safetensors": len(text).to_bytes(8, "little") + text})
    else:
        repo.add({"a/b/cfg.json": json.dumps(config | {"architecture": "__import__('os')"}).encode()})
    line = one_line(capsys, tmp_path, "path=hf://them/saes/a/b")
    assert len(line) < 1500 and line.isprintable()
