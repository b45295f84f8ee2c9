"""Two models on the same tokens: their rows, their tokenizers, their scores, and what latents they share."""

import copy
import json
import math

import pytest
import torch
from tokenizers import normalizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from sae_train.activations.topk import TopKConfig
from sae_train.errors import InputError
from sae_train.harvest import splice
from sae_train.harvest.capture import hooked
from sae_train.harvest.harvester import Harvester
from sae_train.harvest.hooks import Site, resolve
from sae_train.harvest.model import ModelConfig
from sae_train.harvest.second import check_embeddings, check_tokenizers, of_second, second
from sae_train.harvest.splice import Spliced, cross_entropy, splice_reports
from sae_train.harvest.windows import Windows
from sae_train.metrics.sharing import decoder_shares
from sae_train.places import Widths
from sae_train.sae.linear import LinearConfig, LinearSAE

T = 12


def make_windows(num_windows: int = 5, padding: int = 3) -> tuple[Windows, torch.Tensor]:
    """Windows with BOS first and padding last, and the mask of their ordinary positions."""
    tokens = torch.randint(4, 128, (num_windows, T), generator=torch.Generator().manual_seed(1))
    tokens[:, 0] = 1
    valid = torch.ones_like(tokens, dtype=torch.bool)
    valid[-1, T - padding :] = False
    return Windows(tokens, valid, tokens == 1, torch.arange(num_windows)), valid & (tokens != 1)


def tuned(model: nn.Module, by: float = 0.02) -> nn.Module:
    """The same architecture with other weights, as fine-tuning leaves them."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=by)
    return other


def sites_of(names: list[str], model: nn.Module, other: nn.Module) -> list[Site]:
    return [resolve(name, other if name.endswith("@other") else model) for name in names]


# -- hooks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "key", "tl_name", "layer"),
    [
        ("resid_post.1@other", "resid_post.1@other", "blocks.1.hook_resid_post", 1),
        ("blocks.1.hook_resid_post@other", "resid_post.1@other", "blocks.1.hook_resid_post", 1),
        ("embed@other", "embed@other", "hook_embed", None),
        ("model.layers.2:in@other", "model.layers.2:in@other", None, 2),
    ],
)
def test_a_hook_of_the_second_model_is_the_place_and_whose_it_is(name, key, tl_name, layer, tiny_model):
    site, plain = (
        resolve(name, tiny_model("llama")),
        resolve(name.removesuffix("@other"), tiny_model("llama")),
    )
    assert (site.name, site.key, site.other) == (name, key, True)
    assert (site.path, site.side) == (plain.path, plain.side)
    assert (site.tl_name, site.layer) == (tl_name, layer)
    assert not plain.other and plain.key + "@other" == site.key


def test_a_wrong_hook_of_the_second_model_is_said_to_be_of_that_model(tiny_model):
    with pytest.raises(InputError, match=r"hook='resid_post\.7@other'.*in model\.other.*from 0 to 2"):
        resolve("resid_post.7@other", tiny_model("llama"))


# -- rows -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("one", "two"), [("llama", "llama"), ("llama", "gpt2"), ("gpt_neox", "bert")])
def test_rows_of_two_models_are_the_bits_that_each_gives_by_itself(one, two, tiny_model):
    model, other = tiny_model(one), tuned(tiny_model(two))
    names = ["resid_post.1@other", "mlp_out.0", "resid_post.1", "mlp_out.2@other"]
    sites = sites_of(names, model, other)
    windows, _ = make_windows()
    both = Harvester(model, sites, 2, other=other)
    rows = both.rows(windows)
    assert list(both.dims) == names and rows.keys() == set(names)
    for name in names:
        of, own = (other, name.removesuffix("@other")) if "@" in name else (model, name)
        alone = Harvester(of, [resolve(own, of)], 2).rows(windows)[own]
        assert torch.equal(rows[name], alone), name
    assert not torch.equal(rows["resid_post.1"], rows["resid_post.1@other"])
    into = {name: torch.full_like(x, math.nan) for name, x in rows.items()}
    both.rows(windows, into)
    assert all(torch.equal(into[name], rows[name]) for name in names)


def test_the_same_model_twice_gives_the_same_rows_twice(tiny_model):
    model = tiny_model("llama")
    sites = sites_of(["resid_post.1", "resid_post.1@other"], model, model)
    rows = Harvester(model, sites, 2, other=model).rows(make_windows()[0])
    assert torch.equal(rows["resid_post.1"], rows["resid_post.1@other"])


def test_a_model_without_a_hook_is_not_run(tiny_model):
    model, other = copy.deepcopy(tiny_model("llama")), tiny_model("gpt2")
    model.register_forward_pre_hook(lambda *_: pytest.fail("the first model ran"))
    harvester = Harvester(model, [resolve("resid_post.0@other", other)], 2, other=other)
    assert harvester.rows(make_windows()[0])["resid_post.0@other"].shape == (5, T, 32)


class Small(nn.Module):
    """A model that runs out of memory above `most` windows."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.embed, self.layer, self.most = nn.Embedding(128, 6), nn.Linear(6, 6), most

    def forward(self, input_ids):
        if len(input_ids) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.layer(self.embed(input_ids))


@pytest.mark.parametrize(("most", "chosen"), [((100, 5), 2), ((5, 100), 2), ((16, 20), 8)])
def test_the_micro_batch_fits_the_larger_of_two_models(most, chosen):
    model, other = map(Small, most)
    sites = [Site("a", "a", "layer", "out"), Site("a@other", "a@other", "layer", "out", other=True)]
    assert Harvester(model, sites, 1, other=other).probe(context_length=T, limit=32) == chosen


# -- tokenizers -------------------------------------------------------------------------------------


def test_tokenizers_with_the_same_ids_pass_whatever_else_they_say(tiny_tokenizer):
    same = copy.deepcopy(tiny_tokenizer)
    same.model_max_length, same.padding_side, same.chat_template = 7, "left", "{{ messages }}"
    check_tokenizers("chat", tiny_tokenizer, same)


def changed(tokenizer: PreTrainedTokenizerFast, kind: str) -> PreTrainedTokenizerFast:
    other = copy.deepcopy(tokenizer)
    if kind == "extra":
        other.add_special_tokens({"additional_special_tokens": ["<user>"]})
    elif kind == "swapped":
        tree = json.loads(other.backend_tokenizer.to_str())
        vocabulary = tree["model"]["vocab"]
        vocabulary["w3"], vocabulary["w4"] = vocabulary["w4"], vocabulary["w3"]
        other = PreTrainedTokenizerFast(
            tokenizer_object=type(other.backend_tokenizer).from_str(json.dumps(tree)), unk_token="<unk>"
        )
    else:
        other.backend_tokenizer.normalizer = normalizers.Replace("w99", "w98")
    return other


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("extra", "1 tokens have other ids, such as '<user>': none there, 128 here"),
        ("swapped", "2 tokens have other ids, such as 'w3': 7 there, 8 here"),
        ("normalised", "not how text is cut into tokens"),
    ],
)
def test_tokenizers_that_give_other_ids_are_refused_with_what_differs(kind, said, tiny_tokenizer):
    with pytest.raises(InputError) as caught:
        check_tokenizers("chat", tiny_tokenizer, changed(tiny_tokenizer, kind))
    assert caught.value.field == "model.other" and caught.value.value == "chat"
    assert said in str(caught.value) and "model.tokenizer" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_second_model_needs_an_embedding_for_every_token(tiny_tokenizer):
    check_embeddings("chat", tiny_tokenizer, 128)
    with pytest.raises(InputError, match=r"model\.other='chat'.*it has 127, and the largest id is 127"):
        check_embeddings("chat", tiny_tokenizer, 127)


def test_the_second_model_is_loaded_as_the_first_with_its_own_name_and_revision():
    config = ModelConfig(
        name="a",
        revision="r",
        other="b",
        other_revision="s",
        gguf_file="a.gguf",
        dtype="float32",
        device="cpu",
    )
    own = second(config)
    assert (own.name, own.revision, own.gguf_file, own.other) == ("b", "s", None, None)
    assert (own.dtype, own.device) == ("float32", "cpu")
    with pytest.raises(InputError, match=r"model\.other_revision='s'"):
        ModelConfig(name="a", other_revision="s")


@pytest.mark.parametrize(
    ("field", "said"), [("model.name", "model.other"), ("model.revision", "model.other_revision"), ("x", "x")]
)
def test_what_is_wrong_with_the_second_model_is_said_of_its_keys(field, said):
    with pytest.raises(InputError) as caught, of_second():
        raise InputError(field, "b", "at most 64, the positions of this model")
    assert caught.value.field == said
    assert caught.value.accepted == "at most 64, the positions of model.other"


# -- cross-entropy ----------------------------------------------------------------------------------


def swap(rows: torch.Tensor) -> torch.Tensor:
    """A crosscoder that gives each model the rows of the other."""
    return rows.roll(rows.shape[-1] // 2, dims=-1)


def ordinary(model: nn.Module, site: Site, windows: Windows, mask: torch.Tensor) -> torch.Tensor:
    rows = []
    with torch.no_grad(), hooked(model, {site: lambda x: rows.append(x[mask])}):
        model(input_ids=windows.tokens, attention_mask=windows.valid.long())
    return rows[0]


def test_each_model_runs_with_its_own_rows_replaced_and_has_its_own_scores(tiny_model):
    model, other = tiny_model("llama"), tuned(tiny_model("gpt2"))
    windows, mask = make_windows()
    here, there = sites_of(["resid_post.1", "resid_post.0@other"], model, other)
    means = [torch.linspace(-1, 1, 32), torch.linspace(2, -2, 32)]
    report = splice_reports(
        model, windows, mask, [Spliced([here, there], [here, there], swap, means)], other
    )[0]
    theirs = {True: ordinary(model, here, windows, mask), False: ordinary(other, there, windows, mask)}
    for one, site, prefix, mean in ((model, here, "", means[0]), (other, there, "other/", means[1])):

        def ce(way=None, one=one, site=site):
            return cross_entropy(one, windows, mask, None if way is None else {site: way}).ce

        def with_theirs(rows, site=site):
            return theirs[site.other]

        numbers = {key.removeprefix(prefix): value for key, value in report.items() if key.startswith(prefix)}
        assert numbers["ce_clean"] == ce()
        assert numbers["ce_sae"] == ce(with_theirs)
        assert numbers["ce_zero"] == ce(torch.zeros_like)
        assert numbers["ce_mean"] == ce(lambda rows, mean=mean: mean.expand_as(rows))
        kl = cross_entropy(one, windows, mask, {site: with_theirs}, kl=True).kl
        assert numbers["kl_sae"] == kl > 0
        assert numbers["tokens"] == 47
    assert report["ce_clean"] != report["other/ce_clean"]
    assert len(report) == 2 * 8


@pytest.mark.parametrize(
    ("inputs", "outputs", "of_other"),
    [
        (["resid_post.1"], ["resid_post.1"], False),
        (["resid_post.1@other"], ["resid_post.1@other"], True),
        (["resid_post.1"], ["resid_post.1@other"], True),
        (["resid_post.1@other", "mlp_out.0"], ["resid_post.1"], False),
    ],
)
def test_what_changes_one_model_only_has_that_models_scores_under_the_usual_names(
    inputs, outputs, of_other, tiny_model
):
    model, other = tiny_model("llama"), tuned(tiny_model("llama"))
    windows, mask = make_windows()
    read, made = sites_of(inputs, model, other), sites_of(outputs, model, other)
    first = torch.zeros(32)
    report = splice_reports(
        model, windows, mask, [Spliced(read, made, lambda rows: rows[:, :32], [first])], other
    )[0]
    one, site = (other, made[0]) if of_other else (model, made[0])
    source = ordinary(other if read[0].other else model, read[0], windows, mask)
    assert len(report) == 8
    assert report["ce_clean"] == cross_entropy(one, windows, mask).ce
    assert report["ce_sae"] == cross_entropy(one, windows, mask, {site: lambda _: source}).ce


def test_what_an_sae_is_told_does_not_depend_on_those_judged_with_it(tiny_model, monkeypatch):
    monkeypatch.setattr(splice, "FORWARD_TOKENS", 4 * 12)  # parts of four windows, or of two for two models
    model, other = tiny_model("llama"), tuned(tiny_model("gpt2"))
    windows, mask = make_windows()
    here, there = sites_of(["resid_post.1", "resid_post.0@other"], model, other)
    means = [torch.linspace(-1, 1, 32), torch.linspace(2, -2, 32)]
    saes = [
        Spliced([here], [here], lambda rows: 0.9 * rows, means[:1]),
        Spliced([here, there], [here, there], swap, means),
        Spliced([there], [there], torch.zeros_like, means[1:]),
    ]
    together = splice_reports(model, windows, mask, saes, other)
    assert together == [splice_reports(model, windows, mask, [sae], other)[0] for sae in saes]
    assert together[::-1] == splice_reports(model, windows, mask, saes[::-1], other)


@pytest.mark.parametrize("first", [True, False])
def test_a_model_that_predicts_nothing_is_read_but_has_no_scores(first, tiny_model):
    pair = (tiny_model("bert"), tiny_model("llama")) if first else (tiny_model("llama"), tiny_model("bert"))
    windows, mask = make_windows()
    sites = sites_of(["resid_post.1", "resid_post.1@other"], *pair)
    means = [torch.zeros(32)] * 2
    report = splice_reports(
        pair[0], windows, mask, [Spliced(sites, sites, lambda rows: rows, means)], pair[1]
    )[0]
    prefix = "other/" if first else ""
    assert set(report) == {prefix + key for key in ("ce_clean", "ce_sae", "ce_zero", "ce_mean")} | {
        prefix + key for key in ("kl_sae", "recovered_zero", "recovered_mean", "tokens")
    }
    assert report[f"{prefix}ce_sae"] == report[f"{prefix}ce_clean"]
    encoder = sites[0 if first else 1]
    with pytest.raises(InputError, match="causal LM"):
        splice_reports(
            pair[0], windows, mask, [Spliced(sites, [encoder], lambda rows: rows[:, :32], means[:1])], pair[1]
        )[0]


# -- shares -----------------------------------------------------------------------------------------


def crosscoder(*scales: float) -> LinearSAE:
    config = LinearConfig(kind="crosscoder", d_sae=4, activation=TopKConfig(k=2))
    sae = LinearSAE(config, Widths((2,) * len(scales)))
    with torch.no_grad():
        sae.input_scale.copy_(torch.tensor(scales))
    return sae


def test_shares_are_the_decoders_norms_at_each_hook():
    sae = crosscoder(1.0, 1.0)
    with torch.no_grad():
        sae.w_dec.copy_(torch.tensor([[3.0, 4, 0, 5], [1, 0, 0, 0], [0, 0, 6, 8], [0, 0, 0, 0]]))
    assert decoder_shares(sae).tolist() == [[0.5, 0.5], [1, 0], [0, 1], [0, 0]]


def test_shares_do_not_depend_on_how_long_the_rows_of_a_hook_are():
    """Published, the decoder is in raw units: what the scales say has to be said again."""
    sae = crosscoder(2.0, 0.01, 30.0)
    with torch.no_grad():
        sae.w_dec.copy_(torch.randn(4, 6, generator=torch.Generator().manual_seed(0)))
    sae.after_step()
    shares, published = decoder_shares(sae), sae.folded()
    assert torch.allclose(shares.sum(dim=-1), torch.ones(4))
    assert torch.allclose(decoder_shares(published, sae.input_scale), shares, rtol=1e-6)
    assert decoder_shares(published)[:, 1].min() > 0.9  # rows of the second hook are the longest by far
