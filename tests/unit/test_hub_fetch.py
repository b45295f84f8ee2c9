"""SAEs from the hub: through the real client, from a real server on this machine."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import HubServer, Repo
from huggingface_hub import constants

from sae_train.activations.topk import TopKConfig
from sae_train.errors import InputError, StoppedEarly
from sae_train.hub import fetch as fetching
from sae_train.hub import outcome
from sae_train.hub.fetch import HubFolder, fetch
from sae_train.places import Widths
from sae_train.registry import discover
from sae_train.sae.base import SAES
from sae_train.sae.io import load_sae, save_sae
from sae_train.sae.linear import LinearConfig

FOLDER = "resid_post.1/width_64/k_4"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    quick = outcome.Retry(attempts=3, initial_s=0.01, max_s=0.02)
    monkeypatch.setattr(outcome, "RETRY", quick)
    with HubServer() as server:
        server.connect(monkeypatch, tmp_path / "home")
        yield server


@pytest.fixture
def published(hub: HubServer, tmp_path: Path) -> Any:
    """An SAE in a folder of me/saes, and the SAE."""
    discover("sae_train.activations")
    discover("sae_train.sae")
    torch.manual_seed(0)
    sae = SAES.build(LinearConfig(d_sae=64, activation=TopKConfig(k=4)), Widths((16,), ()))
    folder = tmp_path / "mine"
    folder.mkdir()
    save_sae(sae, folder, {"hook": "resid_post.1"})
    files = {f"{FOLDER}/{path.name}": path.read_bytes() for path in folder.iterdir()}
    foreign = {f"{FOLDER}/run.py": b"print()", f"{FOLDER}/plots/density.png": b"png", "README.md": b"card"}
    hub.repos["me/saes"] = Repo()
    hub.repos["me/saes"].add(files | foreign)
    return sae


def test_a_folder_of_a_repository_becomes_a_folder_that_load_sae_reads(hub, published):
    got = fetch(f"hf://me/saes/{FOLDER}")
    x = torch.randn(5, 16)
    assert torch.equal(load_sae(got)(x), load_sae(got)(x))
    assert torch.equal(load_sae(got).state_dict()["w_enc"], published.folded().state_dict()["w_enc"])


def test_only_files_that_an_sae_consists_of_are_taken_and_none_is_a_link(hub, published):
    got = fetch(f"hf://me/saes/{FOLDER}")
    assert {path.name for path in got.iterdir()} == {"MANIFEST.json", "config.json", "sae.safetensors"}
    assert not any(path.is_symlink() for path in got.rglob("*"))
    assert not any("run.py" in path or ".png" in path for _, path, _ in hub.requests)


def test_all_files_are_of_the_commit_that_the_revision_was_when_it_was_asked_for(hub, published):
    repo = hub.repos["me/saes"]
    old = repo.head()
    new = repo.add({f"{FOLDER}/config.json": b"{}"})
    assert (fetch(f"hf://me/saes/{FOLDER}@main") / "config.json").read_bytes() == b"{}"
    assert (fetch(f"hf://me/saes/{FOLDER}@{old}") / "config.json").read_bytes() != b"{}"
    assert (fetch(f"hf://me/saes/{FOLDER}@{new}") / "config.json").read_bytes() == b"{}"
    resolved = {
        path.split("/resolve/")[1].split("/")[0] for _, path, _ in hub.requests if "/resolve/" in path
    }
    assert resolved == {old, new}


def test_a_commit_that_was_fetched_before_costs_no_request(hub, published):
    url = f"hf://me/saes/{FOLDER}@{hub.repos['me/saes'].head()}"
    first = fetch(url)
    asked = len(hub.requests)
    assert fetch(url) == first
    assert len(hub.requests) == asked


def test_a_branch_is_looked_up_again_and_what_is_new_is_fetched(hub, published):
    url = f"hf://me/saes/{FOLDER}"
    first = fetch(url)
    assert fetch(url) == first
    hub.repos["me/saes"].add({f"{FOLDER}/metrics.json": b'{"fvu": 1}'})
    assert json.loads((fetch(url) / "metrics.json").read_text()) == {"fvu": 1}
    assert fetch(url) != first


def test_offline_what_was_fetched_is_used_and_nothing_is_asked(hub, published, monkeypatch):
    url = f"hf://me/saes/{FOLDER}"
    first = fetch(url)
    asked = len(hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch(url) == first
    with pytest.raises(InputError, match="HF_HUB_OFFLINE"):
        fetch("hf://me/other")
    with pytest.raises(InputError, match="HF_HUB_OFFLINE"):
        fetch(f"hf://me/saes@{hub.repos['me/saes'].head()}")
    assert len(hub.requests) == asked


def test_without_a_connection_a_branch_is_what_it_was_and_a_warning_says_so(
    hub, published, monkeypatch, caplog
):
    url = f"hf://me/saes/{FOLDER}"
    first = fetch(url)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert fetch(url) == first
    assert "fetched before" in caplog.text
    with pytest.raises(StoppedEarly, match="run the same command again"):
        fetch("hf://me/other")


@pytest.mark.parametrize(
    "url",
    [
        *("hf://", "hf://me", "hf://me/", "me/saes", "https://me/saes", "hf://me/saes/", "hf://me//saes"),
        *(
            "hf://me/saes@",
            "hf://me/saes/../x",
            "hf://../saes",
            "hf://me/..",
            "hf://me/saes/./x",
            "hf://me/a--b",
        ),
        *("hf://me/saes/a\nb", "hf://me/saes@a b", "hf://me/saes@../x", "hf://me/saes/a\\b", "hf://me/.saes"),
        *("hf://me/saes/\x00", "hf://me/saes/" + "a" * 1000, "hf://me/saes@x@y"),
    ],
)
def test_another_spelling_is_refused_before_anything_is_asked(hub, url):
    with pytest.raises(InputError, match=r"hf://USER/REPO") as told:
        fetch(url)
    assert len(str(told.value)) < 600
    assert hub.requests == []


def test_the_spellings_that_are_accepted():
    assert HubFolder.parse("hf://me/saes") == HubFolder("me/saes", "", "main")
    assert HubFolder.parse("hf://me/saes@v1.0") == HubFolder("me/saes", "", "v1.0")
    spelt = HubFolder.parse("hf://me/saes/model.layers.1.mlp:in/k_4@refs/pr/1")
    assert spelt == HubFolder("me/saes", "model.layers.1.mlp:in/k_4", "refs/pr/1")


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("hf://me/nothing", "a repository that is there"),
        ("hf://me/saes/nowhere", "a folder of that repository"),
        (f"hf://me/saes/{FOLDER}@nothing", "a branch, a tag or a commit"),
        ("hf://me/saes/resid_post.1", r"weights of an SAE \(it holds the folders resid_post.1/width_64\)"),
    ],
)
def test_what_is_not_there_is_said_in_one_line(hub, published, url, told):
    with pytest.raises(InputError, match=told) as error:
        fetch(url)
    assert "\n" not in str(error.value)


def test_a_private_repository_needs_the_token_and_a_wrong_one_is_said(hub, published, monkeypatch):
    hub.repos["me/saes"].private = True
    fetch(f"hf://me/saes/{FOLDER}")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(InputError, match="a private one needs a token"):
        fetch(f"hf://me/saes/{FOLDER}")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong_wrong_wrong")
    with pytest.raises(InputError, match="HF_TOKEN") as told:
        fetch(f"hf://me/saes/{FOLDER}")
    assert "hf_wrong" not in str(told.value)


def test_a_file_that_is_too_large_is_refused_before_its_first_byte(hub, published, monkeypatch):
    monkeypatch.setattr(fetching, "MAX_TEXT_BYTES", 100)
    with pytest.raises(InputError, match=r"at most 100 bytes of config.json"):
        fetch(f"hf://me/saes/{FOLDER}")
    assert hub.count("GET", "/resolve/") == 0


@pytest.mark.parametrize("name", ["sae.safetensors", "config.json"])
def test_a_file_that_arrives_damaged_is_found_and_never_used(hub, published, name):
    path = f"{FOLDER}/{name}"
    data = bytearray(hub.repos["me/saes"].files()[path])
    data[len(data) // 2] ^= 1
    hub.served[path] = bytes(data)
    with pytest.raises(StoppedEarly, match=rf"fetching {name}: what arrived is not what the hub lists"):
        fetch(f"hf://me/saes/{FOLDER}")
    hub.served.clear()
    assert (fetch(f"hf://me/saes/{FOLDER}") / name).read_bytes() == hub.repos["me/saes"].files()[path]


@pytest.mark.parametrize(
    ("method", "part"),
    [("GET", "/revision/"), ("GET", "/tree/"), ("HEAD", "/resolve/"), ("GET", "/resolve/")],
)
def test_a_server_that_fails_is_asked_again(hub, published, method, part):
    hub.failures.append((method, part, 500, 2))
    assert (fetch(f"hf://me/saes/{FOLDER}") / "sae.safetensors").is_file()
    assert hub.failures == []


def test_files_that_arrived_before_an_outage_are_not_fetched_again(hub, published):
    hub.failures.append(("GET", "sae.safetensors", 500, 10))
    with pytest.raises(StoppedEarly, match=r"fetching sae\.safetensors"):
        fetch(f"hf://me/saes/{FOLDER}")
    hub.failures.clear()
    fetch(f"hf://me/saes/{FOLDER}")
    assert hub.count("GET", "config.json") == 1


def test_a_folder_that_was_damaged_on_this_disk_is_fetched_again(hub, published, caplog):
    url = f"hf://me/saes/{FOLDER}"
    got = fetch(url)
    whole = (got / "sae.safetensors").read_bytes()
    (got / "sae.safetensors").write_bytes(whole[:-1])
    assert fetch(url) == got
    assert (got / "sae.safetensors").read_bytes() == whole
    assert "fetching it again" in caplog.text


def test_a_cache_that_cannot_be_written_is_said_in_one_line(hub, published, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "file"))
    with pytest.raises(InputError, match="HF_HOME"):
        fetch(f"hf://me/saes/{FOLDER}")
    assert os.path.isfile(tmp_path / "file")
