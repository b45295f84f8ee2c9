"""The loss-spike guard by itself and in both kinds of step."""

import copy

import pytest
import torch

from sae_train.activations.topk import TopKConfig
from sae_train.batch import Batch
from sae_train.sae.linear import LinearConfig
from sae_train.train.fused import FusedStepper
from sae_train.train.members import Member, MemberConfig
from sae_train.train.optim import OptimConfig
from sae_train.train.spikes import MOST_IN_A_ROW, SpikeGuard
from sae_train.train.stepper import AutogradStepper

CPU = torch.device("cpu")


def judged(losses: list[float], sds: float = 6.0, window: int = 16) -> list[int]:
    guard = SpikeGuard(sds, window, CPU)
    return [i for i, loss in enumerate(losses) if bool(guard.judge(torch.tensor(loss)))]


def steady(count: int, level: float = 1.0) -> list[float]:
    noise = torch.randn(count, generator=torch.Generator().manual_seed(0))
    return (level + 0.01 * noise).tolist()


def test_a_leap_is_a_spike_and_does_not_hide_the_next_one():
    losses = steady(60)
    losses[20], losses[25] = 1e6, 2.0
    assert judged(losses) == [20, 25]


def test_nothing_is_a_spike_before_the_window_is_full_or_when_the_guard_is_off():
    losses = steady(60)
    losses[15] = 5.0
    assert judged(losses) == []
    losses[40] = 1e9
    assert judged(losses, sds=0.0) == []


def test_a_loss_that_stays_up_costs_three_steps_and_no_more():
    assert judged(steady(30) + steady(60, level=2.0)) == list(range(30, 30 + MOST_IN_A_ROW))


def test_spikes_in_a_row_are_counted_anew_after_a_loss_that_is_none():
    losses = steady(60)
    high = [20, 21, 23, 24, 40, 41, 42, 43]
    for place in high:
        losses[place] = 5.0
    guard = SpikeGuard(6.0, 16, CPU)
    assert [i for i, loss in enumerate(losses) if bool(guard.judge(torch.tensor(loss)))] == high[:-1]
    assert int(guard.spikes) == len(high) - 1


def test_a_loss_that_falls_or_is_not_finite_is_no_spike_and_is_not_remembered():
    guard = SpikeGuard(6.0, 4, CPU)
    for loss in (4.0, 3.0, 2.0, 1.0, float("nan"), float("inf"), 0.5):
        assert not bool(guard.judge(torch.tensor(loss)))
    assert int(guard.seen) == 5
    assert bool(torch.isfinite(guard.losses).all())


def test_a_guard_continues_from_its_state():
    losses = [*steady(20), 9.0, *steady(10), 9.0]
    whole, first = SpikeGuard(6.0, 16, CPU), SpikeGuard(6.0, 16, CPU)
    for loss in losses:
        whole.judge(torch.tensor(loss))
    for loss in losses[:21]:
        first.judge(torch.tensor(loss))
    second = SpikeGuard(6.0, 16, CPU)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for loss in losses[21:]:
        second.judge(torch.tensor(loss))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    assert int(whole.spikes) == 2


@pytest.mark.parametrize("stepper", [AutogradStepper(), AutogradStepper(accumulate=2), FusedStepper()])
def test_a_batch_with_a_leaping_loss_leaves_weights_and_moments_alone(stepper):
    sae = LinearConfig(name="linear", d_sae=16, activation=TopKConfig(name="topk", k=4))
    config = MemberConfig("m", "h", 0, sae, OptimConfig())
    member = Member(config, 8, 100, 100_000, 0.0, CPU, spike_sds=6.0, spike_window=8)
    rows = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    member.initialise({"h": rows})

    def step(x: torch.Tensor) -> torch.Tensor:
        return stepper.step(member, Batch(x, x)).grad_norm

    for _ in range(10):
        assert bool(torch.isfinite(step(rows)))
    before = copy.deepcopy({"sae": member.sae.state_dict(), "optimizer": member.optimizer.state_dict()})
    taught = member.schedule.last_epoch
    assert bool(torch.isnan(step(1e3 * rows)))
    assert int(member.spikes.spikes) == int(member.skipped) == 1
    assert member.schedule.last_epoch == taught + 1
    for name, value in member.sae.state_dict().items():
        assert torch.equal(value, before["sae"][name]), name
    for index, state in member.optimizer.state_dict()["state"].items():
        for name, value in state.items():
            assert torch.equal(value, before["optimizer"]["state"][index][name]), (index, name)
    assert bool(torch.isfinite(step(rows)))
    assert int(member.skipped) == 1
