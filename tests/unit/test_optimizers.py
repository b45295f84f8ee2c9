"""Every optimizer trains, skips, resumes and is refused alike; what each adds is held to its own library."""

import copy
import functools
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from same_bits import assert_same_bits, tensors
from torch import Tensor, nn

from sae_train.activations.topk import TopKConfig
from sae_train.batch import Batch
from sae_train.checkpoint import Checkpointer
from sae_train.cli.compose import compose, options
from sae_train.config import to_config
from sae_train.errors import InputError
from sae_train.losses import fvu
from sae_train.member_set import members
from sae_train.sae.linear import LinearConfig, LinearSAE
from sae_train.train.fused import cannot_fuse
from sae_train.train.kernels import KernelsConfig, choose_stepper
from sae_train.train.members import Member, MemberConfig
from sae_train.train.optim import IMPORTS, OPTIMIZERS, OptimConfig, build_optimizer, published_weights
from sae_train.train.optimizers.schedule_free import ScheduleFree
from sae_train.train.stepper import AutogradStepper, Step

pytestmark = pytest.mark.usefixtures("optional_libraries", "one_thread")

D, F, N, K, STEPS = 16, 256, 96, 4, 60  # F * D = 4096 is the least that torchao quantises
EPS = 2.0**-24
GIVEN = ["source=synthetic"]
each_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
others = pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "adam"])


@functools.cache
def shipped(name: str) -> OptimConfig:
    config: OptimConfig = to_config(compose("train", [*GIVEN, f"optim={name}"])).optim
    return config


def recipe(name: str, **changed: Any) -> OptimConfig:
    """What conf/optim/NAME.yaml says, with changes."""
    return replace(shipped(name), **changed)


def rows(seed: int, n: int = N) -> Tensor:
    directions = torch.randn(40, D, generator=torch.Generator().manual_seed(99))
    draw = torch.Generator().manual_seed(seed)
    strengths = torch.rand(n, 40, generator=draw) * (torch.rand(n, 40, generator=draw) < 0.1)
    return 3 * (strengths @ directions) + 3 + 0.05 * torch.randn(n, D, generator=draw)


def make_member(config: OptimConfig, ema: float = 0.0, seed: int = 0) -> Member:
    sae = LinearConfig(d_sae=F, activation=TopKConfig(k=K), dead_after_tokens=4 * N)
    member = Member(
        MemberConfig("main", "h", seed, sae, config), D, STEPS, STEPS * N, ema, torch.device("cpu")
    )
    member.initialise({"h": rows(0, 512)})
    return member


def train(member: Member, first: int, last: int) -> list[Step]:
    done = []
    for step in range(first, last):
        member.begin_step(step)
        x = rows(1 + step)
        done.append(AutogradStepper().step(member, Batch(x, x)))
    return done


def heldout_fvu(member: Member) -> float:
    x = rows(10_000, 2000)
    with torch.no_grad():
        return float(fvu(x, member.trained()(x)))


def worst_norm(rows: Tensor) -> float:
    """How far from 1 the longest or shortest row is."""
    return float((rows.detach().norm(dim=-1) - 1).abs().max())


# -- all of them ------------------------------------------------------------------------------------


def test_every_optimizer_has_a_file_and_every_file_an_optimizer():
    assert sorted(options("optim")) == sorted(OPTIMIZERS)
    for name in OPTIMIZERS:
        config = recipe(name)
        assert config.name == name
        assert config.decay == (0 if name == "schedule_free" else 0.8)
        assert config.peak_lr(2**14, 2**11) == config.lr_base == (2e-3 if name == "schedule_free" else 1e-3)
        assert config.peak_lr(2**16, 2**11) == config.lr_base / 2
        longer = config.peak_lr(2**14, 2**14)
        assert longer == pytest.approx(config.lr_base / (1 if name == "schedule_free" else 2))


@each_optimizer
def test_an_sae_learns_and_is_published_with_unit_rows(name):
    member = make_member(recipe(name))
    before = heldout_fvu(member)
    steps = train(member, 0, STEPS)
    assert heldout_fvu(member) < 0.4 < 1 < before
    assert all(math.isfinite(float(step.grad_norm)) for step in steps) and int(member.skipped) == 0
    # the norm of D numbers, and each divided by it
    assert worst_norm(member.trained().w_dec) <= (D + 2) * EPS
    assert member.schedule.get_last_lr()[0] == pytest.approx(
        recipe(name).peak_lr(F, STEPS) if name == "schedule_free" else 0, abs=1e-12
    )


@pytest.mark.parametrize("ema", [0.0, 0.9])
@each_optimizer
def test_a_run_saved_every_few_steps_and_resumed_has_the_bits_of_one_that_never_was(
    tmp_path: Path, name, ema
):
    config = recipe(name)
    straight, member = make_member(config, ema), make_member(config, ema)
    train(straight, 0, STEPS)
    for first in range(0, STEPS, 20):
        train(member, first, first + 20)
        Checkpointer(tmp_path).save(first + 20, {"member": member.state_dict()}, {})
        before = tensors(member.state_dict())
        loaded = Checkpointer(tmp_path).load()
        assert loaded is not None and loaded[0] == first + 20
        member = make_member(config, ema, seed=7)  # nothing of it may be left
        member.load_state_dict(loaded[1]["member"])
        assert_same_bits(tensors(member.state_dict()), before)
    assert_same_bits(tensors(member.state_dict()), tensors(straight.state_dict()))
    assert_same_bits(dict(member.trained().named_parameters()), dict(straight.trained().named_parameters()))


@each_optimizer
def test_a_step_that_is_not_finite_changes_nothing_but_the_schedule_and_the_counts(name):
    config = recipe(name, warmup=0, decay=0)  # a constant rate: the schedule does not tell the two apart
    spoilt, clean = make_member(config), make_member(config)
    for i, seed in enumerate([1, None, 2, None, None, 3, 4]):
        before = tensors({"sae": spoilt.sae.state_dict(), "optimizer": spoilt.optimizer.state_dict()})
        published = tensors(dict(spoilt.trained().named_parameters()))
        x = rows(seed or 50)
        if seed is None:
            x[3, 2] = math.inf
        step = AutogradStepper().step(spoilt, Batch(x, x))
        assert math.isfinite(float(step.grad_norm)) == (seed is not None)
        assert spoilt.schedule.last_epoch == i + 1
        if seed is None:
            after = {"sae": spoilt.sae.state_dict(), "optimizer": spoilt.optimizer.state_dict()}
            assert_same_bits(tensors(after), before)
            assert_same_bits(tensors(dict(spoilt.trained().named_parameters())), published)
        else:
            AutogradStepper().step(clean, Batch(x, x))
    assert int(spoilt.skipped) == 3 and int(spoilt.skipped_in_a_row) == 0
    assert_same_bits(tensors(spoilt.sae.state_dict()), tensors(clean.sae.state_dict()))
    assert_same_bits(tensors(spoilt.optimizer.state_dict()), tensors(clean.optimizer.state_dict()))


@each_optimizer
def test_a_first_step_that_is_not_finite_leaves_the_weights_as_they_were_initialised(name):
    member = make_member(recipe(name))
    before = tensors(member.sae.state_dict())
    x = torch.full((N, D), math.nan)
    AutogradStepper().step(member, Batch(x, x))
    assert_same_bits(tensors(member.sae.state_dict()), before)
    train(member, 0, 3)
    assert int(member.skipped) == 1 and all(bool(torch.isfinite(p).all()) for p in member.sae.parameters())


@each_optimizer
def test_micro_batches_make_the_step_of_the_whole_batch(name):
    whole, pieces = make_member(recipe(name, warmup=0)), make_member(recipe(name, warmup=0))
    x = rows(1)
    norms = [float(AutogradStepper(a).step(m, Batch(x, x)).grad_norm) for a, m in ((1, whole), (4, pieces))]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
    for one, two in zip(whole.sae.parameters(), pieces.sae.parameters(), strict=True):
        step = whole.config.optim.peak_lr(F, STEPS) * one.numel() ** 0.5
        moved = float((one - two).detach().norm()) / step
        # sums of N terms in another order; gradients that are rounding alone have either sign
        assert moved < 0.1


# -- what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "adamw"}, r"optim\.name='adamw'.*adam, adam8bit, muon, schedule_free.*did you mean adam"),
        ({"name": "muon", "moments": "bfloat16"}, r"optim\.moments='bfloat16'.*optim\.name=adam"),
        ({"name": "adam8bit", "clip_norm": "lagged"}, r"optim\.clip_norm='lagged'.*instead of adam8bit"),
        (
            {"name": "schedule_free", "decay": 0, "rows": "active", "beta1": 0.0},
            r"optim\.rows='active'.*all, or optim\.name=adam",
        ),
        ({"name": "schedule_free"}, r"optim\.decay=0\.8.*0 with.*optim=schedule_free sets it"),
        ({"name": "adam8bit"}, r"optim\.eps=1e-08.*at least 1e-07.*optim=adam8bit sets it"),
        ({"name": "schedule_free", "decay": 0, "beta1": 0.0}, r"optim\.beta1=0\.0.*above 0"),
    ],
)
def test_what_an_optimizer_cannot_do_is_refused_in_one_line(options, message):
    with pytest.raises(InputError, match=message) as caught:
        OptimConfig(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", IMPORTS)
def test_a_library_that_is_not_installed_is_named_with_how_to_install_it(name, monkeypatch):
    module = {"schedule_free": "schedulefree", "adam8bit": "torchao.optim"}[name]
    config, parameter = recipe(name), nn.Parameter(torch.zeros(2))
    config.check_library()
    monkeypatch.setitem(sys.modules, module, None)
    for use in (config.check_library, lambda: build_optimizer(config, [parameter], 2, 9)):
        with pytest.raises(InputError, match=rf"optim\.name='{name}'.*pip install 'sae-train\[optim\]'") as e:
            use()
        assert "\n" not in str(e.value) and module in str(e.value)
    OptimConfig().check_library()


@others
def test_only_adam_has_fused_steps(name):
    member, plain = make_member(recipe(name)), make_member(recipe("adam"))
    assert cannot_fuse(plain, 1) is None
    assert "main is not optimised by one plain Adam" in str(cannot_fuse(member, 1))
    member.name = "other"
    assert isinstance(choose_stepper(KernelsConfig(), [member], 1, None), AutogradStepper)
    assert choose_stepper(KernelsConfig(), [plain, member], 1, None).fused == {"main"}
    with pytest.raises(
        InputError, match=r"kernels\.stepper='fused'.*other is not optimised by one plain Adam"
    ):
        choose_stepper(KernelsConfig(stepper="fused"), [plain, member], 1, None)


def test_members_of_one_run_have_their_own_optimizers_and_learning_rates():
    saes = "a: {}, b: {optim: {name: muon, lr: 0.02}}, c: {optim: {name: schedule_free, decay: 0}}"
    composed = compose("train", [*GIVEN, "optim.lr_base=5e-4", f"saes={{{saes}}}"])
    a, b, c = (member.optim for member in members(to_config(composed), composed))
    assert [config.name for config in (a, b, c)] == ["adam", "muon", "schedule_free"]
    assert [config.peak_lr(2**12, 2**11) for config in (a, b, c)] == [1e-3, 0.02, 1e-3]


# -- Muon -------------------------------------------------------------------------------------------


def parameters() -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(3)
    return [nn.Parameter(torch.randn(shape, generator=draw)) for shape in ((12, 5), (12,), (5, 12), (5,))]


def give_gradients(params: list[nn.Parameter], seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    for parameter in params:
        parameter.grad = torch.randn(parameter.shape, generator=draw)


@pytest.mark.parametrize("which", [[0, 1, 2, 3], [0, 2], [1, 3]], ids=["both", "matrices", "vectors"])
def test_muon_steps_matrices_as_torchs_muon_does_and_everything_else_as_adam(which):
    config = OptimConfig(name="muon", lr=0.01, beta1=0.8)
    mine, theirs = ([parameters()[i] for i in which] for _ in range(2))
    optimizer = build_optimizer(config, mine, 12, 9)
    apart: list[torch.optim.Optimizer] = []
    if matrices := [p for p in theirs if p.ndim == 2]:
        apart.append(torch.optim.Muon(matrices, lr=0.01, weight_decay=0, adjust_lr_fn="match_rms_adamw"))
    if vectors := [p for p in theirs if p.ndim == 1]:
        apart.append(torch.optim.Adam(vectors, lr=0.01, betas=(0.8, 0.999), fused=True))
    for seed in range(5):
        give_gradients(mine, seed)
        give_gradients(theirs, seed)
        optimizer.step()
        for part in apart:
            part.step()
    for one, two in zip(mine, theirs, strict=True):
        assert torch.equal(one, two)
    names = {name for state in optimizer.state.values() for name in state}
    assert ("momentum_buffer" in names, "exp_avg_sq" in names) == (bool(matrices), bool(vectors))


# -- schedule-free ----------------------------------------------------------------------------------


def schedule_free_pair(steps: int, restore: Any) -> tuple[list[nn.Parameter], Any, list[nn.Parameter], Any]:
    """Ours, constrained after every step by `restore`, and the library's own, on the same gradients."""
    from schedulefree import AdamWScheduleFree

    mine, theirs = parameters(), parameters()
    config = OptimConfig(name="schedule_free", lr=0.01, decay=0)
    ours = build_optimizer(config, mine, 12, 9)
    assert isinstance(ours, ScheduleFree)
    library = AdamWScheduleFree(theirs, lr=0.01, weight_decay=0)
    library.train()
    for seed in range(steps):
        give_gradients(mine, seed)
        give_gradients(theirs, seed)
        ours.step()
        if restore is not None:
            ours.constrain(restore)
        library.step()
    return mine, ours, theirs, library


def test_schedule_free_takes_the_librarys_steps_and_publishes_what_its_eval_mode_shows():
    mine, ours, theirs, library = schedule_free_pair(20, None)
    for one, two in zip(mine, theirs, strict=True):
        assert torch.equal(one, two)
    before = [p.detach().clone() for p in mine]
    library.eval()
    with published_weights(ours):
        for one, two in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one, two, rtol=4 * EPS, atol=4 * EPS)
            assert not torch.equal(one, before[0])
    for one, kept in zip(mine, before, strict=True):
        assert torch.equal(one, kept)


def test_a_constraint_that_does_nothing_leaves_schedule_free_steps_as_they_are():
    mine, _, theirs, _ = schedule_free_pair(20, lambda: None)
    for one, two in zip(mine, theirs, strict=True):
        # y to x and back rounds four numbers of size max|y|, |z| in each of 20 steps
        torch.testing.assert_close(one, two, rtol=0, atol=20 * 4 * EPS * float(two.detach().abs().max()))


def test_the_published_weights_and_those_that_take_the_steps_keep_unit_rows_and_gradients_are_between():
    member = make_member(recipe("schedule_free"))
    train(member, 0, STEPS)
    sae, optimizer = member.sae, member.optimizer
    assert isinstance(sae, LinearSAE) and isinstance(optimizer, ScheduleFree)
    y, z = sae.w_dec.detach().clone(), optimizer.state[sae.w_dec]["z"]
    with published_weights(optimizer):
        x = sae.w_dec.detach().clone()
    assert worst_norm(z) <= (D + 2) * EPS
    # x is computed back from y and z: (y - 0.1 z) / 0.9 rounds by a few units
    assert worst_norm(x) <= 4 * (D + 2) * EPS
    torch.testing.assert_close(y, 0.1 * z + 0.9 * x, rtol=0, atol=4 * EPS)
    short = 1 - y.norm(dim=-1)
    angle = torch.acos((x * z).sum(dim=-1).clamp(-1, 1))
    assert float(angle.max()) > 0.1 and bool((short[angle > 0.1] > 0).all())
    torch.testing.assert_close(short, 0.045 * angle**2, rtol=0.2, atol=1e-5)  # as the docstring has it


def test_how_often_schedule_free_weights_are_looked_at_changes_no_bit():
    watched, alone = make_member(recipe("schedule_free")), make_member(recipe("schedule_free"))
    train(alone, 0, 10)
    for step in range(10):
        train(watched, step, step + 1)
        assert not torch.equal(watched.trained().w_enc, watched.sae.w_enc) or step == 0
    assert_same_bits(tensors(watched.state_dict()), tensors(alone.state_dict()))


def test_an_average_of_schedule_free_weights_is_one_of_what_is_published():
    averaged, plain = make_member(recipe("schedule_free"), ema=0.9), make_member(recipe("schedule_free"))
    by_hand = torch.zeros(F, D)
    for step in range(10):
        train(averaged, step, step + 1)
        train(plain, step, step + 1)
        x = plain.trained().w_enc.detach().clone()
        by_hand = x if step == 0 else 0.9 * by_hand + 0.1 * x
    torch.testing.assert_close(averaged.trained().w_enc.detach(), by_hand, rtol=1e-5, atol=1e-6)
    assert worst_norm(averaged.trained().w_dec) <= (D + 2) * EPS


def test_schedule_free_at_its_best_rate_ends_as_well_as_adam_at_its_best_constant_rate():
    def best(name: str) -> float:
        ends = []
        for lr_base in (2e-3, 4e-3, 8e-3):
            member = make_member(recipe(name, decay=0, lr_base=lr_base))
            train(member, 0, STEPS)
            ends.append(heldout_fvu(member))
        return min(ends)

    # 0.195 and 0.221; with two other seeds 0.194 and 0.228, 0.188 and 0.217
    assert best("schedule_free") <= best("adam")


# -- 8 bits -----------------------------------------------------------------------------------------


def test_moments_of_matrices_take_8_bits_and_are_saved_as_plain_tensors():
    member = make_member(recipe("adam8bit"))
    train(member, 0, 5)
    states = member.optimizer.state_dict()["state"]
    for number, parameter in enumerate(member.optimizer.param_groups[0]["params"]):
        for name in ("exp_avg", "exp_avg_sq"):
            saved, live = states[number][name], member.optimizer.state[parameter][name]
            if parameter.dim() == 1:
                assert saved is live and saved.dtype == torch.float32
                continue
            assert {key: type(value) for key, value in saved.items()} == {
                "codes": Tensor, "scale": Tensor, "qmap": Tensor, "signed": bool,
            }  # fmt: skip
            assert saved["codes"].dtype == torch.uint8 and saved["codes"].shape == parameter.shape
            assert len(saved["scale"]) == parameter.numel() // 256
            assert saved["signed"] == (name == "exp_avg") and len(saved["codes"].unique()) > 50
            # The largest number of a block is the scale, or in a signed one its negative at 0.99297.
            largest = live.dequantize().view(-1, 256).abs().amax(dim=1)
            torch.testing.assert_close(largest, saved["scale"], rtol=0.01, atol=0)


def test_8_bit_moments_start_and_end_where_those_of_32_bits_do():
    eight, plain = make_member(recipe("adam8bit")), make_member(recipe("adam", eps=1e-7))
    train(eight, 0, 1)
    train(plain, 0, 1)
    for one, two in zip(eight.sae.parameters(), plain.sae.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-3 * plain.config.optim.peak_lr(F, STEPS))
    train(eight, 1, STEPS)
    train(plain, 1, STEPS)
    assert not torch.equal(eight.sae.w_enc, plain.sae.w_enc)
    # 0.9 % apart; with a smaller eps (see LEAST_EPS) it is 3.7 instead of 0.27
    assert heldout_fvu(eight) == pytest.approx(heldout_fvu(plain), rel=0.05)


@pytest.mark.parametrize(
    ("part", "wrong"),
    [
        ("codes", torch.zeros(F, D + 1, dtype=torch.uint8)),
        ("scale", torch.ones(15)),
        ("scale", torch.ones(0)),
        ("qmap", torch.zeros(255)),
    ],
)
def test_parts_that_make_no_quantised_tensor_are_refused(part, wrong):
    member = make_member(recipe("adam8bit"))
    train(member, 0, 1)
    state = copy.deepcopy(member.state_dict())
    number = next(n for n, s in state["optimizer"]["state"].items() if isinstance(s["exp_avg"], dict))
    state["optimizer"]["state"][number]["exp_avg"][part] = wrong
    with pytest.raises(ValueError, match=r"exp_avg of a parameter \[256, 16\]"):
        make_member(recipe("adam8bit")).load_state_dict(state)


@pytest.mark.parametrize(
    ("name", "moment"), [("adam", "exp_avg"), ("muon", "momentum_buffer"), ("schedule_free", "z")]
)
def test_a_state_of_another_shape_is_refused(name, moment):
    member = make_member(recipe(name))
    train(member, 0, 1)
    state = copy.deepcopy(member.state_dict())
    number = next(n for n, s in state["optimizer"]["state"].items() if moment in s)
    state["optimizer"]["state"][number][moment] = torch.zeros(3, 3)
    with pytest.raises(ValueError, match=rf"{moment} of a parameter .* is \[3, 3\]"):
        make_member(recipe(name)).load_state_dict(state)
