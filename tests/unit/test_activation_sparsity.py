"""What a user says about sparsity is what a trained SAE has, on rows that it has not seen.

Short runs of the real trainer's step on rows of a known dictionary. L0 is a mean over 4096 held-out rows with
a spread of about that mean, so that it is known to 2 %. The promise is 5 %.
"""

from functools import cache

import pytest
import torch
from torch import Tensor

from sae_train.activations.base import ActivationConfig
from sae_train.activations.batch_topk import BatchTopKConfig
from sae_train.activations.jumprelu import JumpReLUConfig
from sae_train.activations.relu import ReLUConfig
from sae_train.batch import Batch
from sae_train.codes import Codes
from sae_train.sae.linear import LinearConfig
from sae_train.shards.synthetic import SyntheticConfig, SyntheticRows
from sae_train.train.members import Member, MemberConfig
from sae_train.train.optim import OptimConfig
from sae_train.train.stepper import AutogradStepper

pytestmark = pytest.mark.usefixtures("one_thread")

D, F, N, STEPS = 48, 192, 192, 300
RECIPES = {
    "relu": lambda l0: ReLUConfig(target_l0=l0),
    "jumprelu step": lambda l0: JumpReLUConfig(target_l0=l0),
    "relu, p to 0.3": lambda l0: ReLUConfig(target_l0=l0, p_end=0.3),
    "jumprelu tanh": lambda l0: JumpReLUConfig(target_l0=l0, penalty="tanh"),
    "jumprelu quadratic": lambda l0: JumpReLUConfig(target_l0=l0, penalty="quadratic"),
}


@cache
def rows(split: str, count: int) -> Tensor:
    config = SyntheticConfig(d=D, features=96, groups=12, group_size=8, l0=3, rows=count)
    return SyntheticRows(config, count, lanes=1, holdout=1.0, split=split).make(0, count)[0]


def train(activation: ActivationConfig, accumulate: int = 1) -> tuple[Member, list[float]]:
    """The member after a run, and the mean L0 of each step."""
    x, l0 = rows("train", N * STEPS), []
    sae = LinearConfig(d_sae=F, activation=activation)
    member = Member(
        MemberConfig("main", "h", 0, sae, OptimConfig()), D, STEPS, N * STEPS, 0.0, torch.device("cpu")
    )
    member.initialise({"h": x[:4096]})
    stepper = AutogradStepper(accumulate)
    for step, batch in enumerate(x.split(N)):
        member.begin_step(step)
        l0.append(mean_l0(stepper.step(member, Batch(batch, batch)).losses.codes))
    return member, l0


def mean_l0(codes: Codes) -> float:
    return float(codes.l0().double().mean())


def heldout_l0(member: Member) -> float:
    return mean_l0(member.sae.encode(rows("heldout", 4096)))


# By default each recipe at an end of the range, the two plain ones at both, where the loop that steers L0 has
# furthest to go; what it does in between is slow.
CASES = [(recipe, target) for recipe in ("relu", "jumprelu step") for target in (4.0, 64.0)]
CASES += [("relu, p to 0.3", 24.0), ("jumprelu tanh", 4.0), ("jumprelu quadratic", 24.0)]
SLOW = [(recipe, target) for recipe in ("relu", "jumprelu step") for target in (16.0, 32.0)]
SLOW += [("relu, p to 0.3", 4.0), ("jumprelu tanh", 24.0), ("jumprelu quadratic", 4.0)]
CASES += [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW]


@pytest.mark.parametrize(("recipe", "target"), CASES)
def test_target_l0_is_the_l0_of_rows_that_were_held_out(recipe, target):
    member, _ = train(RECIPES[recipe](target))
    assert heldout_l0(member) == pytest.approx(target, rel=0.05)


@pytest.mark.parametrize("recipe", [pytest.param("relu", marks=pytest.mark.slow), "jumprelu step"])
def test_target_l0_holds_when_steps_are_cut_into_micro_batches(recipe):
    member, _ = train(RECIPES[recipe](8.0), accumulate=4)
    assert heldout_l0(member) == pytest.approx(8.0, rel=0.05)


@pytest.mark.parametrize("k", [2, pytest.param(8, marks=pytest.mark.slow), 32])
def test_the_threshold_of_batch_topk_keeps_the_l0_of_training(k):
    member, l0 = train(BatchTopKConfig(k=k, k_start=2 * k))
    assert l0[0] == 2 * k and l0[-1] == k
    assert heldout_l0(member) == pytest.approx(k, rel=0.05)
