"""`latent_step` and `settle` on every backend against float64 autograd and torch.optim.Adam.

The truth knows codes as a dense mask: z = mask * (x @ w_enc.T + b_enc). It shares no code with the package.
Adam's eps is large (1e-4, gradients are about 1e-2): a gradient that is off by dg then moves a parameter
by at most about lr * dg / eps.
"""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from sae_kernels import (
    AdamStep,
    Counters,
    DeadGrads,
    Latents,
    Weight,
    dispatch,
    latent_step,
    settle,
)
from sae_kernels.latents import split
from torch import Tensor

from sae_train.codes import Codes
from sae_train.stats import FeatureStats

EPS = 2.0**-24  # float32 unit roundoff
BF16_EPS = 2.0**-8  # bfloat16 unit roundoff; a stochastic rounding is off by up to twice that
N, K, F, D = 9, 3, 19, 12
LR, ADAM_EPS, STEPS = 1e-2, 1e-4, 3
NAMES = ("w_enc", "b_enc", "w_dec", "b_dec")
FORMATS = ("plain", "low", "bf16 moments", "split")


def skip_if_interpreted(device: str) -> None:
    if dispatch.requested() == "triton" and device == "cpu":
        pytest.skip("Triton's interpreter, which is slow, runs other parameters of this test")


def make_latents(kind: str, device: str, lazy: bool = False) -> Latents:
    draw = torch.Generator().manual_seed(3)
    w_dec = torch.nn.functional.normalize(torch.randn(F, D, generator=draw), dim=1)
    masters = {
        "w_enc": torch.randn(F, D, generator=draw) / D**0.5,
        "b_enc": torch.randn(F, generator=draw) / 10,
        "w_dec": w_dec,
        "b_dec": torch.randn(D, generator=draw) / 10,
    }

    def weight(master: Tensor) -> Weight:
        master = master.to(device)
        dtype = torch.bfloat16 if kind in ("bf16 moments", "split") else torch.float32
        moments = torch.zeros_like(master, dtype=dtype), torch.zeros_like(master, dtype=dtype)
        if kind == "split":
            value, remainder = split(master)
            return Weight(value, *moments, remainder=remainder)
        low = master.bfloat16() if kind == "low" else None
        return Weight(master.clone(), *moments, low=low)

    return Latents(
        **{name: weight(master) for name, master in masters.items()},
        step=torch.zeros((), device=device),
        last_step=torch.zeros(F, dtype=torch.int32, device=device) if lazy else None,
    )


def make_counters(device: str) -> Counters:
    zeros = torch.zeros(F, dtype=torch.int64, device=device)
    return Counters(zeros, zeros.clone(), torch.zeros(F, device=device), zeros.clone(), tokens=0)


def make_problem(
    step: int, latents: Latents, device: str, n: int = N, centred: bool = True
) -> dict[str, Any]:
    """Rows, codes of these latents at random places, and what `decode_residual` would say of them.

    Latent 0 is in every row, latents from 14 on in none; a third of the slots is empty, indices repeat."""
    draw = torch.Generator().manual_seed(100 + step)
    target = torch.randn(n, D, generator=draw)
    indices = torch.randint(14, (n, K), generator=draw, dtype=torch.int32)
    empty = torch.rand(n, K, generator=draw) < 0.3
    indices[:, 0], empty[:, 0] = 0, False
    w_enc, b_enc, w_dec, b_dec = (getattr(latents, name).master().cpu() for name in NAMES)
    x = target - b_dec if centred else target.roll(1)
    places = indices.long()
    values = (x.unsqueeze(1) * w_enc[places]).sum(-1) + b_enc[places]
    values[empty] = 0
    residual = target - (values.unsqueeze(-1) * w_dec[places]).sum(1) - b_dec
    dots = (residual.unsqueeze(1) * w_dec[places]).sum(-1)
    tensors = {"x": x, "residual": residual, "values": values, "indices": indices, "dots": dots}
    return {"target": target} | {name: t.to(device) for name, t in tensors.items()}


def step_args(problem: dict[str, Any]) -> dict[str, Tensor]:
    return {name: problem[name] for name in ("x", "residual", "values", "indices", "dots")}


def make_dead(step: int, device: str) -> DeadGrads:
    """Gradients in two latents that codes name too and in two that none does."""
    draw = torch.Generator().manual_seed(step)
    latents = torch.tensor([15, 2, 18, 0])
    parts = (torch.randn(shape, generator=draw) / 100 for shape in ((4, D), (4,), (4, D)))
    w_enc, b_enc, w_dec = (part.to(device) for part in parts)
    return DeadGrads(latents.to(device), w_enc, b_enc, w_dec)


class Truth:
    """Float64 autograd over dense matrices, torch's Adam and torch's clipping."""

    def __init__(self, latents: Latents, beta1: float) -> None:
        masters = {name: getattr(latents, name).master().cpu().double() for name in NAMES}
        self.params = {name: master.requires_grad_() for name, master in masters.items()}
        self.optimizer = torch.optim.Adam(
            self.params.values(), lr=LR, betas=(beta1, 0.999), eps=ADAM_EPS, foreach=False
        )

    def step(
        self,
        problem: dict[str, Any],
        lr: float,
        centred: bool = True,
        unit_norm: bool = True,
        clip: float | None = None,
        clip_norm: float | None = None,
        dead: DeadGrads | None = None,
    ) -> float:
        p, target = self.params, problem["target"].double()
        places, filled = problem["indices"].cpu().long(), problem["values"].cpu() != 0
        mask = torch.zeros(len(target), F, dtype=torch.float64)
        mask.scatter_add_(1, places, filled.double())
        x = target - p["b_dec"] if centred else problem["x"].cpu().double()
        z = mask * (x @ p["w_enc"].T + p["b_enc"])
        loss = (target - z @ p["w_dec"] - p["b_dec"]).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        with torch.no_grad():
            if dead is not None:
                for name in ("w_enc", "b_enc", "w_dec"):
                    p[name].grad[dead.latents.cpu()] += getattr(dead, name).cpu().double()
                if centred:  # the other loss encodes x - b_dec too, with the same weights
                    p["b_dec"].grad -= dead.b_enc.cpu().double() @ p["w_enc"][dead.latents.cpu()]
            if unit_norm:
                unit, grad = p["w_dec"], p["w_dec"].grad
                grad -= torch.diag(grad @ unit.T).unsqueeze(1) * unit
        before = torch.nn.utils.get_total_norm([t.grad for t in p.values()])
        if clip is not None and clip_norm is None:
            torch.nn.utils.clip_grad_norm_(p.values(), clip)
        elif clip is not None:
            torch.nn.utils.clip_grads_with_norm_(p.values(), clip, torch.tensor(clip_norm))
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        with torch.no_grad():
            if unit_norm:
                p["w_dec"] /= p["w_dec"].norm(dim=1, keepdim=True)
        return float(before)


def rms(t: Tensor) -> float:
    return float(t.double().square().mean().sqrt())


def scale_of(problem: dict[str, Any]) -> float:
    return -2 / problem["residual"].numel()


OPTIONS = {
    "default": {},
    "not centred, free norms": {"centred": False, "unit_norm": False},
    "clipped": {"clip": 0.01},
    "clip that does not bind": {"clip": 100.0},
    "clipped by another norm": {"clip": 0.01, "clip_norm": 0.04},
    "dead": {"dead": True, "clip": 0.02},
}
QUICK = {("plain", False, "default"), ("plain", False, "clipped"), ("split", True, "dead")}


@pytest.mark.parametrize(
    ("kind", "lazy", "options"),
    [("plain", False, name) for name in OPTIONS]
    + [
        (kind, lazy, "dead") for kind in FORMATS for lazy in (False, True) if (kind, lazy) != ("plain", False)
    ],
)
def test_several_steps_are_those_of_autograd_and_adam_in_float64(device, kind, lazy, options):
    if (kind, lazy, options) not in QUICK:
        skip_if_interpreted(device)
    beta1 = 0.0 if lazy else 0.9
    options = dict(OPTIONS[options])
    dead = options.pop("dead", False)
    clip_norm = options.pop("clip_norm", None)
    latents = make_latents(kind, device, lazy)
    truth = Truth(latents, beta1)
    gradient_tolerance = 4 * (N * K + D) * EPS
    bf16 = latents.w_enc.first.dtype == torch.bfloat16
    for step in range(STEPS):
        lr = LR / (1 + step)
        problem = make_problem(step, latents, device, centred=options.get("centred", True))
        extra = make_dead(step, device) if dead and step != 1 else None
        norm = latent_step(
            **step_args(problem),
            latents=latents,
            adam=AdamStep(lr, beta1, 0.999, ADAM_EPS),
            scale=scale_of(problem),
            clip_norm=None if clip_norm is None else torch.tensor(clip_norm, device=device),
            dead=extra,
            **options,
        )
        want = truth.step(problem, lr, clip_norm=clip_norm, dead=extra, **options)
        # Later norms are those of weights that already differ, by what is asserted below.
        allowed = gradient_tolerance if step == 0 else (0.05 if bf16 else 100 * gradient_tolerance)
        assert float(norm) == pytest.approx(want, rel=allowed)
    settle(latents, AdamStep(lr, beta1, 0.999, ADAM_EPS))
    assert float(latents.step) == STEPS
    for name in NAMES:
        weight, param = getattr(latents, name), truth.params[name]
        state = truth.optimizer.state[param]
        # A bfloat16 moment is off by 2 BF16_EPS of itself at each step, which moves a parameter
        # by as much of lr.
        moved = 8 * BF16_EPS if bf16 else gradient_tolerance * rms(param.grad) / ADAM_EPS
        error = rms(weight.master().cpu().double() - param.detach())
        assert error <= STEPS * (LR * moved + 2 * EPS * rms(param.detach())), name
        for moment, key in ((weight.first, "exp_avg"), (weight.second, "exp_avg_sq")):
            difference = rms(moment.cpu().double() - state[key])
            relative = 8 * BF16_EPS if bf16 else 100 * gradient_tolerance
            assert difference <= relative * rms(state[key]), (name, key)
    if options.get("unit_norm", True):
        norms = latents.w_dec.master().norm(dim=1)
        assert (norms - 1).abs().max() <= 8 * EPS  # a norm, a quotient and their roundings
    if kind == "low":
        for name in NAMES:
            weight = getattr(latents, name)
            assert torch.equal(weight.low, weight.value.bfloat16()), name


def everything(latents: Latents) -> dict[str, Tensor]:
    found = {"step": latents.step.clone()}
    if latents.last_step is not None:
        found["last_step"] = latents.last_step.clone()
    for name in NAMES:
        weight = getattr(latents, name)
        for field in dataclasses.fields(weight):
            if getattr(weight, field.name) is not None:
                found[f"{name}.{field.name}"] = getattr(weight, field.name).clone()
    return found


def assert_same_bits(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(got[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), (
            name
        )


@pytest.mark.parametrize(("kind", "lazy"), [(kind, False) for kind in FORMATS] + [("plain", True)])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")  # by the interpreter's NumPy
def test_a_step_whose_norm_is_not_finite_changes_nothing_but_counters(device, kind, lazy, bad):
    if (kind, bad) not in (("plain", torch.inf), ("split", 1e30)):
        skip_if_interpreted(device)
    latents = make_latents(kind, device, lazy)
    adam, counters = AdamStep(LR, 0.0 if lazy else 0.9), make_counters(device)
    problem = make_problem(0, latents, device)
    run = {"latents": latents, "adam": adam, "scale": scale_of(problem), "clip": 1.0, "counters": counters}
    latent_step(**step_args(problem), **run)
    before = everything(latents)
    problem = make_problem(1, latents, device)
    problem["values"][3, 0], counters.tokens, fired = bad, 2 * N, counters.counts.clone()
    norm = latent_step(**step_args(problem), **run)
    assert not torch.isfinite(norm)
    assert_same_bits(everything(latents), before)
    assert counters.counts[0] - fired[0] == (N if bad == 1e30 else N - 1)
    assert torch.isfinite(counters.maxima).all()
    assert counters.last_fired[0] == 2 * N


def test_counters_are_those_of_the_feature_statistics(device):
    latents, counters, stats = make_latents("plain", device), make_counters(device), FeatureStats(F)
    for step in range(3):
        problem = make_problem(step, latents, device)
        problem["values"][5, 1] = torch.nan if step == 1 else -0.0
        counters.tokens += N
        latent_step(**step_args(problem), latents=latents, adam=AdamStep(LR), scale=-1e-3, counters=counters)
        stats.update(Codes(problem["values"].cpu(), problem["indices"].cpu(), F))
    for name in ("counts", "sums", "maxima", "last_fired"):
        assert torch.equal(getattr(counters, name).cpu(), getattr(stats, name)), name


@pytest.mark.parametrize(("kind", "lazy"), [("plain", False), ("split", True)])
def test_two_steps_from_one_state_give_the_same_bits(device, kind, lazy):
    if device == "cuda" and dispatch.requested() == "reference":
        pytest.skip("the reference adds with atomics on a GPU, and says so")
    first = make_latents(kind, device, lazy)
    second = copy.deepcopy(first)
    for step in range(2):
        problem = make_problem(step, first, device)
        for latents in (first, second):
            latent_step(
                **step_args(problem),
                latents=latents,
                adam=AdamStep(LR, 0.0 if lazy else 0.9),
                scale=scale_of(problem),
                clip=0.01,
                dead=make_dead(step, device),
            )
    assert_same_bits(everything(first), everything(second))


def test_lazy_steps_leave_rows_of_inactive_latents_alone(device):
    latents = make_latents("plain", device, lazy=True)
    before = everything(latents)
    problem = make_problem(0, latents, device)
    latent_step(
        **step_args(problem),
        latents=latents,
        adam=AdamStep(LR, beta1=0.0),
        scale=scale_of(problem),
        dead=make_dead(0, device),
    )
    active = torch.zeros(F, dtype=torch.bool)
    active[[15, 2, 18, 0, *problem["indices"][problem["values"] != 0].tolist()]] = True
    assert latents.last_step.cpu().tolist() == active.int().tolist()
    after = everything(latents)
    for name in ("w_enc.value", "b_enc.value", "w_dec.value", "w_enc.second", "w_dec.first"):
        changed = (after[name] != before[name]).reshape(F, -1).any(dim=1).cpu()
        assert torch.equal(changed, active), name
    assert (after["b_dec.value"] != before["b_dec.value"]).all()


def assert_same_but_for_the_order_of_sums(first: Latents, second: Latents) -> None:
    for name in NAMES:
        got, want = (getattr(latents, name).value for latents in (first, second))
        assert rms(got - want) <= LR * 4 * N * K * EPS * 1e-2 / ADAM_EPS + EPS * rms(want), name


def test_compressed_codes_take_the_same_step_as_padded_ones(device):
    padded, compressed = (make_latents("plain", device) for _ in range(2))
    problem = make_problem(0, padded, device)
    problem["values"][[2, 5, N - 1]] = 0  # rows without a slot
    filled = problem["values"] != 0
    counts = filled.sum(dim=1)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    adam = AdamStep(LR, eps=ADAM_EPS)
    latent_step(**step_args(problem), latents=padded, adam=adam, scale=scale_of(problem))
    args = step_args(problem)
    for name in ("values", "indices", "dots"):
        args[name] = args[name][filled]
    latent_step(**args, latents=compressed, adam=adam, scale=scale_of(problem), offsets=offsets)
    assert_same_but_for_the_order_of_sums(compressed, padded)


def test_inputs_that_are_strided_or_bfloat16_are_read_as_what_they_hold(device):
    plain, strided = make_latents("plain", device), make_latents("plain", device)
    problem = step_args(make_problem(0, plain, device))
    problem |= {name: problem[name].bfloat16() for name in ("x", "residual")}
    adam = AdamStep(LR, eps=ADAM_EPS)
    wide = problem | {name: problem[name].float() for name in ("x", "residual")}
    latent_step(**wide, latents=plain, adam=adam, scale=-0.01)
    spread = {name: torch.stack([t, t + 1], dim=-1)[..., 0] for name, t in problem.items()}
    assert not any(t.is_contiguous() for t in spread.values())
    latent_step(**spread, latents=strided, adam=adam, scale=-0.01)
    assert_same_but_for_the_order_of_sums(strided, plain)


@pytest.mark.parametrize("n", [0, 1])
def test_a_step_of_one_row_or_of_none_is_a_step(device, n):
    latents = make_latents("plain", device)
    truth = Truth(latents, 0.9)
    for step, rows in enumerate((N, n)):
        problem = make_problem(step, latents, device, n=rows)
        adam = AdamStep(LR, eps=ADAM_EPS)
        latent_step(**step_args(problem), latents=latents, adam=adam, scale=-2 / max(1, rows * D))
        if rows:
            truth.step(problem, LR)
        else:
            truth.optimizer.zero_grad(set_to_none=False)
            truth.optimizer.step()
            with torch.no_grad():
                truth.params["w_dec"] /= truth.params["w_dec"].norm(dim=1, keepdim=True)
    for name in NAMES:
        error = rms(getattr(latents, name).value.cpu().double() - truth.params[name].detach())
        # Gradients of one row are up to a few times 0.1.
        assert error <= 2 * (LR * 4 * (N * K + D) * EPS * 0.1 / ADAM_EPS + 2 * EPS), name


def test_codes_without_a_slot_leave_only_the_decoder_bias_a_gradient(device):
    latents = make_latents("plain", device)
    before = copy.deepcopy(latents)
    problem = make_problem(0, latents, device)
    problem |= {name: torch.zeros_like(problem[name]) for name in ("values", "dots")}
    norm = latent_step(**step_args(problem), latents=latents, adam=AdamStep(LR), scale=0.5)
    want = 0.5 * problem["residual"].double().sum(dim=0)
    assert float(norm) == pytest.approx(float(want.norm()), rel=4 * (N + D) * EPS)
    for name in ("w_enc", "b_enc"):
        assert torch.equal(getattr(latents, name).value, getattr(before, name).value), name
    moved = latents.b_dec.value - before.b_dec.value  # Adam's first step is lr times the sign
    assert torch.allclose(moved.double(), -LR * want.sign(), rtol=1e-4, atol=4 * EPS)
