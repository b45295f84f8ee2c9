"""Every registered architecture with every registered activation keeps the same promises.

Cases come from the registries: a new entry is tested the day it appears.
"""

import copy

import pytest
import torch

from sae_train.activations.base import ACTIVATIONS
from sae_train.batch import Batch
from sae_train.registry import discover
from sae_train.sae.base import SAE, SAES
from sae_train.sae.io import load_sae, save_sae

discover("sae_train.activations")
discover("sae_train.sae")

D, F, N = 12, 40, 64
EPS = 2.0**-24
CASES = [(s, a) for s in SAES for a in ACTIVATIONS]
NO_DEAD = torch.zeros(0, dtype=torch.int64)
SOME_DEAD = torch.tensor([1, 5, 17, 30])


def rows(n: int = N, seed: int = 0, shift: float = 3.0) -> torch.Tensor:
    """Low-rank rows with an offset and a scale of their own, so that centring and scaling matter."""
    g = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(
        torch.randn(24, D, generator=torch.Generator().manual_seed(99)), dim=-1
    )
    strengths = torch.rand(n, 24, generator=g) * (torch.rand(n, 24, generator=g) < 0.15)
    return 7 * (strengths @ directions) + shift + 0.05 * torch.randn(n, D, generator=g)


def build(sae_name: str, activation_name: str, initialised: bool = True) -> SAE:
    activation_config = ACTIVATIONS.config(activation_name)
    options = {"k": 4} if hasattr(activation_config(), "k") else {}
    config = SAES.config(sae_name)(d_sae=F, activation=activation_config(**options))
    sae = SAES.build(config, D)
    if initialised:
        sae.initialise(rows(256), torch.Generator().manual_seed(3))
    return sae


@pytest.fixture(params=CASES, ids=lambda case: "-".join(case))
def sae(request) -> SAE:
    return build(*request.param)


def test_shapes_and_dtypes(sae):
    x = rows()
    codes = sae.encode(x)
    assert codes.values.shape[0] == N and codes.d_sae == F
    assert sae.decode(codes).shape == (N, D)
    assert sae.preactivations(x, SOME_DEAD).shape == (N, 4)
    out = sae.losses(Batch(x, x), SOME_DEAD)
    assert out.y_hat.shape == (N, D) and out.total.shape == ()
    assert sae(x.bfloat16()).dtype == torch.float32


def test_every_parameter_gets_a_finite_gradient(sae):
    x = rows()
    sae.losses(Batch(x, x), SOME_DEAD).total.backward()
    for name, parameter in sae.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_every_logged_term_moves_a_parameter(sae):
    x = rows()
    for term in sae.losses(Batch(x, x), SOME_DEAD).terms:
        sae.zero_grad()
        sae.losses(Batch(x, x), SOME_DEAD).terms[term].backward()
        assert sum(float(p.grad.abs().sum()) for p in sae.parameters() if p.grad is not None) > 0, term


def test_the_dead_term_reaches_encoder_and_decoder_of_dead_latents_only(sae):
    x = rows()
    losses = sae.losses(Batch(x, x), SOME_DEAD)
    assert "auxk" in losses.terms
    losses.terms["auxk"].backward()
    alive = torch.ones(F, dtype=torch.bool)
    alive[SOME_DEAD] = False
    for name in ("w_enc", "w_dec"):
        grad = getattr(sae, name).grad
        assert (grad[SOME_DEAD].abs().sum(dim=-1) > 0).any(), name
        assert grad[alive].abs().sum() == 0, name


@pytest.mark.parametrize("awkward", ["zeros", "constant", "one_row", "huge"])
def test_awkward_batches_give_finite_losses_and_gradients(sae, awkward):
    x = {
        "zeros": torch.zeros(N, D),
        "constant": rows(1).expand(N, D),
        "one_row": rows(1),
        "huge": rows() * 1e4,
    }[awkward]
    for dead in (NO_DEAD, SOME_DEAD, torch.arange(F)):
        sae.zero_grad()
        losses = sae.losses(Batch(x, x), dead)
        losses.total.backward()
        assert torch.isfinite(losses.total)
        assert all(torch.isfinite(p.grad).all() for p in sae.parameters() if p.grad is not None)


def test_initialisation_on_rows_without_variance_is_finite():
    for case in CASES:
        sae = build(*case, initialised=False)
        sae.initialise(torch.ones(16, D), torch.Generator().manual_seed(0))
        assert all(torch.isfinite(t).all() for t in sae.state_dict().values())


def test_scaled_rows_are_sqrt_d_from_the_decoder_bias_on_average(sae):
    x = rows(256)
    distance = (x * sae.input_scale - sae.b_dec.detach()).norm(dim=-1).mean()
    assert abs(float(distance) / D**0.5 - 1) < 256 * D * EPS


def test_folding_keeps_support_and_reconstruction(sae):
    x = rows(seed=5)
    folded = sae.folded()
    assert folded.input_scale == 1 and sae.input_scale != 1
    before, after = sae.encode(x), folded.encode(x)
    assert torch.equal((before.dense() != 0), (after.dense() != 0))
    torch.testing.assert_close(folded(x), sae(x), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(after.dense() * sae.input_scale, before.dense(), rtol=1e-4, atol=1e-5)


def test_saving_and_loading_gives_the_same_bits(sae, tmp_path):
    save_sae(sae, tmp_path, {"hook": "resid_post.3"})
    loaded = load_sae(tmp_path)
    for name, tensor in sae.folded().state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    x = rows(seed=6)
    assert torch.equal(loaded(x), sae.folded()(x))
    assert not any(p.requires_grad for p in loaded.parameters())


def test_decoder_rows_stay_unit_and_their_gradient_has_no_parallel_part(sae):
    x = rows()
    sae.losses(Batch(x, x), SOME_DEAD).total.backward()
    sae.before_step()
    parallel = (sae.w_dec.grad * sae.w_dec).sum(dim=-1).abs()
    assert (parallel <= 4 * D * EPS * sae.w_dec.grad.norm(dim=-1).clamp_min(1e-3)).all()
    with torch.no_grad():
        sae.w_dec.mul_(1.7)
    sae.after_step()
    assert (sae.w_dec.norm(dim=-1) - 1).abs().max() < 4 * D * EPS


def test_loss_falls_on_rows_with_structure(sae):
    optimizer = torch.optim.Adam(sae.parameters(), lr=3e-3)
    first = last = None
    for step in range(150):
        x = rows(seed=100 + step)
        optimizer.zero_grad()
        total = sae.losses(Batch(x, x), NO_DEAD).total
        total.backward()
        sae.before_step()
        optimizer.step()
        sae.after_step()
        last = float(total.detach())
        first = last if first is None else first
    assert last < 0.5 * first


def test_the_loss_is_the_same_for_data_in_other_units(sae):
    twin = copy.deepcopy(sae)
    twin.initialise(rows(256) * 1000, torch.Generator().manual_seed(3))
    x = rows(seed=8)
    mine, other = sae.losses(Batch(x, x), SOME_DEAD), twin.losses(Batch(x * 1000, x * 1000), SOME_DEAD)
    for term in mine.terms:
        torch.testing.assert_close(mine.terms[term], other.terms[term], rtol=2e-3, atol=1e-5)


def test_encoding_agrees_with_the_dense_definition(sae):
    x = rows(seed=9)
    via_kernel = sae.encode(x).dense()
    via_dense = sae.activation(sae.preactivations(x)).dense()
    torch.testing.assert_close(via_kernel, via_dense, rtol=1e-4, atol=1e-5)
