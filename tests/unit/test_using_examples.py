"""The examples of docs/using.md, run as they stand there."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sae_train
from sae_train.activations.topk import TopKConfig
from sae_train.harvest.capture import hooked
from sae_train.harvest.hooks import resolve
from sae_train.places import Places
from sae_train.sae.io import save_sae
from sae_train.sae.linear import LinearConfig, LinearSAE
from sae_train.stats import FeatureStats, write_features

PAGE = Path(__file__).resolve().parents[2] / "docs" / "using.md"
HOOKS = {
    "main": Places(("resid_post.5",)),
    "early": Places(("resid_post.2",)),
    "transcoder": Places(("mlp_in.5",), ("mlp_out.5",)),
    "cross": Places(("resid_post.2", "resid_post.5")),
}
KINDS = {"transcoder": "transcoder", "cross": "crosscoder"}


def blocks(page: str) -> list[str]:
    """The Python of each block, with as many empty lines before it as put it at its line of the page."""
    found = re.finditer(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    return ["\n" * page[: match.start(1)].count("\n") + match[1] for match in found]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Any, tiny_tokenizer: Any) -> Path:
    """The working directory of somebody who has a model, and a run with four SAEs of it."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(tiny_model("llama").config)
    config.num_hidden_layers = 7
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for weight in model.parameters():
        weight.add_(torch.randn_like(weight), alpha=0.1)
    model.save_pretrained(tmp_path / "my-model")
    tiny_tokenizer.save_pretrained(tmp_path / "my-model")
    seen: dict[str, Tensor] = {}
    names = sorted({hook for places in HOOKS.values() for hook in places.hooks})
    with hooked(model, {resolve(h, model): lambda x, h=h: seen.update({h: x[0]}) for h in names}):
        model(torch.randint(4, 128, (1, 60)))
    for name, places in HOOKS.items():
        kind = KINDS.get(name, "autoencoder")
        sae_config = LinearConfig(kind=kind, d_sae=64, activation=TopKConfig(k=8))
        sae = LinearSAE(sae_config, places.widths({hook: 32 for hook in names}))
        x, y = places.batch(seen)
        sae.initialise(x, torch.Generator().manual_seed(1), y if places.targets else None)
        path = tmp_path / "runs" / "demo-1a2b3c4d" / "saes" / name
        path.mkdir(parents=True)
        save_sae(sae, path, {"hook": "+".join(places.inputs)})
        stats = FeatureStats(64)
        stats.update(sae.encode(x))
        write_features(path / "features.safetensors", stats, None, float(sae.code_scale), 100)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("folder", "one_thread", "fresh_compiler")
def test_every_example_of_the_page_runs_in_the_order_in_which_it_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiler: Callable[..., Any] = torch.compile
    # The default compiler builds C++ for half a minute; the contract tests do that once.
    monkeypatch.setattr(torch, "compile", lambda f, **how: compiler(f, **how, backend="aot_eager"))
    names: dict[str, Any] = {}
    found = blocks(PAGE.read_text())
    assert len(found) == PAGE.read_text().count("```python")
    for block in found:
        exec(compile(block, str(PAGE), "exec"), names)
    moved = {name: names[name] for name in ("spliced", "edited", "held", "without")}
    for name, logits in moved.items():
        assert (logits - names["clean"]).abs().max() > 1e-4, f"{name} is what the model gives anyway"
    assert names["effect"].abs().sum() > 0


@pytest.mark.usefixtures("one_thread")
def test_the_notebook_of_whoever_comes_from_elsewhere_trains(folder: Path) -> None:
    (folder / "texts").mkdir()
    for text, words in enumerate(torch.randint(90, (200, 50)).tolist()):
        (folder / "texts" / f"{text}.txt").write_text(" ".join(f"w{word}" for word in words))
    page = PAGE.with_name("coming-from.md").read_text()
    names: dict[str, Any] = {}
    exec(blocks(page)[0], names)
    assert names["sae"].d_sae == 64


def test_the_page_shows_every_public_name_for_using_an_sae() -> None:
    page = PAGE.read_text()
    for name in set(sae_train.__all__) - {"SAE", "FeatureStats", "save_sae", "Recording"}:
        assert re.search(rf"\b{name}\b", page), name
