"""Optimizer, schedule, clock, registry and the steps of a member do what they say."""

import copy
import math
import random
import time

import numpy as np
import pytest
import torch

from sae_train.activations.topk import TopKConfig
from sae_train.batch import Batch
from sae_train.cli.compose import compose
from sae_train.config import to_config
from sae_train.errors import InputError
from sae_train.registry import Registry, nearest
from sae_train.sae.init import geometric_median
from sae_train.sae.linear import LinearConfig
from sae_train.train.clock import Clock, time_shares
from sae_train.train.members import DEAD_REFRESH_STEPS, Member, MemberConfig
from sae_train.train.optim import OptimConfig, build_optimizer, build_schedule
from sae_train.train.resume import check_fingerprint, check_resume, classify, flatten
from sae_train.train.state import rng_state, set_rng_state
from sae_train.train.stepper import AutogradStepper

D, F, N = 8, 24, 32


def make_member(steps: int = 100, ema: float = 0.0, **optim) -> Member:
    config = MemberConfig(
        "main", "h", 0, LinearConfig(d_sae=F, activation=TopKConfig(k=3)), OptimConfig(**optim)
    )
    member = Member(config, D, steps, steps * N, ema, torch.device("cpu"))
    member.initialise({"h": rows(0)})
    return member


def rows(seed: int) -> torch.Tensor:
    return torch.randn(N, D, generator=torch.Generator().manual_seed(seed)) * 2 + 1


def weights(member: Member) -> dict[str, torch.Tensor]:
    return {name: t.detach().clone() for name, t in member.sae.state_dict().items()}


def test_learning_rate_warms_up_holds_and_falls_to_zero():
    parameter = torch.nn.Parameter(torch.zeros(1))
    config = OptimConfig(lr=2.0, warmup=0.1, decay=0.2)
    optimizer = build_optimizer(config, [parameter], 100, 9)
    schedule = build_schedule(config, optimizer, 100)
    seen = []
    for _ in range(100):
        seen.append(schedule.get_last_lr()[0])
        parameter.grad = torch.ones(1)
        optimizer.step()
        schedule.step()
    assert seen[0] == pytest.approx(0.2) and seen[9] == pytest.approx(2.0)
    assert all(lr == pytest.approx(2.0) for lr in seen[9:81])
    assert seen[90] == pytest.approx(1.0) and seen[99] == pytest.approx(0.1)
    assert schedule.get_last_lr()[0] == 0


def test_default_learning_rate_follows_from_width_and_budget():
    assert OptimConfig().peak_lr(2**14, 2**11) == pytest.approx(1e-3)
    assert OptimConfig().peak_lr(2**16, 2**11) == pytest.approx(5e-4)
    assert OptimConfig().peak_lr(2**14, 2**14) == pytest.approx(5e-4)
    assert OptimConfig().peak_lr(2**14, 250) == pytest.approx(1e-3 * 8.192 ** (1 / 3))
    assert OptimConfig().peak_lr(2**14, 10) == OptimConfig().peak_lr(2**14, 250)
    assert OptimConfig(budget_power=0).peak_lr(2**14, 10) == 1e-3
    assert OptimConfig(lr=0.1).peak_lr(2**16, 2**14) == 0.1


@pytest.mark.parametrize(
    ("tokens", "batch"),
    [(512, 512), (1_023_999, 512), (1_024_000, 1024), (4_095_999, 2048), (4_096_000, 4096), (10**9, 4096)],
)
def test_batches_grow_with_the_budget_unless_they_are_said(tokens, batch):
    given = [f"train.tokens={tokens}", "model.name=any", "hook=resid_post.0"]
    assert to_config(compose("train", given)).train.batch_tokens == batch
    assert to_config(compose("train", [*given, "train.batch_tokens=96"])).train.steps == tokens // 96
    with pytest.raises(InputError, match=rf"train\.accumulate=3: expected a divisor of batch_tokens={batch}"):
        to_config(compose("train", [*given, "train.accumulate=3"]))


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": 0.0},
        {"lr": -1.0},
        {"lr": math.nan},
        {"beta1": 1.0},
        {"warmup": 0.6, "decay": 0.6},
        {"name": "sgd"},
    ],
)
def test_optimizer_options_out_of_range_are_refused(wrong):
    with pytest.raises(InputError, match=r"optim\."):
        OptimConfig(**wrong)


def test_accumulated_micro_batches_give_the_gradient_of_the_whole_batch():
    whole, pieces = make_member(clip=None), make_member(clip=None)
    x = rows(1)
    AutogradStepper(1).step(whole, Batch(x, x))
    AutogradStepper(4).step(pieces, Batch(x, x))
    for name, tensor in weights(whole).items():
        # gradients are sums of N terms in another order; Adam's first step divides them by themselves
        torch.testing.assert_close(weights(pieces)[name], tensor, rtol=1e-4, atol=1e-5)
    # Adam's first step hides a wrong factor; the norm of the gradient does not
    x = rows(2)
    one, four = AutogradStepper(1).step(whole, Batch(x, x)), AutogradStepper(4).step(pieces, Batch(x, x))
    assert float(four.grad_norm) == pytest.approx(float(one.grad_norm), rel=1e-3)
    assert torch.equal(whole.stats.counts, pieces.stats.counts)


def test_a_batch_with_bad_gradients_leaves_weights_and_moments_alone_and_is_counted():
    member = make_member()
    stepper = AutogradStepper()
    stepper.step(member, Batch(rows(1), rows(1)))
    before = weights(member)
    moments = {i: s["exp_avg"].clone() for i, s in enumerate(member.optimizer.state.values())}
    bad = rows(2)
    bad[3, 2] = math.inf
    stepper.step(member, Batch(bad, bad))
    assert int(member.skipped) == 1 and int(member.skipped_in_a_row) == 1
    for name in ("w_enc", "b_enc", "b_dec"):
        assert torch.equal(weights(member)[name], before[name]), name
    torch.testing.assert_close(weights(member)["w_dec"], before["w_dec"], rtol=0, atol=1e-6)
    for i, state in enumerate(member.optimizer.state.values()):
        assert torch.equal(state["exp_avg"], moments[i])
        assert state["step"] == 1
    stepper.step(member, Batch(rows(3), rows(3)))
    assert int(member.skipped) == 1 and int(member.skipped_in_a_row) == 0
    assert torch.isfinite(member.stats.maxima).all() and (member.stats.sums >= 0).all()


def test_the_average_of_weights_follows_the_weights_and_is_published_with_unit_rows():
    member = make_member(ema=0.9, lr=0.05)
    stepper = AutogradStepper()
    by_hand = torch.zeros(F, D)
    for step in range(20):
        stepper.step(member, Batch(rows(step), rows(step)))
        by_hand = weights(member)["w_enc"] if step == 0 else 0.9 * by_hand + 0.1 * weights(member)["w_enc"]
    average = member.trained()
    assert average is not member.sae and not torch.equal(average.w_enc, member.sae.w_enc)
    torch.testing.assert_close(average.w_enc.detach(), by_hand, rtol=1e-5, atol=1e-6)
    assert (average.w_dec.norm(dim=-1) - 1).abs().max() < 1e-6
    assert make_member().trained() is not None and make_member().average is None


def test_latents_that_stay_silent_are_listed_as_dead_at_the_next_look():
    member = make_member()
    member.dead_after_tokens = N
    with torch.no_grad():
        member.sae.b_enc[5] = -1e6
    stepper = AutogradStepper()
    for step in range(DEAD_REFRESH_STEPS + 1):
        member.begin_step(step)
        stepper.step(member, Batch(rows(step), rows(step)))
    assert 5 in member.dead.tolist()


def test_dead_means_a_tenth_of_a_short_run_at_most():
    assert make_member(steps=100).dead_after_tokens == 100 * N // 10


def test_gradients_longer_than_the_clip_are_cut_to_it():
    free, tight = make_member(clip=None, eps=1.0), make_member(clip=1e-3, eps=1.0)
    x = rows(1)
    norm = float(AutogradStepper().step(free, Batch(x, x)).grad_norm)
    AutogradStepper().step(tight, Batch(x, x))
    assert norm > 1e-2
    moments = [torch.stack([s["exp_avg"].norm() for s in m.optimizer.state.values()]) for m in (free, tight)]
    # after one step Adam's first moment is a tenth of the gradient that it was given
    assert float(moments[0].norm()) == pytest.approx(0.1 * norm, rel=1e-4)
    assert float(moments[1].norm()) == pytest.approx(0.1 * 1e-3, rel=1e-3)


def test_autocast_rounds_the_encoder_and_leaves_the_masters_in_float32():
    exact, rounded = make_member(), make_member()
    x = rows(1)
    a = AutogradStepper().step(exact, Batch(x, x)).losses.codes.values
    b = AutogradStepper(autocast=torch.bfloat16).step(rounded, Batch(x, x)).losses.codes.values
    assert not torch.equal(a, b)
    # operands rounded to 8 bits: relative error of a product at most 2 * 2^-9, of a sum of D such the same
    assert (a.sort().values - b.sort().values).norm() < 4 * 2**-8 * a.norm()
    assert all(p.dtype == torch.float32 for p in rounded.sae.parameters())


def test_a_member_continues_bit_for_bit_from_its_state():
    one, two = make_member(ema=0.5), make_member(ema=0.5)
    one.dead = torch.tensor([2, 7])
    stepper = AutogradStepper()
    for step in range(5):
        stepper.step(one, Batch(rows(step), rows(step)))
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    for step in range(5, 10):
        stepper.step(one, Batch(rows(step), rows(step)))
        stepper.step(two, Batch(rows(step), rows(step)))
    for name, tensor in weights(one).items():
        assert torch.equal(weights(two)[name], tensor), name
    assert torch.equal(one.trained().w_enc, two.trained().w_enc)
    assert one.schedule.get_last_lr() == two.schedule.get_last_lr()


def test_random_generators_continue_where_they_were():

    state = rng_state()
    want = (torch.rand(3), np.random.rand(3).tolist(), random.random())
    set_rng_state(state)
    got = (torch.rand(3), np.random.rand(3).tolist(), random.random())
    assert torch.equal(want[0], got[0]) and want[1:] == got[1:]


def test_clock_counts_nested_phases_once():
    clock = Clock()
    with clock.phase("outer"):
        time.sleep(0.02)
        with clock.phase("inner"):
            time.sleep(0.03)
    total = clock.total()
    assert clock.seconds["inner"] >= 0.03 and 0.02 <= clock.seconds["outer"] < 0.03 + clock.seconds["inner"]
    assert total == pytest.approx(sum(clock.seconds.values()))


def test_waiting_for_rows_is_what_the_producer_did_meanwhile():
    shares = time_shares({"SAE step": 10.0, "rows": 30.0}, {"forward": 40.0, "tokens": 20.0, "wait": 9.0})
    assert shares == {"SAE step": 10.0, "model forward": 20.0, "tokenising": 10.0}
    assert time_shares({"rows": 3.0}, {}) == {"waiting for rows": 3.0}


def test_geometric_median_is_the_middle_that_an_outlier_cannot_drag():
    g = torch.Generator().manual_seed(0)
    points = torch.randn(501, 3, generator=g)
    dragged = torch.cat([points, torch.full((5, 3), 1e4)])
    centre = geometric_median(points)
    assert (geometric_median(dragged) - centre).norm() < 0.05
    assert (dragged.mean(dim=0) - centre).norm() > 50
    directions = torch.nn.functional.normalize(points - centre, dim=-1)
    assert directions.mean(dim=0).norm() < 1e-3  # the median is where unit pulls cancel


def test_registry_refuses_doubles_and_suggests_names():
    registry: Registry[object] = Registry("thing")
    registry.register("topk", dict)(int)
    with pytest.raises(ValueError, match="twice"):
        registry.register("topk", dict)(int)
    with pytest.raises(InputError, match=r"thing\.name='topkk'.*did you mean topk"):
        registry.cls("topkk")
    assert "did you mean" not in nearest("zzz", ["topk"])


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("logger.wandb", "allowed"),
        ("checkpoint.every", "allowed"),
        ("eval.tokens", "allowed"),
        ("run.dir", "allowed"),
        ("source.prefetch", "allowed"),
        ("run.threads", "warned"),
        ("model.device", "warned"),
        ("kernels.backend", "warned"),
        ("kernels.stepper", "warned"),
        ("optim.lr", "refused"),
        ("sae.activation.k", "refused"),
        ("sae.d_sae", "refused"),
        ("run.seed", "refused"),
        ("corpus.name", "refused"),
        ("train.tokens", "refused"),
        ("model.dtype", "refused"),
        ("source.seed", "refused"),
        ("hook", "refused"),
    ],
)
def test_each_field_is_classed_for_resume(key, kind):
    assert classify(key) == kind


def test_a_resume_with_another_recipe_is_refused_and_names_both_values():
    old = {"optim": {"lr": 1e-3}, "logger": {"wandb": False}}
    check_resume(old, {"optim": {"lr": 1e-3}, "logger": {"wandb": True}})
    with pytest.raises(InputError, match=r"optim\.lr=0\.002.*0\.001.*run\.dir"):
        check_resume(old, {"optim": {"lr": 2e-3}, "logger": {"wandb": False}})


def test_a_key_that_the_run_s_release_did_not_know_had_its_default():
    old, defaults = {"optim": {"lr": 1e-3}}, {"optim": {"lr": None, "moments": "float32"}}
    new = {"optim": {"lr": 1e-3, "moments": "float32"}}
    check_resume(old | {"members": {"m": old}}, new | {"members": {"m": new}}, defaults)
    new["optim"]["moments"] = "bfloat16"
    with pytest.raises(InputError, match=r"optim\.moments='bfloat16'.*'float32'"):
        check_resume(old, new, defaults)


def test_a_resume_on_changed_data_is_refused():
    with pytest.raises(InputError, match=r"corpus.*xxh3:1"):
        check_fingerprint({"corpus": "xxh3:1"}, {"corpus": "xxh3:2"})


def test_flatten_keeps_lists_and_empty_mappings_as_leaves():
    assert flatten({"a": {"b": [1], "c": {}}, "d": 1}) == {"a.b": [1], "a.c": {}, "d": 1}
