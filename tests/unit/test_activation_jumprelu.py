"""JumpReLU: its estimators against the derivatives that they estimate, its penalties, its loop."""

import copy
import math

import pytest
import torch
from encoder_rows import D, F, N, rows, weights
from torch import Tensor
from torch.nn import functional

from sae_train.activations.jumprelu import GAIN, PENALTIES, JumpReLU, JumpReLUConfig
from sae_train.codes import Codes
from sae_train.errors import InputError

EPS = 2.0**-24


def build(**options) -> JumpReLU:
    return JumpReLU(JumpReLUConfig(**{"target_l0": 4.0} | options), F)


def at_levels(**options) -> JumpReLU:
    """With thresholds from 0.2 to 1.4, at a price of 4."""
    activation = build(**options)
    with torch.no_grad():
        activation.control.coefficient.fill_(4.0)
        activation.threshold.copy_(torch.linspace(0.1, 0.7, F))
    assert torch.equal(activation.level(), 2 * activation.threshold)
    return activation


def codes_of(activation: JumpReLU, pre: Tensor) -> Codes:
    """Codes of given pre-activations; the loop stands still."""
    activation.control._due = False
    return activation.encode_training(pre, torch.eye(F), torch.zeros(F))


def smoothed(integral, pre: Tensor, level: Tensor, bandwidth: float) -> Tensor:
    """[F]: the sum over rows of the mean of cost(h) H(h - level), h spread evenly over pre +- bandwidth / 2.

    Args:
        integral: of cost.
    """
    low, high = pre - bandwidth / 2, pre + bandwidth / 2
    return ((integral(high) - integral(torch.maximum(low, torch.minimum(level, high)))) / bandwidth).sum(
        dim=0
    )


@pytest.mark.parametrize("bandwidth", [0.25, 1.0])
@pytest.mark.parametrize("term", ["reconstruction", "step", "tanh"])
def test_the_gradient_of_a_threshold_is_that_of_the_loss_smoothed_over_the_bandwidth(term, bandwidth):
    activation = at_levels(bandwidth=bandwidth, penalty=term if term in PENALTIES else "step", warmup=0)
    pre = rows(1)[:, :1] + torch.linspace(-0.6, 1.5, F)
    codes, norm = codes_of(activation, pre), torch.linspace(0.5, 2, F)
    if term == "reconstruction":
        codes.values.sum().backward()
    else:
        activation.penalty(codes, norm)["sparsity"].backward()
    steep = 4 * norm.double()
    integral = {
        "reconstruction": lambda h: h.square() / 2,
        "step": lambda h: h,
        "tanh": lambda h: (steep * h).cosh().log() / steep,
    }[term]
    unit = 1.0 if term == "reconstruction" else 4.0 / (F * N)  # the price over D and the rows; D is F here
    delta, level = 1e-7, activation.level().detach().double()
    above, below = (smoothed(integral, pre.double(), level + d, bandwidth) for d in (delta, -delta))
    want = unit * (above - below) / (2 * delta) * 2  # a threshold is half of its level
    assert (want < 0).all()
    assert activation.threshold.grad.tolist() == pytest.approx(want.tolist(), rel=4 * N * EPS)


@pytest.mark.parametrize("side", [-0.4, 0.4])
def test_pre_activations_on_both_sides_of_a_threshold_teach_it(side):
    """What the kernel is centred on is the pre-activation, not the activation, which is 0 below."""
    activation = at_levels(penalty="step", warmup=0)
    pre = activation.level().detach() + side * torch.ones(10, F)
    activation.penalty(codes_of(activation, pre), torch.ones(F))["sparsity"].backward()
    # price / D, for each row, over the rows; kernel of height 1 / bandwidth = 1; threshold is half the level
    assert activation.threshold.grad.tolist() == pytest.approx([-2 * 4 / F] * F)
    activation.threshold.grad = None
    codes_of(activation, pre).values.sum().backward()
    assert activation.threshold.grad.tolist() == pytest.approx((-2 * 10 * activation.level()).tolist())


def test_the_kernel_is_as_wide_as_it_says():
    activation = at_levels(bandwidth=0.5)
    for distance, inside in ((0.24, True), (0.26, False), (-0.24, True), (-0.26, False)):
        activation.threshold.grad = None
        pre = activation.level().detach() + distance * torch.ones(1, F)
        codes_of(activation, pre).values.sum().backward()
        assert bool((activation.threshold.grad != 0).all()) == inside
        assert bool((activation.threshold.grad != 0).any()) == inside


def test_weights_get_the_gradient_of_active_latents_and_none_through_the_step():
    activation = at_levels(penalty="step", warmup=0)
    pre = rows(2)[:, :1].expand(-1, F).clone().requires_grad_()
    codes = codes_of(activation, pre)
    activation.penalty(codes, torch.ones(F))["sparsity"].backward(retain_graph=True)
    assert pre.grad is None or pre.grad.abs().sum() == 0
    codes.values.sum().backward()
    assert torch.equal(pre.grad, (pre > activation.level()).float())


@pytest.mark.parametrize("penalty", PENALTIES)
def test_penalties_have_the_values_of_their_formulas(penalty):
    activation = at_levels(penalty=penalty, warmup=0, coefficient=5.0)
    x, (w, b), norm = rows(3), weights(), torch.linspace(0.5, 2, F)
    activation.control._due = False
    codes = activation.encode_training(x, w, b)
    on, pre = codes.values != 0, functional.linear(x, w, b)
    l0 = on.sum(dim=-1).double().mean()
    want = {
        "step": 4.0 * l0 / D,
        "tanh": 4.0 / D * (torch.tanh(4 * pre * norm) * on).sum(dim=-1).double().mean(),
        "quadratic": 5.0 * (l0 / 4.0 - 1) ** 2,
    }[penalty]
    got = activation.penalty(codes, norm)
    assert float(got["sparsity"].detach()) == pytest.approx(float(want), rel=4 * F * EPS)
    activation.config.warmup = 0.5
    activation.begin_step(10, 40)
    assert float(activation.penalty(codes, norm)["sparsity"].detach()) == pytest.approx(
        float(want) / 2, rel=4 * F * EPS
    )


def test_the_penalty_per_row_depends_neither_on_the_number_of_rows_nor_on_the_width():
    """Rows of norm sqrt(D) and unit encoder rows have the same pre-activations at any D, and errors are
    means over D: so must the price be."""
    activation = at_levels(penalty="step", warmup=0)
    x, (w, b) = rows(4), weights()
    activation.control._due = False
    price = []
    for scale, rows_, w_ in (
        (1, x, w),
        (1, x.repeat(3, 1), w),
        (4, torch.cat([x, x.new_zeros(N, 3 * D)], 1), torch.cat([w, w.new_zeros(F, 3 * D)], 1)),
    ):
        codes = activation.encode_training(rows_, w_, b)
        price.append(scale * float(activation.penalty(codes, torch.ones(F))["sparsity"].detach()))
    assert price == pytest.approx([price[0]] * 3, rel=16 * F * EPS)


@pytest.mark.parametrize("target", [1.0, 4.0, 20.0])
def test_initial_thresholds_are_where_l0_is_on_target(target):
    activation, x, (w, b) = build(target_l0=target), rows(6, 1000), weights()
    activation.initialise(x, w, b)
    l0 = activation.encode(x, w, b).l0().double().mean()
    positive = float((functional.linear(x, w, b) > 0).sum() / 1000)
    assert float(l0) == pytest.approx(min(target, positive), abs=0.01)


def test_a_threshold_that_fell_below_zero_acts_as_zero_and_rises_from_there():
    activation = at_levels(warmup=0)
    with torch.no_grad():
        activation.threshold.fill_(-0.3)
    pre = 0.2 * torch.ones(5, F)
    assert activation.encode(-pre, torch.eye(F), torch.zeros(F)).l0().sum() == 0
    assert torch.equal(activation.encode(pre, torch.eye(F), torch.zeros(F)).dense(), pre)
    twin = copy.deepcopy(activation)
    twin.fold_(torch.tensor(2.0))
    assert (twin.threshold == 0).all()
    codes = codes_of(activation, pre)
    assert torch.equal(codes.values, pre) and (activation.threshold == 0).all()
    activation.penalty(codes, torch.ones(F))["sparsity"].backward()
    assert (activation.threshold.grad < 0).all(), "descent raises it"


def test_the_loop_moves_price_and_thresholds_towards_the_target_once_a_step():
    x, (w, b) = rows(7), weights()
    for target, sign in ((1.0, 1), (20.0, -1)):
        activation = at_levels(target_l0=target)
        before, level = float(activation.control.coefficient), activation.level()
        l0 = float((functional.linear(x, w, b) > level).sum() / N)
        activation.begin_step(0, 10)
        activation.encode_training(x, w, b)
        moved = float(activation.control.coefficient)
        error = min(1.0, max(-1.0, math.log(l0 / target)))
        assert error * sign > 0
        assert moved == pytest.approx(before * (1 + GAIN * error), rel=1e-5)
        torch.testing.assert_close(activation.level() / level, torch.full((F,), (moved / before) ** 0.5))
        activation.encode_training(x, w, b)  # another micro-batch of the step
        assert float(activation.control.coefficient) == moved
        activation.begin_step(1, 10)
        activation.encode_training(x, w, b)
        assert float(activation.control.coefficient) != moved


def test_the_loop_moves_less_in_the_last_steps_of_a_run():
    x, (w, b) = rows(7), weights()
    moved = {}
    for step in (0, 90, 95, 99):
        activation = at_levels(target_l0=1.0)
        activation.begin_step(step, 100)
        activation.encode_training(x, w, b)
        moved[step] = float(activation.control.coefficient) - 4.0
    assert moved[0] > 0
    assert [moved[step] / moved[0] for step in (90, 95, 99)] == pytest.approx([1, 0.5, 0.1], rel=1e-4)


def test_a_price_that_fell_to_nothing_comes_back_as_soon_as_l0_is_above_the_target():
    x, (w, b) = rows(7), weights()
    activation = build(target_l0=4.0)
    activation.control.begin(0.05, 0.4)
    for step in range(30):  # L0 is 0, whatever the price
        activation.begin_step(step, 100)
        activation.encode_training(x, w, b - 1e6)
    assert float(activation.control.coefficient) == 0
    l0 = float((functional.linear(x, w, b) > 0).sum() / N)
    assert l0 > 8
    for step in range(3):
        activation.begin_step(step, 100)
        activation.encode_training(x, w, b)
    assert float(activation.control.coefficient) > 2 * GAIN * math.log(2) * 0.1


def test_the_loop_starts_even_where_fewer_latents_are_positive_than_wanted():
    activation, x, (w, b) = build(target_l0=20.0), rows(7), weights()
    activation.initialise(x, w, b - 1)
    assert float(activation.control.coefficient) == 0
    activation.begin_step(0, 10)
    activation.encode_training(x, w, b + 3)
    assert float(activation.control.coefficient) > 0


def coefficient_after(activation: JumpReLU, step: int) -> float:
    activation.begin_step(step, 10)
    activation.encode_training(rows(step), *weights())
    return float(activation.control.coefficient)


def test_a_price_that_was_given_stays():
    activation = at_levels(target_l0=None)
    assert [coefficient_after(activation, step) for step in range(10)] == [4.0] * 10


def test_thresholds_under_a_quadratic_penalty_are_scaled_only_while_the_learning_rate_falls():
    activation = at_levels(penalty="quadratic", target_l0=1.0)
    found = [coefficient_after(activation, step) for step in range(10)]
    assert found[:8] == [4.0] * 8
    assert 4.0 < found[8] < found[9]


def test_a_published_threshold_is_in_units_of_raw_pre_activations():
    activation, x, (w, b) = at_levels(), rows(8), weights()
    level, before = activation.level().detach().clone(), activation.encode(x, w, b)
    activation.fold_(torch.tensor(0.25))
    assert float(activation.control.coefficient) == 1.0
    assert torch.equal(activation.threshold, level / 0.25)
    pre = functional.linear(x, w, b) / 0.25
    want = torch.where(pre > activation.threshold, pre, 0)
    torch.testing.assert_close(activation.encode(x / 0.25, w, b / 0.25).dense(), want)
    assert torch.equal(want != 0, before.dense() != 0)


def test_inference_is_sparse_and_training_keeps_the_pre_activations():
    wide = JumpReLU(JumpReLUConfig(target_l0=4.0), 16 * F)
    draw = torch.Generator().manual_seed(5)
    w = functional.normalize(torch.randn(16 * F, D, generator=draw), dim=-1)
    x, b = rows(9), torch.zeros(16 * F)
    wide.initialise(x, w, b)
    codes = wide.encode(x, w, b)
    assert codes.indices is not None and codes.values.shape[1] < 4 * F
    twin = copy.deepcopy(wide)
    twin.control._due = False
    training = twin.encode_training(x, w, b)
    assert training.indices is None and training.pre is not None
    assert torch.equal(training.dense() != 0, codes.dense() != 0)


@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("penalty", {"penalty": "l1"}),
        ("bandwidth", {"bandwidth": 0.0}),
        ("bandwidth", {"bandwidth": float("inf")}),
        ("target_l0", {"target_l0": 0.0}),
        ("target_l0", {"target_l0": F + 1.0}),
        ("target_l0", {"target_l0": None, "penalty": "quadratic"}),
        ("coefficient", {"coefficient": 0.0}),
        ("warmup", {"warmup": 1.5}),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(key, options):
    with pytest.raises(InputError) as error:
        build(**options)
    assert error.value.field == f"sae.activation.{key}" and "\n" not in str(error.value)
