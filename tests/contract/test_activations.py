"""Every registered activation keeps the same promises, whatever it selects by.

Cases come from the registry: a new entry is tested the day it appears. A float32 sum of m terms errs by at
most about m * EPS of the sum of their sizes; the bounds below are of that form.
"""

import copy
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sae_train.activations.base import ACTIVATIONS, Activation
from sae_train.batch import Batch
from sae_train.codes import Codes
from sae_train.registry import discover
from sae_train.sae.io import load_sae, save_sae
from sae_train.sae.linear import LinearConfig, LinearSAE

discover("sae_train.activations")

D, F, N, K, STEPS = 12, 48, 96, 4, 20
EPS = 2.0**-24
OPTIONS = {
    "k": K,
    "target_l0": float(K),
    "k_start": 2 * K,
    "multi": 0.125,
    "p_end": 0.5,
    "threshold_decay": 0.8,
}
"""What activations that know these keys are told; what changes over a run does so."""


def build(name: str) -> Activation:
    config = ACTIVATIONS.config(name)
    known = {key: value for key, value in OPTIONS.items() if hasattr(config(), key)}
    return ACTIVATIONS.build(config(**known), F)


def rows(seed: int = 0, n: int = N) -> Tensor:
    """Encoder inputs: sparse sums of fixed directions, of a mean norm of about sqrt(D)."""
    directions = functional.normalize(torch.randn(32, D, generator=torch.Generator().manual_seed(99)), dim=-1)
    draw = torch.Generator().manual_seed(seed)
    on = torch.rand(n, 32, generator=draw) < 0.12
    return 1.7 * (torch.rand(n, 32, generator=draw) + 0.3) * on @ directions + 0.05 * torch.randn(
        n, D, generator=draw
    )


def weights() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(5)
    return functional.normalize(torch.randn(F, D, generator=draw), dim=-1), 0.1 * torch.randn(
        F, generator=draw
    )


@cache
def _practised(name: str) -> Activation:
    activation, (w, b) = build(name), weights()
    activation.initialise(rows(1, 512), w, b)
    for step in range(STEPS):
        activation.begin_step(step, STEPS)
        activation.encode_training(rows(step), w, b)
    with torch.no_grad():
        for parameter in activation.parameters():  # thresholds that differ from latent to latent
            parameter.mul_(
                0.8 + 0.4 * torch.rand(parameter.shape, generator=torch.Generator().manual_seed(6))
            )
    return activation


@pytest.fixture(params=list(ACTIVATIONS))
def activation(request) -> Activation:
    """One that has been initialised and has seen some steps."""
    return copy.deepcopy(_practised(request.param))


def check_slots(codes: Codes, n: int) -> None:
    assert codes.d_sae == F and codes.values.dtype == torch.float32 and len(codes.values) == n
    assert torch.isfinite(codes.values).all() and (codes.values >= 0).all()
    assert torch.equal(codes.counts(), (codes.dense() > 0).sum(dim=0)), "a latent is in two slots of a row"
    if codes.indices is None:
        assert codes.values.shape == (n, F)
    else:
        assert codes.indices.dtype == torch.int32 and codes.indices.shape == codes.values.shape
        assert ((codes.indices >= 0) & (codes.indices < F)).all(), "also those of empty slots"


def test_encoding_is_the_activation_of_the_preactivations(activation):
    x, (w, b) = rows(2), weights()
    codes, dense = activation.encode(x, w, b), activation(functional.linear(x, w, b))
    largest = float((x.abs() @ w.abs().T + b.abs()).max())
    assert 0 < codes.l0().sum() < N * F
    torch.testing.assert_close(codes.dense(), dense.dense(), rtol=0, atol=2 * (D + 1) * EPS * largest)


def test_each_row_is_encoded_by_itself(activation):
    x, (w, b) = rows(3, 8), weights()
    together = activation.encode(x, w, b).dense()
    alone = torch.cat([activation.encode(row, w, b).dense() for row in x.split(1)])
    assert torch.equal(together != 0, alone != 0)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=16 * D * EPS)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_an_empty_slot_is_a_zero_with_a_latent_in_range(activation, training):
    x, (w, b) = rows(4), weights()
    x[:3] = 0
    for bias in (b, b - 1, torch.full((F,), -1e6), torch.full((F,), 1e3)):
        codes = (activation.encode_training if training else activation.encode)(x, w, bias)
        check_slots(codes, N)
        if bias.amax() < -1e5:
            assert codes.l0().sum() == 0


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_values_and_gradients_are_those_of_dense_float64(activation, training):
    x, (w, b) = rows(5), weights()
    g = torch.randn(N, F, generator=torch.Generator().manual_seed(7))
    single = [t.clone().requires_grad_() for t in (x, w, b)]
    codes = (activation.encode_training if training else activation.encode)(*single)
    (codes.dense() * g).sum().backward()
    double = [t.double().requires_grad_() for t in (x, w, b)]
    want = functional.linear(*double) * (codes.dense() != 0)
    (want * g).sum().backward()
    assert (want >= 0).all()
    torch.testing.assert_close(
        codes.dense().double(), want, rtol=0, atol=4 * D * EPS * float(want.detach().abs().max())
    )
    for one, two in zip(single, double, strict=True):
        apart = (one.grad - two.grad).norm() / two.grad.norm()
        assert apart < 4 * (N + F) * EPS, apart


@pytest.mark.parametrize("latents", ["as they are", "all alive", "all dead"])
def test_awkward_rows_and_latents_stay_finite_with_their_gradients_penalties_and_state(activation, latents):
    w, b = weights()
    b = b + {"as they are": 0.0, "all alive": 1e3, "all dead": -1e6}[latents]
    batches = {"zeros": torch.zeros(N, D), "constant": rows(1, 1).expand(N, D), "one row": rows(1, 1)}
    for name, x in (batches | {"huge": 1e6 * rows(), "usual": rows()}).items():
        activation.begin_step(STEPS // 2, STEPS)
        leaves = [t.clone().requires_grad_() for t in (x, w, b)]
        codes = activation.encode_training(*leaves)
        terms = activation.penalty(codes, torch.ones(F))
        total = codes.values.sum() + sum(terms.values())
        for weight, others in activation.also_reconstruct(*leaves).values():
            total = total + weight * others.values.sum()
        total.backward()
        assert torch.isfinite(total), name
        for grad in [leaf.grad for leaf in leaves] + [p.grad for p in activation.parameters()]:
            assert torch.isfinite(grad).all(), name
        assert all(torch.isfinite(t).all() for t in activation.state_dict().values()), name
        assert torch.isfinite(activation.encode(x, w, b).values).all(), name


def test_rows_that_are_not_finite_teach_nothing(activation):
    before = copy.deepcopy(activation.state_dict())
    w, b = weights()
    for bad in (torch.nan, torch.inf):
        x = rows()
        x[3, 2] = bad
        activation.begin_step(3, STEPS)
        activation.encode_training(x, w, b)
    for name, tensor in activation.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_penalties_are_finite_scalars_under_names_of_their_own(activation):
    activation.begin_step(STEPS // 2, STEPS)
    terms = activation.penalty(activation.encode_training(rows(), *weights()), torch.ones(F))
    assert not {"mse", "auxk", "gate"} & terms.keys()
    for term in terms.values():
        assert term.shape == () and torch.isfinite(term) and term >= 0


def test_what_a_step_changes_follows_from_its_number_alone(activation):
    """A run that begins in the middle does what one does that got there step by step."""
    twin, (w, b) = copy.deepcopy(activation), weights()
    before = copy.deepcopy(activation.state_dict())
    for step in (*range(6), 17, 5):
        activation.begin_step(step, STEPS)
    twin.begin_step(5, STEPS)
    assert all(torch.equal(t, before[name]) for name, t in activation.state_dict().items())
    for x in (rows(8), rows(9)):
        one, two = activation.encode_training(x, w, b), twin.encode_training(x, w, b)
        assert torch.equal(one.dense(), two.dense())
        for name, term in activation.penalty(one, torch.ones(F)).items():
            assert torch.equal(term, twin.penalty(two, torch.ones(F))[name])
    assert all(torch.equal(t, twin.state_dict()[name]) for name, t in activation.state_dict().items())


@pytest.mark.parametrize("scale", [0.013, 37.0])
def test_folding_divides_codes_and_keeps_which_latents_are_active(activation, scale):
    x, (w, b) = rows(10), weights()
    before = activation.encode(x, w, b)
    activation.fold_(torch.tensor(scale))
    after = activation.encode(x / scale, w, b / scale)
    assert torch.equal(after.dense() != 0, before.dense() != 0) and before.l0().sum() > 0
    torch.testing.assert_close(after.dense() * scale, before.dense(), rtol=8 * D * EPS, atol=8 * D * EPS)
    dense = activation(functional.linear(x / scale, w, b / scale)).dense()
    torch.testing.assert_close(dense * scale, before.dense(), rtol=8 * D * EPS, atol=8 * D * EPS)


def test_a_state_that_is_saved_and_loaded_goes_on_with_the_same_bits(activation):
    twin, (w, b) = build(activation.config.name), weights()
    twin.load_state_dict(copy.deepcopy(activation.state_dict()))
    assert torch.equal(twin.encode(rows(11), w, b).dense(), activation.encode(rows(11), w, b).dense())
    for step in (12, 13):
        codes = []
        for one in (activation, twin):
            one.begin_step(step, STEPS)
            codes.append(one.encode_training(rows(step), w, b))
        assert torch.equal(codes[0].dense(), codes[1].dense())
    assert all(torch.equal(t, twin.state_dict()[name]) for name, t in activation.state_dict().items())


@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_a_trained_sae_is_published_and_read_back_with_its_codes(name, tmp_path):
    x = 5 * rows(0, 256) + 2
    sae = LinearSAE(LinearConfig(d_sae=F, activation=build(name).config), D)
    sae.initialise(x, torch.Generator().manual_seed(3))
    optimizer = torch.optim.Adam(sae.parameters(), lr=3e-3)
    for step in range(STEPS):
        sae.begin_step(step, STEPS)
        batch = 5 * rows(step) + 2
        optimizer.zero_grad()
        sae.losses(Batch(batch, batch), torch.zeros(0, dtype=torch.int64)).total.backward()
        optimizer.step()
        sae.after_step()
    save_sae(sae, tmp_path, {"hook": "resid_post.3"})
    loaded = load_sae(tmp_path)
    trained, read = sae.encode(x), loaded.encode(x)
    assert 0 < trained.l0().sum() < trained.d_sae * len(x)
    assert torch.equal(trained.dense() != 0, read.dense() != 0)
    scale = float(sae.input_scale)
    torch.testing.assert_close(read.dense() * scale, trained.dense(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loaded(x), sae(x), rtol=1e-5, atol=1e-4)
    assert torch.equal(read.dense(), sae.folded().encode(x).dense())
