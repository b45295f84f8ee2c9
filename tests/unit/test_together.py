"""SAEs of one shape that step together end with the bits of those that step one after the other."""

import copy
import logging
from collections.abc import Callable

import pytest
import torch
from same_bits import assert_same_bits, tensors
from torch import Tensor

from sae_train.batch import RowBatch
from sae_train.cli.compose import compose
from sae_train.config import to_config
from sae_train.errors import InputError
from sae_train.member_set import members
from sae_train.places import Widths
from sae_train.train.fused import FusedStepper, alike
from sae_train.train.kernels import (
    MOST_TOGETHER,
    SMALL_FLOP,
    KernelsConfig,
    MixedStepper,
    choose_stepper,
    most_together,
)
from sae_train.train.members import Member
from sae_train.train.stacked import Stacks
from sae_train.train.stepper import AutogradStepper, Step, Stepper

D, F, N, STEPS = 12, 64, 48, 24
CPU = torch.device("cpu")
GRID = "grid={k: [2, 4], lr: [1e-3, 3e-3]}"
KINDS = {
    "autoencoder": ["hook=h"],
    "two hooks": ["hook=[h, t]"],
    "transcoder": ["hook=h", "target=t", "sae.kind=transcoder"],
    "transcoders of two hooks": ["hook=[h, t]", "target=t", "sae.kind=transcoder"],
    "crosscoder": ["hook=f+g", "sae.kind=crosscoder"],
    "lagged": ["hook=h", "optim.clip=0.3", "optim.clip_norm=lagged"],
    "unclipped": ["hook=h", "optim.clip=null"],
    "bfloat16 moments": ["hook=h", "optim.moments=bfloat16"],
    "active rows": ["hook=h", "optim.rows=active", "optim.beta1=0", "optim.eps=1e-6"],
}

pytestmark = pytest.mark.usefixtures("one_thread")


def of_hooks(seed: int) -> RowBatch:
    """Rows of sparse structure with an offset as hook h; parts of them as f and g; a layer of them as t."""
    directions = torch.randn(40, D, generator=torch.Generator().manual_seed(99))
    draw = torch.Generator().manual_seed(seed)
    strengths = torch.rand(N, 40, generator=draw) * (torch.rand(N, 40, generator=draw) < 0.1)
    x = 3 * (strengths @ directions) + 3 + 0.05 * torch.randn(N, D, generator=draw)
    layer = torch.randn(D, D, generator=torch.Generator().manual_seed(98))
    hooks = {"h": x, "f": x[:, :7], "g": 30 * x[:, 7:], "t": 5 * torch.relu(x @ layer) - 2}
    return RowBatch(hooks, torch.arange(N))


def make(*keys: str, grid: str = GRID, ema: float = 0.0) -> list[Member]:
    """Members of a grid, initialised; every seventh latent of each is too low to fire, so that AuxK works."""
    common = ["source=synthetic", f"sae.d_sae={F}", f"sae.dead_after_tokens={4 * N}", grid]
    composed = compose("train", [*common, *keys])
    rows = of_hooks(0).rows
    built = []
    for config in members(to_config(composed), composed):
        widths: Widths = config.places.widths({name: x.shape[1] for name, x in rows.items()})
        member = Member(config, widths, STEPS, STEPS * N * 100, ema, CPU, 6.0, 8)
        member.initialise(rows)
        with torch.no_grad():
            member.sae.b_enc[::7] = -3 * member.sae.w_enc.norm(dim=-1).mean()
        if member.average is not None:
            member.start_average()
        built.append(member)
    return built


def train(
    built: list[Member], stepper: Stepper, first: int, last: int, rows: Callable[[int], RowBatch] = of_hooks
) -> list[dict[str, Step]]:
    done = []
    for number in range(first, last):
        batch, steps = rows(1 + number), {}
        for unit in stepper.units(built):
            for member in unit:
                member.begin_step(number)
            taken = [stepper.take(member, batch) for member in unit]
            steps |= dict(zip([m.name for m in unit], stepper.step_together(unit, taken), strict=True))
        done.append(steps)
    return done


def state(built: list[Member]) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in tensors({m.name: m.state_dict() for m in built}).items()}


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_members_that_step_together_get_the_bits_they_get_alone(kind, autocast):
    alone, united = make(*KINDS[kind], ema=0.9), make(*KINDS[kind], ema=0.9)
    stepper = FusedStepper(autocast, at_once=16)
    assert max(len(unit) for unit in stepper.units(united)) >= 4
    want = train(alone, FusedStepper(autocast), 0, STEPS)
    got = train(united, stepper, 0, STEPS)
    assert_same_bits(state(united), state(alone))
    assert all(len(member.dead) > 0 for member in united)
    for steps, others in zip(got, want, strict=True):
        for name, other in others.items():
            assert steps[name].losses.codes.values.shape == other.losses.codes.values.shape
            assert torch.equal(steps[name].losses.codes.values, other.losses.codes.values)
            assert torch.equal(steps[name].losses.codes.indices, other.losses.codes.indices)
            assert torch.equal(steps[name].losses.y_hat, other.losses.y_hat)
            assert torch.equal(steps[name].grad_norm, other.grad_norm)
            assert steps[name].losses.terms.keys() == other.losses.terms.keys()
            for term, value in other.losses.terms.items():
                assert float(steps[name].losses.terms[term]) == pytest.approx(float(value), rel=N * 2.0**-24)


def test_a_member_whose_rows_are_not_finite_is_skipped_alone():
    """Two hooks, of which one has a NaN at step 5; then a leap of its rows, which is a spike, at step 17."""

    def rows(number: int) -> RowBatch:
        batch = of_hooks(number)
        if number == 6:
            batch.rows["t"][3, 2] = torch.nan
        if number == 18:
            batch.rows["t"].mul_(100)
        return batch

    alone, united = make(*KINDS["two hooks"]), make(*KINDS["two hooks"])
    train(alone, FusedStepper(), 0, STEPS, rows)
    done = train(united, FusedStepper(at_once=16), 0, STEPS, rows)
    assert_same_bits(state(united), state(alone))
    for member in united:
        assert done[17][member.name].losses.y_hat.isfinite().all()  # a spike is skipped, and shown as it is
        on_t = member.places.inputs == ("t",)
        assert int(member.skipped) == (2 if on_t else 0) and int(member.spikes.spikes) == int(on_t)
        assert int(member.optimizer.state[member.sae.w_enc]["step"]) == (STEPS - 2 if on_t else STEPS)


def test_a_state_goes_on_together_or_apart():
    whole = make("hook=h")
    train(whole, FusedStepper(at_once=16), 0, 12)
    saved = copy.deepcopy({member.name: member.state_dict() for member in whole})
    legs = {at_once: make("hook=h") for at_once in (1, 3, 16)}
    for at_once, built in legs.items():
        for member in built:
            member.load_state_dict(copy.deepcopy(saved[member.name]))
        train(built, FusedStepper(at_once=at_once), 12, STEPS)
    # The same stepper, whose members have had other tensors put in the places of those in its stacks.
    stepper, other = FusedStepper(torch.bfloat16, at_once=16), make("hook=h")
    train(other, stepper, 0, 5)
    for member in other:
        member.load_state_dict(copy.deepcopy(saved[member.name]))
    train(other, stepper, 12, STEPS)
    reference = make("hook=h")
    for member in reference:
        member.load_state_dict(copy.deepcopy(saved[member.name]))
    train(reference, FusedStepper(torch.bfloat16), 12, STEPS)
    assert_same_bits(state(other), state(reference))
    train(whole, FusedStepper(at_once=16), 12, STEPS)
    for built in legs.values():
        assert_same_bits(state(built), state(whole))


def test_tensors_stay_where_their_owners_look_for_them():
    built = make("hook=h")
    parameters = [dict(member.sae.named_parameters()) for member in built]
    train(built, FusedStepper(at_once=16), 0, 2)
    for member, before in zip(built, parameters, strict=True):
        assert all(before[name] is p for name, p in member.sae.named_parameters())
    one, two = built[0].sae.w_enc, built[1].sae.w_enc
    assert two.data_ptr() - one.data_ptr() == one.numel() * 4
    before = two.detach().clone()
    one.detach().zero_()
    assert torch.equal(two, before)


def test_members_step_together_where_only_k_rate_and_seed_differ():
    def units(*keys: str, grid: str = GRID, at_once: int = 16) -> list[list[str]]:
        built = make(*keys, grid=grid)
        return [[m.name for m in unit] for unit in FusedStepper(at_once=at_once).units(built)]

    (everyone,) = units("hook=h")
    assert len(everyone) == 4
    assert list(map(len, units("hook=h", at_once=3))) == [3, 1]
    assert list(map(len, units("hook=h", at_once=1))) == [1] * 4
    for key, values in {
        "d_sae": "[64, 32]",
        "optim.beta2": "[0.99, 0.999]",
        "optim.clip": "[1.0, 2.0]",
        "optim.moments": "[float32, bfloat16]",
        "optim.eps": "[1e-8, 1e-6]",
        "optim.clip_norm": "[exact, lagged]",
        "optim.rows": "[all, active]",
    }.items():
        alike_in = ["optim.beta1=0"] if key == "optim.rows" else []
        found = units("hook=h", *alike_in, grid=f"grid={{k: [2, 4], {key}: {values}}}")
        assert sorted(map(len, found)) == [2, 2], key
        assert all(unit[0].partition("-")[2] == unit[1].partition("-")[2] for unit in found), key


def test_in_a_run_of_several_kinds_those_of_one_shape_step_together():
    built = make("hook=h", grid="grid={activation: [topk, jumprelu], lr: [1e-3, 2e-3]}")
    stepper = choose_stepper(KernelsConfig(together="always"), built, 1, None)
    assert isinstance(stepper, MixedStepper)
    units = [[m.name for m in unit] for unit in stepper.units(built)]
    assert [len(unit) for unit in units] == [2, 1, 1] and all("topk" in name for name in units[0])
    done = train(built, stepper, 0, 3)
    assert all(set(steps) == {m.name for m in built} for steps in done)


def test_launches_are_shared_where_a_gpu_would_wait_for_them(caplog):
    auto, small = KernelsConfig(), int(SMALL_FLOP)
    assert most_together(auto, True, small) == MOST_TOGETHER
    assert most_together(auto, True, small + 1) == most_together(auto, False, 1) == 1
    assert most_together(KernelsConfig(together="never"), True, 1) == 1
    assert most_together(KernelsConfig(together="always"), False, 10 * small) == MOST_TOGETHER
    with pytest.raises(InputError, match=r"kernels\.together='sometimes': expected auto, always or never"):
        KernelsConfig(together="sometimes")
    built = make("hook=h")
    with caplog.at_level(logging.INFO, "sae_train.train"):
        stepper = choose_stepper(auto, built, 1, None, rows=N)
        assert len(stepper.units(built)) == 4 and "share" not in caplog.text  # on a CPU nothing is gained
        stepper = choose_stepper(KernelsConfig(together="always"), built, 1, None, rows=N)
    assert len(stepper.units(built)) == 1 and "4 SAEs share launches" in caplog.text
    assert [len(unit) for unit in AutogradStepper().units(built)] == [1] * 4


def test_alike_says_what_a_step_depends_on():
    one, two = make("hook=h", grid="grid={k: [2, 4]}")
    assert alike(one) == alike(two)
    one_of = "grid={k: [2]}"
    (other,) = make("hook=h", "target=t", "sae.kind=transcoder", grid=one_of)
    (third,) = make("hook=f+g", "sae.kind=crosscoder", grid=one_of)
    assert len({alike(member) for member in (one, other, third)}) == 3


def test_a_stack_is_made_once_and_again_when_an_owner_has_another_tensor():
    own = [torch.arange(3.0) + m for m in range(4)]
    stacks, puts = Stacks(), []

    def put(number: int, view: Tensor) -> None:
        puts.append(number)
        own[number] = view

    first = stacks.of("x", own, put)
    assert puts == [0, 1, 2, 3] and torch.equal(first, torch.arange(3.0) + torch.arange(4.0)[:, None])
    assert stacks.of("x", own, put) is first and len(puts) == 4
    first[2] += 10
    assert torch.equal(own[2], torch.tensor([12.0, 13.0, 14.0]))
    own[1] = torch.full((3,), 7.0)
    again = stacks.of("x", own, put)
    assert again is not first and len(puts) == 8 and torch.equal(again[1], torch.full((3,), 7.0))
    alone = torch.zeros(2, 2)
    assert stacks.of("y", [alone], put).data_ptr() == alone.data_ptr() and len(puts) == 8
