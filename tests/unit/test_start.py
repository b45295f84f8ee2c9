"""Training goes on from a published SAE: the same function, in the units of the rows at hand."""

import pytest
import torch

from sae_train.activations.base import ACTIVATIONS
from sae_train.errors import InputError
from sae_train.places import Widths
from sae_train.registry import discover
from sae_train.sae.base import SAE, SAES
from sae_train.sae.start import take_over

discover("sae_train.activations")
discover("sae_train.sae")
D, F = 8, 24
KINDS = {
    "autoencoder": Widths((D,)),
    "transcoder": Widths((D,), (6,)),
    "crosscoder": Widths((D, 6)),
}


def rows(n: int, widths: tuple[int, ...], seed: int) -> torch.Tensor:
    """Rows of several hooks, each with a scale and an offset of its own."""
    g = torch.Generator().manual_seed(seed)
    parts = [torch.randn(n, w, generator=g) * (3.0 + 10 * i) + 2 + i for i, w in enumerate(widths)]
    return torch.cat(parts, dim=-1)


def build(name: str, activation: str, kind: str, seed: int, d_sae: int = F) -> SAE:
    chosen = ACTIVATIONS.config(activation)
    options = {key: 4 for key in ("k", "target_l0") if hasattr(chosen(), key)}
    widths = KINDS[kind]
    sae = SAES.build(SAES.config(name)(kind=kind, d_sae=d_sae, activation=chosen(**options)), widths)
    targets = rows(200, widths.targets, seed + 1) if widths.targets else None
    sae.initialise(rows(200, widths.inputs, seed), torch.Generator().manual_seed(seed), targets)
    with torch.no_grad():  # as if it had been trained
        for parameter in (sae.b_enc, sae.b_dec):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    return sae


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ["topk", "relu", "jumprelu", "batch_topk"])
@pytest.mark.parametrize("name", ["linear", "gated", "matryoshka"])
def test_it_computes_what_the_published_one_does_and_publishes_the_same(name, activation, kind):
    # The scales of a crosscoder's hooks are those of the rows it starts from: the same for both.
    old, new = (
        build(name, activation, kind, 0),
        build(name, activation, kind, 0 if kind == "crosscoder" else 7),
    )
    published = old.folded()
    take_over(new, published, "there")
    assert float(new.input_scale.flatten()[0]) != 1
    x = rows(50, KINDS[kind].inputs, 3)
    # Scaling to and fro rounds each weight a few times; differences grow with the size of pre-activations.
    torch.testing.assert_close(new(x), published(x), rtol=1e-4, atol=1e-4)
    assert torch.equal(new.encode(x).dense() > 0, published.encode(x).dense() > 0)
    assert (new.w_dec.norm(dim=-1) - 1).abs().max() < 1e-6
    for key, tensor in new.folded().state_dict().items():
        torch.testing.assert_close(tensor, published.state_dict()[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
@pytest.mark.parametrize("name", ["linear", "gated"])
def test_decoder_rows_of_other_lengths_become_unit_rows_and_nothing_else_changes(name, activation):
    old, new = build(name, activation, "autoencoder", 0), build(name, activation, "autoencoder", 7)
    published = old.folded()
    with torch.no_grad():  # as other libraries leave them; one latent has no decoder at all
        published.w_dec.mul_(torch.linspace(0, 4, F)[:, None])
    take_over(new, published, "there")
    x = rows(50, KINDS["autoencoder"].inputs, 3)
    torch.testing.assert_close(new(x), published(x), rtol=1e-4, atol=1e-4)
    assert torch.equal(new.encode(x).dense()[:, 1:] > 0, published.encode(x).dense()[:, 1:] > 0)
    assert (new.w_dec.norm(dim=-1)[1:] - 1).abs().max() < 1e-6 and not new.w_dec[0].any()


def test_another_kind_another_width_and_other_options_are_refused():
    sae = build("linear", "topk", "autoencoder", 0)
    for other, field in (
        (build("linear", "relu", "autoencoder", 0), "relu"),
        (build("gated", "topk", "autoencoder", 0), "gated"),
        (build("linear", "topk", "crosscoder", 0), "crosscoder"),
        (build("linear", "topk", "autoencoder", 0, d_sae=F + 1), "of shape"),
    ):
        before = {key: tensor.clone() for key, tensor in sae.state_dict().items()}
        with pytest.raises(InputError, match=field):
            take_over(sae, other.folded(), "there")
        assert all(torch.equal(before[key], tensor) for key, tensor in sae.state_dict().items())
