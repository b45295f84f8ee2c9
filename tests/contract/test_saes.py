"""Every registered architecture with every registered activation, of every kind, keeps the same promises.

Cases come from the registries: a new entry is tested the day it appears. Sums of m float32 terms err by at
most about m * EPS of their size, relatively; the bounds below are of that form.
"""

import copy
from functools import cache
from itertools import product

import pytest
import torch
from torch.nn import functional

from sae_train.activations.base import ACTIVATIONS
from sae_train.batch import Batch, RowBatch
from sae_train.codes import Codes
from sae_train.losses import auxk, fvu
from sae_train.places import Places
from sae_train.registry import discover
from sae_train.sae.base import SAE, SAES, SAEConfig, per_column
from sae_train.sae.io import load_sae, save_sae
from sae_train.train.members import Member, MemberConfig
from sae_train.train.optim import OptimConfig
from sae_train.train.stepper import AutogradStepper

pytestmark = pytest.mark.usefixtures("one_thread")

discover("sae_train.activations")
discover("sae_train.sae")

F, N, K = 40, 64, 4
EPS = 2.0**-24
DIMS = {"a": 12, "b": 8, "y": 10}
PLACES = {
    "autoencoder": Places.parse("a"),
    "transcoder": Places.parse("a", "y"),
    "skip transcoder": Places.parse("a", "y"),
    "crosscoder": Places.parse("a+b"),
}
CASES = list(product(SAES, ACTIVATIONS, PLACES))
TRAINED = [case for case in CASES if case[2] in ("autoencoder", "skip transcoder")]
RESUMED = [case for case in CASES if case[2] in ("autoencoder", "crosscoder")]
"""What takes longer is done for two kinds; the commands are run for all."""
OPTIONS = {"k": K, "target_l0": float(K), "threshold_decay": 0.9}
"""What activations that know these keys are told: how many latents to keep, and to learn within few steps."""
NO_DEAD = torch.zeros(0, dtype=torch.int64)
SOME_DEAD = torch.tensor([1, 5, 17, 30])


def rows(n: int = N, seed: int = 0) -> dict[str, torch.Tensor]:
    """hook -> rows of the same few features, each hook with directions, an offset and a scale of its own."""
    g = torch.Generator().manual_seed(seed)
    strengths = torch.rand(n, 24, generator=g) * (torch.rand(n, 24, generator=g) < 0.15)
    out = {}
    for number, (hook, width) in enumerate(DIMS.items()):
        fixed = torch.Generator().manual_seed(99 + number)
        directions = functional.normalize(torch.randn(24, width, generator=fixed), dim=-1)
        noise = 0.05 * torch.randn(n, width, generator=g)
        out[hook] = (7 * (strengths @ directions) + 3 + noise) * (1, 0.2, 5)[number]
    return out


def config(sae_name: str, activation_name: str, kind: str, **options) -> SAEConfig:
    activation = ACTIVATIONS.config(activation_name)
    told = {key: value for key, value in OPTIONS.items() if hasattr(activation(), key)}
    skip = {"skip": True} if kind == "skip transcoder" else {}
    kind = kind.removeprefix("skip ")
    return SAES.config(sae_name)(kind=kind, d_sae=F, activation=activation(**told), **skip, **options)


def initialised(sae: SAE, places: Places, seen: dict[str, torch.Tensor]) -> SAE:
    x, y = places.batch(seen)
    sae.initialise(x, torch.Generator().manual_seed(3), y if places.targets else None)
    return sae


@cache
def built(case: tuple[str, str, str]) -> SAE:
    places = PLACES[case[2]]
    return initialised(SAES.build(config(*case), places.widths(DIMS)), places, rows(256))


@pytest.fixture(params=CASES, ids="-".join)
def case(request) -> tuple[str, str, str]:
    return request.param


@pytest.fixture
def places(case) -> Places:
    return PLACES[case[2]]


@pytest.fixture
def sae(case) -> SAE:
    return copy.deepcopy(built(case))


def test_shapes_and_dtypes(sae, places):
    x, y = places.batch(rows())
    codes = sae.encode(x)
    assert codes.values.shape[0] == N and codes.d_sae == F
    assert sae.decode(codes).shape == y.shape
    assert torch.equal(sae(x), sae.reconstruct(x, codes))
    out = sae.losses(Batch(x, y), SOME_DEAD)
    assert out.y_hat.shape == y.shape and out.total.shape == ()
    assert sae(x.bfloat16()).dtype == torch.bfloat16


def test_preactivations_of_some_latents_are_those_of_all(sae, places):
    x, _ = places.batch(rows())
    whole = sae.preactivations(x)
    assert whole.shape == (N, F)
    for some in (SOME_DEAD, slice(3, 9)):
        part = sae.preactivations(x, some)
        torch.testing.assert_close(
            part, whole[:, some], rtol=0, atol=32 * EPS * float(whole.detach().abs().max())
        )


def test_encoding_is_the_activation_of_the_preactivations(sae, places):
    x, _ = places.batch(rows(seed=9))
    via_dense = sae.magnitudes(sae.activation(sae.preactivations(x))).dense()
    torch.testing.assert_close(sae.encode(x).dense(), via_dense, rtol=1e-4, atol=1e-5)


def plain_terms(sae: SAE, batch: Batch, dead: torch.Tensor) -> dict[str, torch.Tensor]:
    """The loss as docs/architectures.md has it, in dense products; only which latents are active is taken
    from the activation, and its own penalty."""
    name, p = sae.config.name, dict(sae.named_parameters())
    scale_in = per_column(sae.input_scale, sae.widths.inputs)
    transcodes = sae.config.kind == "transcoder"
    scale_out = per_column(sae.output_scale, sae.widths.outputs) if transcodes else scale_in
    x = batch.x * scale_in - (sae.centre if transcodes else p["b_dec"])
    target = batch.y * scale_out - p["b_dec"]
    if sae.config.skip:
        target = target - x @ p["w_skip"].T
    g = x @ p["w_enc"].T + p["b_enc"]
    active = sae.activation.encode_training(x, p["w_enc"], p["b_enc"])
    mask = (active.dense() != 0).float()
    z = g * mask
    if name == "gated":
        z = mask * torch.relu(p["r_mag"].exp() * (x @ p["w_enc"].T) + p["b_mag"])

    def mse(codes, first, w_dec=None, wanted=target):
        w_dec = p["w_dec"] if w_dec is None else w_dec
        return (wanted - codes[:, :first] @ w_dec[:first]).square().mean()

    prefixes = (2, 4, 9, 19, F) if name == "matryoshka" else (F,)
    terms = {"mse": sum(mse(z, first) for first in prefixes) / len(prefixes)}
    if name == "gated":
        terms["gate"] = mse(g * mask, F, p["w_dec"].detach(), target.detach())
    norms = sum(part.norm(dim=-1) for part in p["w_dec"].split(sae.widths.outputs, dim=-1))
    terms |= sae.activation.penalty(active, norms)
    alone = torch.relu(x @ p["w_enc"][dead].T + p["b_enc"][dead]) @ p["w_dec"][dead]  # fewer than k_aux
    terms["auxk"] = auxk(target - z @ p["w_dec"], alone) / 32
    return terms


def gradients(sae: SAE, term: torch.Tensor) -> dict[str, torch.Tensor]:
    names, parameters = zip(*sae.named_parameters(), strict=True)
    found = torch.autograd.grad(term, parameters, allow_unused=True, retain_graph=True)
    return {
        n: torch.zeros_like(p) if d is None else d for n, p, d in zip(names, parameters, found, strict=True)
    }


def test_every_logged_term_moves_what_it_should_as_plain_autograd_does(case, sae, places):
    with torch.no_grad():  # or magnitudes and gates would be the same
        for name, parameter in sae.named_parameters():
            if name in ("b_enc", "r_mag", "b_mag", "w_skip"):
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    twin, batch = copy.deepcopy(sae), places.batch(rows())
    got, want = sae.losses(batch, SOME_DEAD).terms, plain_terms(twin, batch, SOME_DEAD)
    assert got.keys() == want.keys()
    own = {name for name, _ in sae.named_parameters() if not name.startswith("activation.")}
    encoder = {"w_enc", "b_enc"} | ({"b_dec"} if "transcoder" not in case[2] else set())
    bias = {"b_enc"} if case[0] == "gated" else set()  # gates alone have it
    moves = {"mse": own - bias, "gate": encoder, "auxk": encoder | {"w_dec"}}
    for term in got:
        assert float(got[term].detach()) == pytest.approx(float(want[term].detach()), rel=4 * N * EPS), term
        one, two = gradients(sae, got[term]), gradients(twin, want[term])
        for name, grad in one.items():
            assert torch.isfinite(grad).all(), (term, name)
            if name in own or term not in moves:  # an activation's estimator has tests of its own
                apart = (grad - two[name]).norm()
                assert apart <= 16 * N * EPS * two[name].norm() + EPS, (term, name, apart / two[name].norm())
        moved = {name for name, grad in two.items() if grad.abs().sum() > 16 * N * EPS}
        assert moved & own == moves.get(term, moved & own) and moved, (term, moved)


def test_every_parameter_gets_a_finite_gradient(sae, places):
    sae.losses(places.batch(rows()), SOME_DEAD).total.backward()
    for name, parameter in sae.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_the_dead_term_reaches_encoder_and_decoder_of_dead_latents_only(sae, places):
    losses = sae.losses(places.batch(rows()), SOME_DEAD)
    losses.terms["auxk"].backward()
    alive = torch.ones(F, dtype=torch.bool)
    alive[SOME_DEAD] = False
    for name in ("w_enc", "w_dec"):
        grad = getattr(sae, name).grad
        assert (grad[SOME_DEAD].abs().sum(dim=-1) > 0).any(), name
        assert grad[alive].abs().sum() == 0, name


@pytest.mark.parametrize("latents", ["as they start", "all alive", "all dead"])
def test_awkward_batches_and_latents_give_finite_losses_and_gradients(sae, places, latents):
    with torch.no_grad():
        sae.b_enc += {"as they start": 0.0, "all alive": 1e3, "all dead": -1e3}[latents]
    usual, one = rows(), rows(1)
    batches = {
        "zeros": {hook: torch.zeros_like(x) for hook, x in usual.items()},
        "a zero row": {hook: torch.cat([x[:1] * 0, x[1:]]) for hook, x in usual.items()},
        "constant": {hook: x.expand(N, -1) for hook, x in one.items()},
        "one row": one,
        "huge": {hook: x * 1e4 for hook, x in usual.items()},
    }
    for number, (name, seen) in enumerate(batches.items()):
        batch, dead = places.batch(seen), (NO_DEAD, torch.arange(F))[number % 2]
        sae.zero_grad()
        losses = sae.losses(batch, dead)
        losses.total.backward()
        assert torch.isfinite(losses.total) and torch.isfinite(losses.y_hat).all(), name
        assert all(torch.isfinite(p.grad).all() for p in sae.parameters() if p.grad is not None), name
        codes = sae.encode(batch.x)
        assert torch.isfinite(codes.values).all() and torch.isfinite(sae(batch.x)).all(), name
        assert latents != "all dead" or name == "huge" or codes.l0().sum() == 0, name


def test_initialisation_on_rows_without_variance_is_finite(case, places):
    sae = SAES.build(config(*case), places.widths(DIMS))
    initialised(sae, places, {hook: torch.ones(16, width) for hook, width in DIMS.items()})
    assert all(torch.isfinite(t).all() for t in sae.state_dict().values())


def test_scaled_rows_of_each_hook_are_sqrt_d_from_their_centre_on_average(sae, places):
    x, y = places.batch(rows(256))
    scale_out = sae.output_scale if places.targets else sae.input_scale
    sides = [(y, sae.b_dec.detach(), scale_out, sae.widths.outputs)]
    if places.targets:
        sides.append((x, sae.centre, sae.input_scale, sae.widths.inputs))
    for values, centre, scale, widths in sides:
        for part in (values * per_column(scale, widths) - centre).split(widths, dim=-1):
            assert float(part.norm(dim=-1).mean()) == pytest.approx(part.shape[-1] ** 0.5, rel=256 * 12 * EPS)


@pytest.mark.parametrize("input_scale", ["sqrt_d", "none"])
@pytest.mark.parametrize("b_dec_init", ["geometric_median", "mean", "zeros"])
def test_a_folded_and_saved_sae_gives_what_the_trained_one_gives(
    case, places, tmp_path, input_scale, b_dec_init
):
    sae = SAES.build(config(*case, input_scale=input_scale, b_dec_init=b_dec_init), places.widths(DIMS))
    initialised(sae, places, rows(256))
    with torch.no_grad():
        for name in ("b_enc", "b_mag", "r_mag", "w_skip"):
            if hasattr(sae, name):
                getattr(sae, name).add_(0.2 * torch.randn(getattr(sae, name).shape))
    x, _ = places.batch(rows(seed=5))
    folded, scale = sae.folded(), float(sae.code_scale)
    assert (folded.input_scale == 1).all() and folded.code_scale == 1
    assert bool((sae.input_scale == 1).all()) == (input_scale == "none")
    before, after = sae.encode(x), folded.encode(x)
    assert torch.equal((before.dense() != 0), (after.dense() != 0))
    assert before.l0().sum() > 0
    size = float(sae(x).detach().abs().max())
    torch.testing.assert_close(folded(x), sae(x), rtol=1e-5, atol=256 * EPS * size)
    torch.testing.assert_close(after.dense() * scale, before.dense(), rtol=1e-4, atol=1e-5)
    save_sae(sae, tmp_path, {"hook": "resid_post.3"})
    loaded = load_sae(tmp_path)
    for name, tensor in folded.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert loaded.config == sae.config and loaded.widths == sae.widths
    assert torch.equal(loaded(x), folded(x))
    assert not any(p.requires_grad for p in loaded.parameters())


def test_decoder_rows_stay_unit_and_their_gradient_has_no_parallel_part(sae, places):
    sae.losses(places.batch(rows()), SOME_DEAD).total.backward()
    sae.before_step()
    parallel = (sae.w_dec.grad * sae.w_dec).sum(dim=-1).abs()
    width = sae.d_out
    assert (parallel <= 4 * width * EPS * sae.w_dec.grad.norm(dim=-1).clamp_min(1e-3)).all()
    with torch.no_grad():
        sae.w_dec.mul_(1.7)
    sae.after_step()
    assert (sae.w_dec.norm(dim=-1) - 1).abs().max() < 4 * width * EPS


def mean_l0(codes: Codes) -> float:
    return float(codes.l0().double().mean())


@pytest.mark.parametrize("case", TRAINED, ids="-".join, indirect=True)
def test_training_lowers_the_loss_and_inference_keeps_the_sparsity_of_training(sae, places, record_property):
    steps, errors = 80, []
    optimizer = torch.optim.Adam(sae.parameters())
    for step in range(steps):
        sae.begin_step(step, steps)
        optimizer.param_groups[0]["lr"] = 5e-3 * min(1, 2 * (1 - step / steps))
        optimizer.zero_grad()
        batch = places.batch(rows(128, seed=100 + step))
        losses = sae.losses(batch, NO_DEAD)
        losses.total.backward()
        sae.before_step()
        optimizer.step()
        sae.after_step()
        errors.append(float(fvu(batch.y, losses.y_hat.detach())))
    batch = places.batch(rows(2048, seed=7))
    used = mean_l0(sae.encode(batch.x))
    trained = mean_l0(sae.losses(batch, NO_DEAD).codes)
    record_property("fvu", (errors[0], sum(errors[-20:]) / 20))
    record_property("l0_training", trained)
    record_property("l0_inference", used)
    assert sum(errors[-20:]) / 20 < 0.8 * errors[0]
    assert used == pytest.approx(trained, rel=0.05)


@pytest.mark.parametrize("case", RESUMED, ids="-".join, indirect=True)
def test_a_resumed_member_goes_on_with_the_same_bits(case, places):
    def member() -> Member:
        hook, target = "+".join(places.inputs), "+".join(places.targets) or None
        options = {"sampled": 3} if case[0] == "matryoshka" else {}
        recipe = MemberConfig("main", hook, 0, config(*case, **options), OptimConfig(lr=3e-3), target)
        made = Member(recipe, places.widths(DIMS), 7, 7 * N * 100, 0.5, torch.device("cpu"))
        made.initialise(rows(256))
        return made

    def train(made: Member, first: int, last: int) -> None:
        for step in range(first, last):
            made.begin_step(step)
            made.dead = SOME_DEAD
            batch = made.batch(RowBatch(rows(seed=step), torch.arange(N)))
            AutogradStepper().step(made, batch)

    whole, half, resumed = member(), member(), member()
    train(whole, 0, 7)
    train(half, 0, 4)
    resumed.load_state_dict(copy.deepcopy(half.state_dict()))
    train(resumed, 4, 7)
    for name, tensor in whole.sae.state_dict().items():
        assert torch.equal(resumed.sae.state_dict()[name], tensor), name
    for name, tensor in whole.trained().state_dict().items():
        assert torch.equal(resumed.trained().state_dict()[name], tensor), name


def test_the_loss_is_the_same_for_data_in_other_units(sae, places):
    larger = {hook: x * 1000 for hook, x in rows(256).items()}
    twin = initialised(copy.deepcopy(sae), places, larger)
    mine = sae.losses(places.batch(rows(seed=8)), SOME_DEAD)
    other = twin.losses(places.batch({h: x * 1000 for h, x in rows(seed=8).items()}), SOME_DEAD)
    for term in mine.terms:
        torch.testing.assert_close(mine.terms[term], other.terms[term], rtol=2e-3, atol=1e-5)
