"""What may leave this machine, and what is found before it does."""

import os
from pathlib import Path

import pytest
import torch

from sae_train.errors import InputError
from sae_train.files import write_tensors
from sae_train.hub.public import LocalNames, hub_id, is_local, private_paths, public_name, refuse_private

HERE = "a path of this machine"


@pytest.mark.parametrize(
    ("name", "local"),
    [
        ("EleutherAI/pythia-70m", False),
        ("gpt2", False),
        ("demo:smollm2", False),
        ("https://example.org/x.jsonl", False),
        ("/data/model", True),
        ("./model", True),
        ("../model", True),
        ("~/model", True),
        ("texts/*.jsonl", True),
        ("a/b/c", True),
        ("C:\\model", True),
        ("here", True),
        ("user/here", True),
    ],
)
def test_a_name_is_local_if_only_this_machine_knows_it(tmp_path, monkeypatch, name, local):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "user" / "here").mkdir(parents=True)
    assert is_local(name) == local
    assert (hub_id(name) is None) == (local or ":" in name)


def test_names_of_files_are_replaced_wherever_the_record_repeats_them_and_nothing_else_is(tmp_path):
    config = {
        "model": {"name": str(tmp_path / "llama"), "other": "me/tuned", "tokenizer": None},
        "corpus": {"name": "texts/*.jsonl", "sources": [{"name": "./more"}]},
        "source": {"path": "shards/one/two", "paths": ["a/b/c.safetensors"]},
        "start": "runs/x/saes/main",
        "run": {"dir": "runs/mine/too"},
        "members": {"main": {"start": ["not a name"]}},
    }
    names = LocalNames(config, {"told": "instead"})
    tree = {
        "model": str(tmp_path / "llama"),
        "corpus": ["texts/*.jsonl", "./more", "me/tuned"],
        str(tmp_path / "key"): {"path": "shards/one/two", "other": "/anywhere/else"},
        "numbers": [1, None, True],
        "words": "topk and texts/*.jsonl",
        "told": "told",
    }
    assert names.replaced(tree) == {
        "model": "local:llama",
        "corpus": ["local:*.jsonl", "local:more", "me/tuned"],
        "local:key": {"path": "local:two", "other": "local:else"},
        "numbers": [1, None, True],
        "words": "topk and texts/*.jsonl",
        "instead": "instead",
    }


def test_a_public_name_keeps_nothing_that_means_something_elsewhere():
    assert public_name("/home/me/<b>`x`\n---\n/") == "local:_b__x__---_"
    assert public_name("/") == "local:folder"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("hf_" + "a" * 34, "a Hugging Face token"),
        ("ghp_" + "a" * 36, "a GitHub token"),
        ("sk-proj-" + "a" * 30, "an API key"),
        ("AKIA" + "A1" * 8, "an AWS key"),
        ("xoxb-" + "1" * 20, "a Slack token"),
        ("-----BEGIN RSA PRIVATE KEY-----", "a private key"),
        ("https://me:hunter22@example.org/x", "a password in an address"),
        ("canary-0123456789", "a secret of this environment"),
    ],
)
@pytest.mark.parametrize("name", ["eval.json", "density.png", "sae.safetensors"])
def test_a_secret_is_found_by_its_form_or_its_value_and_never_shown(tmp_path, monkeypatch, text, kind, name):
    monkeypatch.setenv("MY_API_KEY", "canary-0123456789")
    file = tmp_path / name
    if name.endswith(".safetensors"):
        write_tensors(file, {f"x {text} y": torch.zeros(2)})
    else:
        file.write_bytes((b"\0" if name.endswith("png") else b"") + f'one\n{{"a": "{text}"}}\n'.encode())
    with pytest.raises(InputError, match=kind) as told:
        refuse_private(f"ID/{name}", file, [])
    assert text not in str(told.value)
    assert f"ID/{name}" in str(told.value)
    assert ("line 2" in str(told.value)) == (name == "eval.json")


def test_paths_of_this_machine_are_found_and_ordinary_text_is_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "mine"
    paths = private_paths([run])
    file = tmp_path / "config.json"
    for line in (str(run), str(tmp_path), str(Path.home() / "x")):
        file.write_text(f'{{\n"a": "{line}"\n}}')
        with pytest.raises(InputError, match=f"line 2.*{HERE}"):
            refuse_private("config.json", file, paths)
    file.write_text('{"a": "hf://me/saes@main", "b": "sk-learn", "c": "hf_hub", "d": "https://a.org:80/@x"}')
    refuse_private("config.json", file, paths)


def test_weights_are_not_read_beyond_their_header(tmp_path):
    file = tmp_path / "sae.safetensors"
    secret = torch.tensor(list(b"hf_" + b"a" * 34), dtype=torch.uint8)
    write_tensors(file, {"w": secret})
    assert b"hf_aaa" in file.read_bytes()
    refuse_private("sae.safetensors", file, [])
    with open(file, "r+b") as handle:
        handle.truncate(1 << 40)
    refuse_private("sae.safetensors", file, [])
    assert os.stat(file).st_size == 1 << 40
