"""Passes of the layers above a site: the bits of a whole pass, in every family, and only those layers run."""

import copy

import pytest
import torch
from accelerate import dispatch_model
from torch import nn

from sae_train.harvest.above import Above
from sae_train.harvest.capture import hooked
from sae_train.harvest.families import FAMILIES
from sae_train.harvest.hooks import Site, resolve

TOKENS = torch.randint(4, 128, (3, 12), generator=torch.Generator().manual_seed(2))
MASK = torch.ones_like(TOKENS)
MASK[-1, 8:] = 0


def run(model: nn.Module) -> torch.Tensor:
    """What a pass gives first: logits, or an encoder's last hidden state."""
    with torch.no_grad():
        return model(input_ids=TOKENS, attention_mask=MASK)[0]


def layers(model: nn.Module) -> list[nn.Module]:
    path = FAMILIES[model.config.model_type].layers_path(model)
    return list(model.get_submodule(path))


def ran(model: nn.Module) -> list[bool]:
    """Which layers' first submodule is run in a pass that is made while this is asked."""
    seen: list[bool] = []
    handles = []
    for layer in layers(model):
        inner = next(module for module in layer.modules() if not list(module.children()))
        at = len(seen)
        seen.append(False)
        handles.append(inner.register_forward_hook(lambda *_, at=at: seen.__setitem__(at, True)))
    run(model)
    for handle in handles:
        handle.remove()
    return seen


def halved(sites: list[Site]) -> dict:
    return {site: lambda x: x / 2 for site in sites}


def assert_the_same(model: nn.Module, sites: list[Site], skipped: int) -> None:
    """Passes of what is above give the bits of whole ones, twice, after which the model is as it was."""
    above = Above(model, sites)
    assert len(above.skipped) == skipped
    clean, hooks = run(model), [len(layer._forward_hooks) for layer in layers(model)]
    with above.remembering():
        assert torch.equal(run(model), clean)
    assert [len(layer._forward_hooks) for layer in layers(model)] == hooks
    with hooked(model, halved(sites)):
        whole = run(model)
        assert not torch.equal(whole, clean)
        with above.alone():
            assert torch.equal(run(model), whole)
            assert torch.equal(run(model), whole)
    with above.alone():
        assert ran(model) == [False] * skipped + [True] * (len(layers(model)) - skipped)
    assert torch.equal(run(model), clean)
    assert all(ran(model))


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize(("name", "skipped"), [("resid_post.1", 2), ("resid_pre.1", 1), ("mlp_out.1", 1)])
def test_what_is_above_gives_the_bits_of_a_whole_pass(model_type, name, skipped, tiny_model):
    model = tiny_model(model_type)
    assert_the_same(model, [resolve(name, model)], skipped)


@pytest.mark.parametrize(
    ("names", "skipped"),
    [
        (["attn_out.2", "resid_post.1"], 2),
        (["resid_post.0", "resid_pre.2"], 1),
        (["model.layers.1.mlp.act_fn"], 1),
        (["embed"], 0),
        (["embed", "resid_post.1"], 0),
        (["model.norm"], 0),
        (["resid_pre.0"], 0),
    ],
)
def test_of_several_sites_the_lowest_counts_and_one_outside_the_layers_has_all_run(
    names, skipped, tiny_model
):
    model = tiny_model("llama")
    assert_the_same(model, [resolve(name, model) for name in names], skipped)


def test_a_layer_that_changes_what_it_is_given_spoils_nothing(tiny_model):
    model = copy.deepcopy(tiny_model("llama"))

    def spoil(module, args, kwargs):
        args[0].mul_(0.99)

    layers(model)[2].register_forward_pre_hook(spoil, with_kwargs=True)
    assert_the_same(model, [resolve("resid_post.2", model)], 3)
    assert_the_same(model, [resolve("mlp_out.2", model)], 2)


def test_a_model_whose_layers_were_given_to_devices_is_left_as_it_was(tiny_model):
    parts = {
        "model.embed_tokens": "cpu",
        "model.layers": "cpu",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
    }
    model = dispatch_model(copy.deepcopy(tiny_model("llama")), parts | {"lm_head": "cpu"}, force_hooks=True)
    before = [vars(layer).get("forward") for layer in layers(model)]
    assert any(forward is not None for forward in before)
    assert_the_same(model, [resolve("resid_post.1", model)], 2)
    assert [vars(layer).get("forward") for layer in layers(model)] == before


def test_a_failing_pass_leaves_the_model_as_it_was(tiny_model):
    model = tiny_model("gpt2")
    site = resolve("resid_post.1", model)
    above = Above(model, [site])
    with above.remembering():
        clean = run(model)

    def fail(x):
        raise RuntimeError("planted")

    for passes in (above.remembering, above.alone):
        with pytest.raises(RuntimeError, match="planted"), hooked(model, {site: fail}), passes():
            run(model)
        assert torch.equal(run(model), clean) and all(ran(model))


def test_a_model_of_no_known_family_is_run_whole(tiny_model):
    model = copy.deepcopy(tiny_model("llama"))
    site = resolve("resid_post.1", model)
    model.config.model_type = "of-tomorrow"
    above = Above(model, [site])
    assert above.skipped == []
    with above.remembering():
        clean = run(model)
    with above.alone():
        assert torch.equal(run(model), clean)
