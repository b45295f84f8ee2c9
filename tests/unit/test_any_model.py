"""Models of no family in the table: their hooks are known before their weights, or as soon as those are."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from sae_train.cli.language_model import load_language_model
from sae_train.errors import InputError
from sae_train.harvest.corpus import CorpusConfig
from sae_train.harvest.harvester import Harvester, NeedsWeights, check_sites, dims_from_config
from sae_train.harvest.hooks import resolve
from sae_train.harvest.kinds import is_causal_lm
from sae_train.harvest.model import ModelConfig, check_context

WIDE = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": 64}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
SPECIALS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
HYBRID = {
    "layer_types": ["attention", "mamba", "attention"],
    "mamba_n_groups": 1,
    "shared_intermediate_size": 64,
}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8}
SIZES: dict[str, dict[str, Any]] = {
    "opt": WIDE | HEADS | {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "bloom": WIDE | {"n_layer": 3, "n_head": 4},
    "mamba": WIDE | {"state_size": 4},
    "falcon": WIDE | HEADS,
    "deberta-v2": WIDE | HEADS,
    "mixtral": WIDE | HEADS | EXPERTS | {"num_key_value_heads": 2},
    "olmoe": WIDE | HEADS | {"num_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": WIDE | HEADS | EXPERTS | {"num_key_value_heads": 2, "head_dim": 8},
    "granitemoehybrid": WIDE | HEADS | EXPERTS | HYBRID | MAMBA,
    "xlm": {"vocab_size": 128, "emb_dim": 32, "n_layers": 3, "n_heads": 4, "max_position_embeddings": 64},
}
LOOKS_AT_VALUES = ["xlm"]


def make(model_type: str) -> nn.Module:
    config = AutoConfig.for_model(model_type, **SIZES[model_type] | SPECIALS)
    torch.manual_seed(0)
    encoder = model_type in ("deberta-v2", "xlm")
    model: nn.Module = (AutoModel if encoder else AutoModelForCausalLM).from_config(config)
    return model.eval()


@pytest.mark.parametrize("model_type", [name for name in SIZES if name not in LOOKS_AT_VALUES])
def test_widths_are_known_without_weights_in_the_dtype_of_any_configuration(model_type):
    model = make(model_type)
    assert model.config.dtype in (None, torch.float32)  # of which meta tensors know no grouped product
    sites = [resolve(name, model) for name in ("resid_pre.1", "resid_post.1")]
    wanted = check_sites(model, sites)
    assert wanted == {"resid_pre.1": 32, "resid_post.1": 32}
    assert dims_from_config(sites, model.config) == wanted
    assert Harvester(model, sites, 2, context_length=8).dims == wanted
    assert getattr(model.config, "_experts_implementation", None) != "batched_mm"  # that was the skeleton's


@pytest.mark.parametrize("model_type", LOOKS_AT_VALUES)
def test_a_model_that_looks_at_values_is_checked_when_its_weights_are_there(
    model_type, tiny_tokenizer, tiny_corpus_dir, tmp_path
):
    model = make(model_type)
    model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    place = [name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)][-1]
    with pytest.raises(NeedsWeights, match="runs without its weights; it says: "):
        dims_from_config([resolve(place, model)], model.config)
    told: list[Any] = []
    config, corpus = ModelConfig(str(tmp_path)), CorpusConfig(str(tiny_corpus_dir), context_length=16)
    found = load_language_model(config, corpus, [place], told.append, lambda tokenizer: told.append("corpus"))
    assert told == ["corpus", {place: 32}]
    assert [site.key for site in found.sites] == [place]

    def refuse(widths: Any) -> None:
        raise InputError("sae.activation.k", 64, f"at most {widths[place]}")

    with pytest.raises(InputError, match="at most 32"):
        load_language_model(config, corpus, [place], refuse, lambda tokenizer: None)


@pytest.mark.parametrize(
    ("model_type", "more", "causal"),
    [
        ("bert-generation", HEADS, False),
        ("bert-generation", HEADS | {"is_decoder": True}, True),
        ("xlnet", {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64}, False),
        ("opt", SIZES["opt"], True),
        ("mamba", SIZES["mamba"], True),
    ],
)
def test_cross_entropy_is_for_models_that_do_not_look_ahead(model_type, more, causal):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **WIDE | more | SPECIALS)
    model = AutoModelForCausalLM.from_config(config).eval()
    tokens = torch.randint(4, 128, (1, 12))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.1)
        before = model(input_ids=tokens).logits[:, :8]
        tokens[:, -1] = 3
        ahead = (model(input_ids=tokens).logits[:, :8] - before).abs().max()
    assert is_causal_lm(model) == causal == (float(ahead) < 1e-5)


@pytest.mark.parametrize(
    ("model_type", "more", "limit"),
    [("mpt", {"max_seq_len": 48}, 48), ("opt", SIZES["opt"], 64), ("xlnet", {}, None), ("bloom", {}, None)],
)
def test_a_context_is_as_long_as_the_positions_that_a_model_has(model_type, more, limit):
    config = AutoConfig.for_model(model_type, **more)
    check_context(config, limit or 10**6)
    if limit is not None:
        with pytest.raises(InputError, match=f"at most {limit}"):
            check_context(config, limit + 1)


def test_a_model_that_does_not_run_in_its_dtype_says_so():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = AutoConfig.for_model("opt", **SIZES["opt"])
            self.layers = nn.ModuleList([nn.Linear(4, 4, dtype=torch.bfloat16)])

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.layers[0](torch.ones(*input_ids.shape, 4))

    model = Odd()
    with pytest.raises(
        InputError, match=r"model\.dtype='bfloat16': expected one in which this model runs .* dtype"
    ):
        check_sites(model, [resolve("layers.0", model)])
