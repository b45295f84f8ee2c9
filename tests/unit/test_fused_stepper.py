"""The fused step is that of autograd, torch's clipping and torch's Adam, and leaves the same state behind.

The rows have sparse structure, an offset and a scale of their own; some latents start too low to fire,
so that AuxK works on them. Both steppers start from the same weights and see the same rows. Their sums
differ in order, so their weights drift apart: an Adam step moves each weight by at most about lr, and
that move errs by the relative error of its gradient, 4 * N * EPS in the root mean square for a sum of
N terms (as in tests/kernels), and of float32 bias corrections, EPS / (1 - beta2).
"""

import copy
import logging
import math
import warnings

import pytest
import torch
from sae_kernels import use_backend
from torch import Tensor

from sae_train.activations.base import ACTIVATIONS
from sae_train.activations.topk import TopK, TopKConfig
from sae_train.batch import Batch, RowBatch
from sae_train.errors import InputError
from sae_train.losses import Losses
from sae_train.places import Widths
from sae_train.sae.linear import LinearConfig, LinearSAE
from sae_train.train.fused import FusedStepper, cannot_fuse
from sae_train.train.kernels import KernelsConfig, choose_stepper
from sae_train.train.low_copies import state_of
from sae_train.train.members import Member, MemberConfig
from sae_train.train.optim import OptimConfig
from sae_train.train.stepper import AutogradStepper, Step, Stepper
from sae_train.train.trainer import TrainConfig

pytestmark = pytest.mark.usefixtures("one_thread")

D, F, N, K, STEPS, LR = 12, 64, 96, 4, 60, 3e-3
EPS = 2.0**-24
DRIFT = STEPS * LR * (4 * N * EPS + EPS / (1 - 0.999))  # of a weight, root mean square; derived above
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def rows(seed: int) -> Tensor:
    directions = torch.randn(40, D, generator=torch.Generator().manual_seed(99))
    draw = torch.Generator().manual_seed(seed)
    strengths = torch.rand(N, 40, generator=draw) * (torch.rand(N, 40, generator=draw) < 0.1)
    return (3 * (strengths @ directions) + 3 + 0.05 * torch.randn(N, D, generator=draw)).to(DEVICE)


def of_hooks(seed: int) -> RowBatch:
    """`rows` as hook h; its parts with scales of their own as f and g; what a layer might make of it as t."""
    x = rows(seed)
    layer = torch.randn(D, D, generator=torch.Generator().manual_seed(98)).to(DEVICE)
    hooks = {"h": x, "f": x[:, :7], "g": 30 * x[:, 7:], "t": 5 * torch.relu(x @ layer) - 2}
    return RowBatch(hooks, torch.arange(N))


HOOKS = {"autoencoder": ("h", None), "crosscoder": ("f+g", None), "transcoder": ("h", "t")}


def make_member(ema: float = 0.0, kind: str = "autoencoder", **optim) -> Member:
    sae = LinearConfig(kind=kind, d_sae=F, activation=TopKConfig(k=K), dead_after_tokens=4 * N)
    hook, target = HOOKS[kind]
    config = MemberConfig("main", hook, 0, sae, OptimConfig(**{"lr": LR} | optim), target)
    start = of_hooks(0).rows
    widths = config.places.widths({name: x.shape[1] for name, x in start.items()})
    member = Member(config, widths, STEPS, STEPS * N * 100, ema, DEVICE)
    member.initialise(start)
    with torch.no_grad():
        member.sae.b_enc[::7] = -3 * member.sae.w_enc.norm(dim=-1).mean()
    if member.average is not None:
        member.start_average()
    return member


def train(member: Member, stepper: Stepper, first: int, last: int) -> list[Step]:
    done = []
    for step in range(first, last):
        member.begin_step(step)
        done.append(stepper.step(member, member.batch(of_hooks(1 + step))))
    return done


def tensors(member: Member) -> dict[str, Tensor]:
    """Everything that a checkpoint holds of a member, by name."""
    out = {f"sae/{name}": t for name, t in member.sae.state_dict().items()}
    for number, state in member.optimizer.state_dict()["state"].items():
        out |= {f"{name}/{number}": t for name, t in state.items()}
    if member.average is not None:
        out |= {f"average/{name}": t for name, t in member.average.state_dict().items()}
    out |= {name: t for name, t in member.stats.state_dict().items() if isinstance(t, Tensor)}
    out |= {"skipped": member.skipped, "in a row": member.skipped_in_a_row, "dead": member.dead}
    return {name: t.detach().clone() for name, t in out.items()}


def assert_same_bits(one: Member, two: Member) -> None:
    mine, other = tensors(one), tensors(two)
    assert mine.keys() == other.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, other[name]), name


def rms(tensor: Tensor) -> float:
    return float(tensor.double().square().mean().sqrt())


def assert_close(one: Member, two: Member, drift: float = DRIFT) -> None:
    mine, other = tensors(one), tensors(two)
    assert mine.keys() == other.keys()
    for name, tensor in mine.items():
        kind = name.split("/")[0]
        apart = tensor.double() - other[name].double()
        if kind in ("sae", "average"):
            assert rms(apart) <= drift, name
        elif kind in ("exp_avg", "exp_avg_sq"):
            # weights of order 1 that drifted by so much change gradients by as much, times the curvature
            assert rms(apart) <= 50 * drift * rms(tensor), name
        elif kind in ("counts", "sums", "maxima", "last_fired"):
            # a near tie for the k-th place may go to another latent
            assert float(apart.abs().sum()) <= (1e-3 + drift) * float(tensor.double().sum()), name
        else:
            assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize(
    "options",
    [
        {"clip": None, "warmup": 0.0, "decay": 0.0},
        {"ema": 0.9, "clip": 0.3},
        {"beta1": 0.0, "eps": 1e-6},
        {"kind": "crosscoder", "clip": 0.3},
        {"kind": "transcoder", "clip": 0.3},
    ],
)
def test_fused_steps_equal_those_of_autograd(options):
    one, two = make_member(**options), make_member(**options)
    want, got = train(one, AutogradStepper(), 0, STEPS), train(two, FusedStepper(), 0, STEPS)
    assert_close(one, two)
    assert len(two.dead) > 0 and {"mse", "auxk"} == set(got[-1].losses.terms)
    if options.get("clip"):
        assert min(float(step.grad_norm) for step in want) < options["clip"] < float(want[0].grad_norm)
    for a, b in zip(want, got, strict=True):
        assert a.losses.terms.keys() == b.losses.terms.keys()
        for name, term in a.losses.terms.items():
            assert float(b.losses.terms[name]) == pytest.approx(float(term.detach()), rel=10 * DRIFT)
        assert float(b.grad_norm) == pytest.approx(float(a.grad_norm), rel=50 * DRIFT)
        assert rms(a.losses.y_hat.detach() - b.losses.y_hat) <= 10 * DRIFT * rms(a.losses.y_hat.detach())
        assert torch.equal(a.losses.codes.l0(), b.losses.codes.l0())
    for a, b in zip(one.sae.parameters(), two.sae.parameters(), strict=True):
        assert one.optimizer.state[a]["step"] == two.optimizer.state[b]["step"] == STEPS
    assert one.schedule.state_dict() == two.schedule.state_dict()
    # What a spike is judged by is all of the loss.
    assert torch.allclose(one.spikes.losses, two.spikes.losses, rtol=10 * DRIFT)
    assert float(got[-1].losses.terms["auxk"]) > 100 * DRIFT * float(got[-1].losses.terms["mse"])


@pytest.mark.parametrize("kind", HOOKS)
def test_the_first_gradients_equal_those_of_autograd_to_rounding(kind):
    # Adam's first moment after one step is a tenth of the gradient: no drift between, so a tight bound.
    one, two = make_member(clip=0.3, kind=kind), make_member(clip=0.3, kind=kind)
    for member in (one, two):
        member.dead = torch.arange(0, F, 7, device=DEVICE)
    batch = Batch(one.batch(of_hooks(1)).x, one.batch(of_hooks(2)).y)  # a target that is not the input
    AutogradStepper().step(one, batch)
    FusedStepper().step(two, batch)
    for a, b in zip(one.sae.parameters(), two.sae.parameters(), strict=True):
        want, got = one.optimizer.state[a]["exp_avg"], two.optimizer.state[b]["exp_avg"]
        assert rms(want) > 0 and rms(want - got) <= 4 * N * EPS * rms(want)
    dead = one.optimizer.state[one.sae.w_enc]["exp_avg"][one.dead]
    assert (dead.abs().sum(dim=1) > 0).any(), "AuxK reached no dead latent"


def test_a_batch_that_is_not_finite_is_skipped_and_counted_alike():
    members = [make_member(ema=0.5), make_member(ema=0.5)]
    bad = rows(2)
    bad[3, 2] = math.inf
    for member, stepper in zip(members, (AutogradStepper(), FusedStepper()), strict=True):
        train(member, stepper, 0, 2)
        before = tensors(member)
        for _ in range(3):
            step = stepper.step(member, Batch(bad, bad))
        assert not math.isfinite(float(step.grad_norm))
        assert int(member.skipped) == 3 and int(member.skipped_in_a_row) == 3
        after = tensors(member)
        for name, tensor in before.items():
            if name.split("/")[0] in ("exp_avg", "exp_avg_sq", "step") or name in ("sae/w_enc", "sae/b_dec"):
                assert torch.equal(after[name], tensor), name
        # only autograd's step renormalises rows that are unit vectors already
        assert rms(after["sae/w_dec"] - before["sae/w_dec"]) <= 2 * EPS
        train(member, stepper, 2, 3)
        assert int(member.skipped) == 3 and int(member.skipped_in_a_row) == 0
    assert_close(*members)


def test_a_run_may_change_steppers_at_a_checkpoint():
    for first, second in ((AutogradStepper, FusedStepper), (FusedStepper, AutogradStepper)):
        one, two = make_member(ema=0.5), make_member(ema=0.5)
        train(one, first(), 0, 20)
        two.load_state_dict(copy.deepcopy(one.state_dict()))
        assert_same_bits(one, two)
        train(one, first(), 20, 40)
        train(two, second(), 20, 40)
        assert_close(one, two)


def test_steppers_may_take_turns_on_one_member():
    one, two = make_member(), make_member()
    train(one, AutogradStepper(), 0, 30)
    turns: list[Stepper] = [FusedStepper(), AutogradStepper()]
    for step in range(30):
        train(two, turns[step % 2], step, step + 1)
    assert_close(one, two)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_two_fused_runs_give_the_same_bits(autocast):
    one, two = make_member(ema=0.5, clip=0.3), make_member(ema=0.5, clip=0.3)
    train(one, FusedStepper(autocast), 0, 30)
    train(two, FusedStepper(autocast), 0, 20)
    # and a resume is no break: the copies in bfloat16 are made from the weights again
    three = make_member(ema=0.5, clip=0.3)
    three.load_state_dict(copy.deepcopy(two.state_dict()))
    train(three, FusedStepper(autocast), 20, 30)
    assert_same_bits(one, three)


@pytest.mark.parametrize(
    "writer", ["load_state_dict", "initialise", "autograd step", "no_grad", "another tensor"]
)
def test_bfloat16_copies_follow_weights_that_someone_else_wrote(writer):
    member, stepper = make_member(), FusedStepper(torch.bfloat16)
    train(member, stepper, 0, 3)
    if writer == "load_state_dict":
        other = make_member()
        train(other, AutogradStepper(), 0, 9)
        member.load_state_dict(copy.deepcopy(other.state_dict()))
    elif writer == "initialise":
        member.initialise({"h": rows(7)})
    elif writer == "no_grad":
        with torch.no_grad():
            member.sae.w_enc *= 1.5
    elif writer == "another tensor":
        member.sae.w_enc.data = member.sae.w_enc.data * 1.5
    else:
        train(member, AutogradStepper(), 3, 4)
    fresh = make_member()
    fresh.load_state_dict(copy.deepcopy(member.state_dict()))
    train(member, stepper, 4, 6)
    train(fresh, FusedStepper(torch.bfloat16), 4, 6)
    assert_same_bits(member, fresh)


def test_under_autocast_products_are_rounded_and_masters_and_moments_are_not():
    exact, rounded = make_member(), make_member()
    a = train(exact, FusedStepper(), 0, 1)[0]
    b = train(rounded, FusedStepper(torch.bfloat16), 0, 1)[0]
    assert not torch.equal(a.losses.codes.values, b.losses.codes.values)
    # operands rounded to 8 bits: relative error of a product at most 2 * 2^-8, of a sum of D such the same
    gap = a.losses.codes.values.sort().values - b.losses.codes.values.sort().values
    assert rms(gap) < 4 * 2**-8 * rms(a.losses.codes.values)
    assert float(b.losses.terms["mse"]) == pytest.approx(float(a.losses.terms["mse"]), rel=2**-6)
    assert {t.dtype for name, t in tensors(rounded).items() if "/" in name} == {torch.float32}
    # and both learn the same: the loss falls, to about the same place
    done = train(exact, FusedStepper(), 1, STEPS), train(rounded, FusedStepper(torch.bfloat16), 1, STEPS)
    exact_end, rounded_end = (float(steps[-1].losses.terms["mse"]) for steps in done)
    assert exact_end < 0.7 * float(a.losses.terms["mse"])
    assert rounded_end == pytest.approx(exact_end, rel=0.05)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="a GPU multiplies weights that are rounded")
def test_on_a_cpu_autocast_rounds_only_products_of_dead_latents():
    one, two, three = make_member(), make_member(), make_member()
    chosen = choose_stepper(KernelsConfig(), [one], 1, torch.bfloat16)
    assert isinstance(chosen, FusedStepper)
    for member, stepper in ((one, chosen), (two, FusedStepper()), (three, FusedStepper(torch.bfloat16))):
        train(member, stepper, 0, 4)
    assert len(one.dead) == 0
    assert_same_bits(one, two)
    assert not torch.equal(one.sae.w_enc, three.sae.w_enc)
    rounded, exact = train(one, chosen, 4, STEPS)[-1], train(two, FusedStepper(), 4, STEPS)[-1]
    assert len(one.dead) > 0 and float(rounded.losses.terms["auxk"]) != float(exact.losses.terms["auxk"])
    assert_close(one, two, drift=2.0**-8 * LR * STEPS)


def test_fused_is_chosen_where_it_can_be_and_said_once(caplog):
    caplog.set_level(logging.INFO, logger="sae_train.train")
    member = make_member()
    stepper = choose_stepper(KernelsConfig(), [member, make_member()], 1, None)
    assert isinstance(stepper, FusedStepper)
    train(member, stepper, 0, 3)
    said = [r.message for r in caplog.records if "step" in r.message]
    assert said == ["steps are fused: every SAE is linear with top-k codes, under plain Adam"]
    assert isinstance(choose_stepper(KernelsConfig(stepper="autograd"), [member], 1, None), AutogradStepper)
    assert isinstance(choose_stepper(KernelsConfig(stepper="fused"), [member], 1, None), FusedStepper)


class OtherTopK(TopK):
    """An activation that only looks like TopK."""


def without_closed_form() -> Member:
    member = make_member()
    member.sae.activation = OtherTopK(TopKConfig(k=K), F)
    return member


def test_in_a_run_of_both_kinds_each_member_is_stepped_as_it_would_be_alone(caplog):
    caplog.set_level(logging.INFO, logger="sae_train.train")
    linear, other = make_member(), without_closed_form()
    other.name = "other"
    alone = copy.deepcopy(linear), copy.deepcopy(other)
    stepper = choose_stepper(KernelsConfig(), [linear, other], 1, None)
    (said,) = [r.message for r in caplog.records if "step" in r.message]
    assert said.startswith(
        "steps of main are fused, the others go through autograd: other is not a linear SAE"
    )
    for member in (linear, other):
        train(member, stepper, 0, 5)
    for member, twin, own in zip((linear, other), alone, (FusedStepper(), AutogradStepper()), strict=True):
        train(twin, own, 0, 5)
        expected, found = tensors(twin), tensors(member)
        assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    # the two ways differ in their last bits, so the assertion above can tell them apart
    swapped = make_member()
    train(swapped, AutogradStepper(), 0, 5)
    assert not torch.equal(swapped.sae.w_enc, linear.sae.w_enc)


class OtherLoss(LinearSAE):
    """A subclass with another loss, which a fused step would not compute."""

    def losses(self, batch: Batch, dead: Tensor) -> Losses:
        losses = super().losses(batch, dead)
        return Losses(losses.terms | {"more": self.b_dec.square().sum()}, losses.codes, losses.y_hat)


def with_other_loss() -> Member:
    member = make_member()
    member.sae = OtherLoss(member.config.sae, D).to(DEVICE)
    member.optimizer = torch.optim.Adam(member.sae.parameters(), fused=True)
    return member


def with_other_optimizer(**options) -> Member:
    member = make_member()
    member.optimizer = torch.optim.Adam(member.sae.parameters(), fused=True, **options)
    return member


def with_other_widths() -> Member:
    member = make_member(kind="transcoder")
    member.sae = LinearSAE(member.config.sae, Widths((D,), (D + 1,))).to(DEVICE)
    return member


def with_skip() -> Member:
    member = make_member(kind="transcoder")
    member.config.sae.skip = True
    member.sae = LinearSAE(member.config.sae, member.sae.widths).to(DEVICE)
    return member


def with_frozen_bias() -> Member:
    member = make_member()
    member.sae.b_enc.requires_grad_(False)
    return member


@pytest.mark.parametrize(
    ("make", "accumulate", "reason"),
    [
        (make_member, 4, "train.accumulate is 4"),
        (without_closed_form, 1, "main is not a linear SAE"),
        (with_other_loss, 1, "main is not a linear SAE"),
        (with_other_widths, 1, "main is not a linear SAE"),
        (with_skip, 1, "main is not a linear SAE"),
        (lambda: with_other_optimizer(weight_decay=0.1), 1, "decays weights"),
        (lambda: with_other_optimizer(amsgrad=True), 1, "keeps maxima"),
        (with_frozen_bias, 1, "other parameters"),
    ],
)
def test_where_steps_cannot_be_fused_autograd_is_chosen_and_the_reason_is_said(
    caplog, make, accumulate, reason
):
    caplog.set_level(logging.INFO, logger="sae_train.train")
    members = [make()]
    stepper = choose_stepper(KernelsConfig(), members, accumulate, torch.bfloat16)
    assert isinstance(stepper, AutogradStepper)
    assert (stepper.accumulate, stepper.autocast) == (accumulate, torch.bfloat16)
    assert reason in caplog.text and "autograd" in caplog.text
    with pytest.raises(InputError, match=rf"kernels\.stepper='fused'.*{reason}"):
        choose_stepper(KernelsConfig(stepper="fused"), [make_member(), *members], accumulate, None)


def test_every_registered_activation_has_a_closed_form_or_says_that_it_has_none():
    for name in ACTIVATIONS:
        config = LinearConfig(d_sae=F, activation=ACTIVATIONS.config(name)())
        member = Member(MemberConfig("main", "h", 0, config, OptimConfig()), D, 9, 9 * N, 0.0, DEVICE)
        assert (cannot_fuse(member, 1) is None) == (name == "topk")


def test_float16_products_are_refused_by_the_configuration_and_by_fused_steps():
    with pytest.raises(InputError, match=r"train\.autocast='float16'.*auto, bfloat16 or float32"):
        TrainConfig(autocast="float16")
    with pytest.raises(ValueError, match=r"autocast is torch\.float16: expected None or torch\.bfloat16"):
        FusedStepper(torch.float16)
    with pytest.raises(InputError, match=r"kernels\.stepper='fused'.*matrix products are in torch\.float16"):
        choose_stepper(KernelsConfig(stepper="fused"), [make_member()], 1, torch.float16)
    assert isinstance(choose_stepper(KernelsConfig(), [make_member()], 1, torch.float16), AutogradStepper)


@pytest.mark.parametrize("wrong", [{"backend": "tritn"}, {"stepper": "fast"}])
def test_unknown_backends_and_steppers_are_refused(wrong):
    with pytest.raises(InputError, match=rf"kernels\.{next(iter(wrong))}=.*expected"):
        KernelsConfig(**wrong)


def test_a_backend_that_cannot_run_here_is_refused_before_training(caplog):
    here = "cpu" if DEVICE.type == "cuda" else "reference"
    if here == "cpu":
        with pytest.raises(InputError, match=r"kernels\.backend='cpu'.*a tensor is on cuda"):
            choose_stepper(KernelsConfig(backend="cpu"), [make_member()], 1, None)
    with use_backend("reference"):
        assert isinstance(
            choose_stepper(KernelsConfig(backend="reference"), [make_member()], 1, None), FusedStepper
        )
    meta = make_member()
    meta.sae.to("meta")
    with pytest.raises(InputError, match=r"kernels\.backend='torch'.*a tensor is on meta"):
        choose_stepper(KernelsConfig(backend="torch"), [meta], 1, None)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="only a GPU can be waited for")
def test_a_fused_step_never_waits_for_the_device():
    member, stepper = make_member(ema=0.5), FusedStepper(torch.bfloat16)
    train(member, stepper, 0, 20)
    x = rows(50)
    torch.cuda.set_sync_debug_mode("error")
    try:
        stepper.step(member, Batch(x, x))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_own_steps_keep_the_bfloat16_copies_up_to_date_without_making_them_anew():
    member, stepper = make_member(), FusedStepper(torch.bfloat16)
    train(member, stepper, 0, 5)
    for name in ("w_enc", "w_dec"):
        parameter, copy_of_it = getattr(member.sae, name), stepper._copies._of[member][name]
        assert torch.equal(copy_of_it.tensor, parameter.to(torch.bfloat16))
        assert copy_of_it.state == state_of(parameter, member)


def test_the_first_step_of_a_fresh_member_gives_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch's schedule looks whether its optimizer has made a step
        train(make_member(), FusedStepper(), 0, 2)
