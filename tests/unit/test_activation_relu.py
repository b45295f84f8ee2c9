"""ReLU: its penalty in values and gradients, p-annealing, warm-up, where biases start."""

import math

import pytest
import torch
from encoder_rows import D, F, N, rows, weights
from torch import Tensor
from torch.nn import functional

from sae_train.activations.relu import INTEGRAL, P_FALLS, PROPORTIONAL, SMOOTH, ReLU, ReLUConfig
from sae_train.errors import InputError

EPS = 2.0**-24
COEFFICIENT = 2.0


def build(**options) -> ReLU:
    return ReLU(ReLUConfig(**{"target_l0": None, "coefficient": COEFFICIENT, "warmup": 0.0} | options), F)


def penalty(activation: ReLU, x: Tensor, w: Tensor, b: Tensor, norm: Tensor) -> Tensor:
    return activation.penalty(activation.encode_training(x, w, b), norm)["sparsity"]


def test_the_penalty_is_the_l1_of_codes_times_decoder_norms_over_width_and_rows():
    x, (w, b), norm = rows(), weights(), torch.linspace(0.5, 2, F)
    leaf = norm.clone().requires_grad_()
    got = penalty(build(), x, w, b, leaf)
    z = torch.relu(functional.linear(x, w, b)).double()
    assert float(got.detach()) == pytest.approx(
        float(COEFFICIENT * (z * norm).sum() / (D * N)), rel=4 * F * EPS
    )
    got.backward()
    assert leaf.grad.tolist() == pytest.approx((COEFFICIENT * z.sum(0) / (D * N)).tolist(), rel=4 * N * EPS)


def test_the_penalty_per_row_depends_neither_on_the_number_of_rows_nor_on_the_width():
    """Rows of norm sqrt(D) and unit encoder rows have the same pre-activations at any D, and errors are
    means over D: so must be what a unit of activation costs."""
    x, (w, b) = rows(4), weights()
    wide = torch.cat([x, x.new_zeros(N, 3 * D)], 1), torch.cat([w, w.new_zeros(F, 3 * D)], 1)
    costs = [
        float(penalty(build(), *args, b, torch.ones(F))) * len(args[0][0]) / D
        for args in ((x, w), (x.repeat(3, 1), w), wide)
    ]
    assert costs == pytest.approx([costs[0]] * 3, rel=16 * F * EPS)


@pytest.mark.parametrize("p_end", [0.2, 0.5])
def test_p_falls_over_the_run_and_moves_weight_from_strong_latents_to_weak_ones(p_end):
    activation, x, (w, b) = build(p_end=p_end), rows(), weights()
    for share, p in ((0.0, 1.0), (P_FALLS / 2, (1 + p_end) / 2), (P_FALLS, p_end), (0.99, p_end)):
        activation.begin_step(round(1000 * share), 1000)
        assert activation.p == pytest.approx(p)
        leaf = b.clone().requires_grad_()
        codes = activation.encode_training(x, w, leaf)
        codes.values.retain_grad()
        term = activation.penalty(codes, torch.ones(F))["sparsity"]
        term.backward()
        z = codes.values.detach().double()
        # The value stays that of L1; only its distribution over latents changes.
        assert float(term.detach()) == pytest.approx(float(COEFFICIENT * z.sum() / (D * N)), rel=4 * F * EPS)
        slope = p * (z + SMOOTH) ** (p - 1)
        powers = ((z + SMOOTH) ** p - SMOOTH**p).sum()
        want = COEFFICIENT / (D * N) * slope * z.sum() / powers
        assert torch.isfinite(codes.values.grad).all()
        torch.testing.assert_close(codes.values.grad.double(), want, rtol=N * F * EPS, atol=0)


def test_codes_of_nothing_have_a_penalty_of_zero_with_a_finite_gradient_at_any_p():
    for p_end in (1.0, 0.1):
        activation = build(p_end=p_end)
        activation.begin_step(9, 10)
        b = torch.full((F,), -1e3).requires_grad_()
        term = penalty(activation, rows(), weights()[0], b, torch.ones(F))
        term.backward()
        assert float(term.detach()) == 0 and torch.isfinite(b.grad).all()


def test_the_penalty_rises_from_nothing_during_warm_up():
    activation, (w, b) = build(warmup=0.5), weights()
    shares = []
    for step in range(11):
        activation.begin_step(step, 10)
        shares.append(float(penalty(activation, rows(), w, b, torch.ones(F))))
    assert shares[0] == 0
    assert [share / shares[-1] for share in shares] == pytest.approx(
        [0, 0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1, 1, 1]
    )


@pytest.mark.parametrize("target", [1.0, 5.0])
def test_biases_start_where_l0_is_on_target(target):
    activation, x, (w, b) = build(target_l0=target), rows(6, 1000), weights()
    before = b.clone()
    activation.initialise(x, w, b)
    assert float(activation.encode(x, w, b).l0().double().mean()) == pytest.approx(target, abs=0.01)
    assert torch.allclose(b - before, (b - before)[0]), "all by the same amount"
    free = before.clone()
    build().initialise(x, w, free)
    assert torch.equal(free, before)


def test_the_loop_answers_at_once_and_remembers_more_slowly_once_a_step():
    x, (w, b) = rows(7), weights()
    l0 = float((functional.linear(x, w, b) > 0).sum() / N)
    activation = build(target_l0=l0 / 1.5)
    plain = float(penalty(build(), x, w, b, torch.ones(F)))
    activation.begin_step(0, 10)
    terms = [float(penalty(activation, x, w, b, torch.ones(F))) for _ in range(3)]  # micro-batches of a step
    once = 1 + INTEGRAL * math.log(1.5)
    assert terms == pytest.approx([plain * once * 1.5**PROPORTIONAL] * 3, rel=1e-4)
    activation.begin_step(1, 10)
    activation.encode_training(x, w, b)
    assert float(activation.control.coefficient) == pytest.approx(COEFFICIENT * once**2, rel=1e-5)
    fixed = build()
    fixed.encode_training(x, w, b)
    assert float(fixed.control.coefficient) == COEFFICIENT


def test_the_loop_starts_even_where_fewer_latents_are_positive_than_wanted():
    activation, x, (w, b) = build(target_l0=20.0), rows(7), weights()
    activation.initialise(x, w, b - 1)
    assert float(activation.control.coefficient) == 0
    activation.begin_step(0, 10)
    activation.encode_training(x, w, b + 3)
    assert float(activation.control.coefficient) > 0


@pytest.mark.parametrize("p_end", [0.0, 1.5, float("nan")])
def test_a_p_that_is_no_share_is_refused(p_end):
    with pytest.raises(InputError, match=r"sae\.activation\.p_end"):
        build(p_end=p_end)
