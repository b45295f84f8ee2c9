"""Hook names, and that each family's table of sites is true: checked by arithmetic on a real forward."""

import logging
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sae_train.errors import InputError
from sae_train.harvest.capture import first_tensor, hooked
from sae_train.harvest.families import FAMILIES, SITES, base
from sae_train.harvest.harvester import dims_from_config
from sae_train.harvest.hooks import Site, resolve, resolve_from_config

EPS = 2.0**-24  # float32 unit roundoff: a sum of three terms is off by at most about three of it
TOKENS = torch.randint(4, 128, (2, 11), generator=torch.Generator().manual_seed(3))
POST_NORM = ("bert", "roberta", "xlm-roberta", "camembert")


def read(model: nn.Module, names: list[str]) -> dict[str, torch.Tensor]:
    """The tensors at these hooks in one whole forward."""
    seen: dict[str, torch.Tensor] = {}
    sites = [resolve(name, model) for name in names]
    visits = {site: lambda x, site=site: seen.update({site.key: x.clone()}) for site in sites}
    with torch.no_grad(), hooked(model, visits):
        model(input_ids=TOKENS)
    return seen


@pytest.mark.parametrize("model_type", FAMILIES)
def test_resid_post_is_the_hidden_state_after_the_layer_bit_for_bit(model_type, tiny_model):
    model = tiny_model(model_type)
    with torch.no_grad():
        hidden = model(input_ids=TOKENS, output_hidden_states=True).hidden_states
    rows = read(model, ["resid_pre.0", "resid_post.0", "resid_pre.1", "resid_post.1"])
    assert torch.equal(rows["resid_pre.0"], hidden[0])
    assert torch.equal(rows["resid_post.0"], hidden[1])  # the last layer's is not: transformers normalises it
    assert torch.equal(rows["resid_pre.1"], hidden[1])
    assert torch.equal(rows["resid_post.1"], hidden[2])


@pytest.mark.parametrize("model_type", FAMILIES)
def test_attn_out_and_mlp_out_are_what_is_added_to_the_residual(model_type, tiny_model):
    model = tiny_model(model_type)
    family = FAMILIES[model_type]
    sites = [site for site in SITES if site in family.sites and site not in family.missing(model.config)]
    rows = {name.split(".")[0]: x for name, x in read(model, [f"{site}.1" for site in sites]).items()}
    first, second = rows["resid_pre"] + rows["attn_out"], rows["mlp_out"]
    if "resid_mid" not in sites:  # parallel
        after = first + second
    elif model_type in POST_NORM:
        layer = model.encoder.layer[1]
        assert close(layer.attention.output.LayerNorm(first), rows["resid_mid"])
        after = layer.output.LayerNorm(rows["resid_mid"] + second)
    else:
        assert close(first, rows["resid_mid"])
        after = rows["resid_mid"] + second
    assert close(after, rows["resid_post"])


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() <= 8 * EPS * max(a.abs().max(), b.abs().max(), torch.tensor(1.0)))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_mlp_in_goes_through_the_mlp_to_what_it_gives(model_type, tiny_model):
    model = tiny_model(model_type)
    rows = read(model, ["mlp_in.1", "mlp_out.1"])
    path = resolve("mlp_in.1", model).path
    layer = model.get_submodule(path.rpartition(".")[0])
    with torch.no_grad():
        out = first_tensor(model.get_submodule(path)(rows["mlp_in.1"]), resolve("mlp_out.1", model))
        if model_type in POST_NORM:
            out = layer.output.dense(out)
        elif hasattr(layer, "post_feedforward_layernorm"):
            out = layer.post_feedforward_layernorm(out)
    assert torch.equal(out, rows["mlp_out.1"])


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", "gemma2", "bert"])
def test_names_resolve_the_same_without_weights_and_widths_are_known(model_type, tiny_model):
    model = tiny_model(model_type)
    names = ["resid_post.1", "mlp_in.2", "attn_out.0", "embed"]
    sites = [resolve_from_config(name, model.config) for name in names]
    assert sites == [resolve(name, model) for name in names]
    assert dims_from_config(sites, model.config) == dict.fromkeys(names, 32)


def test_parallel_residual_has_no_resid_mid_and_sequential_has(tiny_model):
    config = tiny_model("gpt_neox").config
    with pytest.raises(InputError, match="in parallel") as caught:
        resolve_from_config("resid_mid.1", config)
    assert "resid_post.1" in caught.value.accepted
    sequential = type(config)(**(config.to_dict() | {"use_parallel_residual": False}))
    assert resolve_from_config("resid_mid.1", sequential).path == "gpt_neox.layers.1.post_attention_layernorm"


@pytest.mark.parametrize(
    ("name", "key", "path", "side", "tl_name"),
    [
        ("resid_post.1", "resid_post.1", "model.layers.1", "out", "blocks.1.hook_resid_post"),
        ("blocks.1.hook_resid_post", "resid_post.1", "model.layers.1", "out", "blocks.1.hook_resid_post"),
        ("blocks.1.hook_out", "resid_post.1", "model.layers.1", "out", "blocks.1.hook_resid_post"),
        ("blocks.0.hook_resid_pre", "resid_pre.0", "model.layers.0", "in", "blocks.0.hook_resid_pre"),
        (
            "blocks.2.hook_resid_mid",
            "resid_mid.2",
            "model.layers.2.post_attention_layernorm",
            "in",
            "blocks.2.hook_resid_mid",
        ),
        ("blocks.1.hook_mlp_out", "mlp_out.1", "model.layers.1.mlp", "out", "blocks.1.hook_mlp_out"),
        ("blocks.1.mlp.hook_out", "mlp_out.1", "model.layers.1.mlp", "out", "blocks.1.hook_mlp_out"),
        ("blocks.1.mlp.hook_in", "mlp_in.1", "model.layers.1.mlp", "in", "blocks.1.mlp.hook_in"),
        ("blocks.1.hook_attn_out", "attn_out.1", "model.layers.1.self_attn", "out", "blocks.1.hook_attn_out"),
        ("hook_embed", "embed", "model.embed_tokens", "out", "hook_embed"),
        ("model.layers.1", "model.layers.1", "model.layers.1", "out", None),
        ("model.layers.1:out", "model.layers.1", "model.layers.1", "out", None),
        ("lm_head:in", "lm_head:in", "lm_head", "in", None),
    ],
)
def test_every_spelling_names_its_place(name, key, path, side, tl_name, tiny_model):
    site = resolve(name, tiny_model("llama"))
    assert site == Site(name, key, path, side)
    assert site.tl_name == tl_name


@pytest.mark.parametrize(
    ("name", "suggested"),
    [
        ("resid_pots.1", "resid_post.1"),
        ("model.layer.1", "model.layers.1"),
        ("blocks.1.hook_resid_pots", "resid_post.1"),
        ("*", ""),
        ("", ""),
    ],
)
def test_an_unknown_hook_is_refused_with_the_five_nearest_names(name, suggested, tiny_model):
    with pytest.raises(InputError) as caught:
        resolve_from_config(name, tiny_model("llama").config)
    named = caught.value.accepted.removeprefix("a hook of this model, such as ").split(", ")
    assert len(named) == 5
    if suggested:
        assert suggested in named
    assert "\n" not in str(caught.value)


def test_a_layer_out_of_range_names_the_range_and_the_nearest_hooks(tiny_model):
    with pytest.raises(InputError, match=r"from 0 to 2; the nearest are resid_post\.2, resid_post\.1"):
        resolve_from_config("resid_post.3", tiny_model("llama").config)


def test_an_unknown_family_gets_its_longest_module_list_and_says_so_once(caplog):
    class Toy(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = SimpleNamespace(model_type="toy")
            self.experts = nn.ModuleList([nn.Linear(4, 4)])
            self.stack = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])

    base._say_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="sae_train.harvest"):
        assert resolve("resid_post.2", Toy()) == Site("resid_post.2", "resid_post.2", "stack.2", "out")
        assert resolve("resid_pre.0", Toy()).side == "in"
    assert len([r for r in caplog.records if "toy" in r.getMessage()]) == 1
    with pytest.raises(InputError, match="not a family that knows it"):
        resolve("mlp_out.1", Toy())


def lists_of(depth: int | None, **lengths: int) -> nn.Module:
    """A model of no family with these lists of modules."""
    model = nn.Module()
    model.config = SimpleNamespace(model_type="toy", num_hidden_layers=depth)
    for name, length in lengths.items():
        model.add_module(name, nn.ModuleList([nn.Linear(4, 4) for _ in range(length)]))
    return model


def test_layers_are_not_guessed_to_be_a_deeper_vision_tower_or_a_part_of_each_layer():
    assert resolve("resid_post.1", lists_of(3, visual=8, text=3)).path == "text.1"
    assert resolve("resid_post.1", lists_of(None, experts=2, text=3)).path == "text.1"
    for depth in (3, None):
        with pytest.raises(InputError, match=r"hook='resid_post\.1'"):
            resolve("resid_post.1", lists_of(depth, attentions=3, norms=3, ffns=3))
