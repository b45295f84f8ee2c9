"""Triton's `latent_step` against the reference in every format, and against torch.optim.Adam in float64.

Gradients are sums of at most N * K + D terms; errors of the root mean square are allowed 4 * terms * EPS, and
moments twice that, as the second is a square. Where sums are exact (small integers, powers of two),
bfloat16 moments are compared bit for bit.
"""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from sae_kernels import (
    AdamStep,
    Counters,
    DeadGrads,
    Latents,
    Weight,
    decode_residual,
    latent_step,
    settle,
    use_backend,
)
from sae_kernels.latents import split
from sae_kernels.triton.lists import PIECE
from torch import Tensor

EPS = 2.0**-24  # float32 unit roundoff
BF16_STEP = 2.0**-7  # of bfloat16, relative, which a stochastic rounding may differ by
WEIGHTS = ("w_enc", "b_enc", "w_dec", "b_dec")
N, K, F, D = 10, 3, 8, 20


def make_weight(value: Tensor, how: str, moment: torch.dtype) -> Weight:
    first, second = (torch.zeros_like(value, dtype=moment) for _ in range(2))
    if how == "split":
        upper, remainder = split(value)
        return Weight(upper, first, second, remainder=remainder)
    return Weight(value.clone(), first, second, low=value.bfloat16() if how == "low" else None)


def make_latents(
    device: str,
    how: str = "plain",
    moment: torch.dtype = torch.float32,
    f: int = F,
    d: int = D,
    lazy: bool = False,
) -> Latents:
    draw = torch.Generator().manual_seed(f + d)
    w_enc, b_enc, w_dec, b_dec = (torch.randn(s, generator=draw) for s in ((f, d), (f,), (f, d), (d,)))
    w_dec /= w_dec.norm(dim=1, keepdim=True)
    weights = (make_weight(t.to(device), how, moment) for t in (w_enc, b_enc, w_dec, b_dec))
    last = torch.zeros(f, dtype=torch.int32, device=device) if lazy else None
    return Latents(*weights, step=torch.zeros((), device=device), last_step=last)


def make_counters(device: str, f: int = F) -> Counters:
    whole = [torch.zeros(f, dtype=torch.int64, device=device) for _ in range(3)]
    return Counters(whole[0], whole[1], torch.zeros(f, device=device), whole[2], tokens=0)


def make_batch(
    latents: Latents, seed: int, n: int = N, k: int = K, rows: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Rows, codes and residual: a third of the slots empty, latent 0 in every row, the last two in none."""
    f, d = latents.w_dec.value.shape
    draw = torch.Generator().manual_seed(seed)
    x, target = (torch.randn(n, d, generator=draw).to(rows) for _ in range(2))
    values = torch.rand(n, k, generator=draw) + 0.1
    values[:, 1:][torch.rand(n, k - 1, generator=draw) < 0.3] = 0
    indices = torch.randint(max(1, f - 2), (n, k), generator=draw, dtype=torch.int32)
    indices[:, :1] = 0
    x, target, values, indices = (t.to(latents.step.device) for t in (x, target, values, indices))
    with use_backend("reference"):
        residual, _, dots = decode_residual(
            values, indices, latents.w_dec.master(), latents.b_dec.master(), target
        )
    return {"x": x, "residual": residual, "values": values, "indices": indices, "dots": dots}


def make_dead(latents: Latents, seed: int) -> DeadGrads:
    """In a latent that is active as well, and in the last one, which is not."""
    f, d = latents.w_dec.value.shape
    draw = torch.Generator().manual_seed(seed)
    w_enc, b_enc, w_dec = (torch.randn(s, generator=draw).to(latents.step) for s in ((2, d), (2,), (2, d)))
    return DeadGrads(torch.tensor([f - 1, 0], device=latents.step.device), w_enc, b_enc, w_dec)


def tensors(latents: Latents) -> Iterator[tuple[str, Tensor]]:
    for name in WEIGHTS:
        for part, tensor in vars(getattr(latents, name)).items():
            if tensor is not None:
                yield f"{name}.{part}", tensor
    yield "step", latents.step
    if latents.last_step is not None:
        yield "last_step", latents.last_step


def assert_same_bits(got: Latents, want: Latents) -> None:
    for (name, a), (_, b) in zip(tensors(got), tensors(want), strict=True):
        assert torch.equal(a, b), name


def rms(t: Tensor) -> Tensor:
    return t.double().square().mean().sqrt()


def assert_close(got: Latents, want: Latents, terms: int) -> None:
    for name in WEIGHTS:
        a, b = getattr(got, name), getattr(want, name)
        assert rms(a.master() - b.master()) <= 4 * terms * EPS * rms(b.master()), name
        if b.low is not None:
            assert torch.equal(a.low, a.value.bfloat16()), name
        for part in ("first", "second"):
            m, w = getattr(a, part), getattr(b, part)
            allowed = 8 * terms * EPS if m.dtype == torch.float32 else BF16_STEP
            assert rms(m.float() - w.float()) <= allowed * rms(w), f"{name}.{part}"
    assert torch.equal(got.step, want.step)


BF16, F32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("how", "moment", "lazy", "options", "row_dtype"),
    [
        ("plain", F32, False, {}, F32),
        ("plain", F32, False, {"unit_norm": False, "centred": False, "clip": 0.1}, F32),
        ("low", F32, False, {"clip": 0.1}, BF16),
        ("low", BF16, False, {"clip": 0.1, "clip_norm": 0.3}, F32),
        ("split", BF16, False, {"clip": 1e9}, BF16),
        ("split", F32, True, {"clip": 0.1}, F32),
        ("split", BF16, True, {}, F32),
    ],
)
def test_steps_are_those_of_the_reference_in_every_format(
    triton_device, how, moment, lazy, options, row_dtype
):
    got = make_latents(triton_device, how, moment, lazy=lazy)
    want, counters = deepcopy(got), (make_counters(triton_device), make_counters(triton_device))
    adam = AdamStep(lr=1e-2, beta1=0.0 if lazy else 0.9)
    options = {
        k: torch.tensor(v, device=triton_device) if k == "clip_norm" else v for k, v in options.items()
    }
    for seed in range(2):
        batch = make_batch(want, seed, rows=row_dtype)
        dead = make_dead(want, seed) if seed else None
        norms = []
        for latents, counts, backend in zip((got, want), counters, ("triton", "reference"), strict=True):
            counts.tokens += N
            with use_backend(backend):
                norms.append(
                    latent_step(
                        *batch.values(), latents, adam, -2 / (N * D), **options, dead=dead, counters=counts
                    )
                )
        assert norms[0].shape == () and norms[0].dtype == F32
        # The reference decodes from weights that now differ in the last bits from those of the step here.
        assert abs(norms[0] - norms[1]) <= 8 * (N * K + D) * EPS * norms[1]
        assert_close(got, want, terms=N * K + D)
    for part in ("counts", "sums", "maxima", "last_fired"):
        assert torch.equal(getattr(counters[0], part), getattr(counters[1], part)), part
    assert counters[1].counts[0] >= 2 * N
    if lazy:
        assert torch.equal(got.last_step, want.last_step) and (got.last_step == 0).any()
        for latents, backend in ((got, "triton"), (want, "reference")):
            with use_backend(backend):
                settle(latents, adam)
        assert_close(got, want, terms=N * K + D)
        assert (got.last_step == 2).all()


@pytest.mark.parametrize("how", ["low", "split"])
def test_bfloat16_moments_have_the_bits_of_the_reference_where_sums_are_exact(triton_device, how):
    draw = torch.Generator().manual_seed(0)
    got = make_latents(triton_device, how, BF16)
    axes = torch.eye(D)[torch.randperm(D, generator=draw)[:F]].to(triton_device)
    whole = torch.randint(-4, 5, (F, D), generator=draw).float().to(triton_device)
    got.w_dec, got.w_enc = make_weight(axes, how, BF16), make_weight(whole, how, BF16)
    got.step.fill_(1000.0)
    for name in WEIGHTS:
        weight = getattr(got, name)
        weight.first.copy_(torch.randint(-8, 8, weight.first.shape, generator=draw))
        weight.second.copy_(torch.randint(1, 16, weight.second.shape, generator=draw))
    want = deepcopy(got)
    batch = {name: tensor.round() for name, tensor in make_batch(got, 0).items()}
    batch["values"] = (batch["values"] * 3).round()
    batch["indices"] = batch["indices"].int()
    with use_backend("reference"):
        zeros = torch.zeros(D, device=triton_device)
        codes = (batch["values"], batch["indices"], axes, zeros)
        batch["residual"], _, batch["dots"] = decode_residual(*codes, batch["residual"])
    for latents, backend in ((got, "triton"), (want, "reference")):
        with use_backend(backend):
            latent_step(*batch.values(), latents, AdamStep(1e-3, 0.5, 0.875), 0.25)
    for name in WEIGHTS:
        for part in ("first", "second"):
            a, b = (getattr(getattr(latents, name), part) for latents in (got, want))
            assert torch.equal(a, b), f"{name}.{part}"
            assert a.dtype == BF16


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("where", ["x", "residual", "values", "dots", "dead"])
def test_a_step_that_is_not_finite_changes_only_counters(triton_device, clip, where):
    got, counters = make_latents(triton_device, "low", lazy=True), make_counters(triton_device)
    before, batch, dead = deepcopy(got), make_batch(got, 0), make_dead(got, 0)
    if where == "dead":
        dead.w_dec[1, 3] = torch.inf
    else:
        batch[where][2, 0] = torch.nan if where == "values" else torch.inf
    counters.tokens = 7
    adam = AdamStep(1e-2, beta1=0.0)
    norm = latent_step(*batch.values(), got, adam, 0.5, clip=clip, dead=dead, counters=counters)
    assert not norm.isfinite()
    assert_same_bits(got, before)
    assert counters.counts[0] >= N - 1 and counters.last_fired[0] == 7
    assert counters.maxima.isfinite().all()


def test_rows_and_slots_without_codes_may_hold_anything(triton_device):
    got = make_latents(triton_device)
    batch = make_batch(got, 0)
    batch["values"][4] = 0
    want = deepcopy(got)
    latent_step(*batch.values(), want, AdamStep(1e-2), 0.5)
    batch["x"][4], batch["dots"][4] = torch.nan, torch.inf
    assert latent_step(*batch.values(), got, AdamStep(1e-2), 0.5).isfinite()
    assert_same_bits(got, want)


def test_lazy_steps_and_settling_come_to_what_dense_steps_come_to(triton_device):
    lazy, dense = make_latents(triton_device, lazy=True), make_latents(triton_device)
    adam = AdamStep(lr=1e-2, beta1=0.0, beta2=0.9)
    for seed in range(3):
        batch = make_batch(dense, seed, n=2)
        for latents in (lazy, dense):
            latent_step(*batch.values(), latents, adam, 0.5)
    settle(lazy, adam)
    # Rows that do not move are divided by their norm again and again in dense steps.
    assert_close(lazy, dense, terms=2 * K + D)


@pytest.mark.parametrize("unit_norm", [True, False])
def test_three_steps_are_those_of_float64_autograd_and_torch_adam(triton_device, unit_norm):
    got = make_latents(triton_device)
    want = {name: getattr(got, name).value.cpu().double().requires_grad_() for name in WEIGHTS}
    optimizer = torch.optim.Adam(want.values(), lr=1e-2, betas=(0.9, 0.999), eps=1e-8)
    raw = make_batch(got, 0)
    inputs, indices = (raw[name].cpu() for name in ("x", "indices"))
    for _ in range(3):
        w_enc, b_enc, w_dec, b_dec = (want[name] for name in WEIGHTS)
        centred = inputs.double() - b_dec
        pre = (centred @ w_enc.T + b_enc).gather(1, indices.long())
        z = pre.relu()
        x_hat = (z.unsqueeze(-1) * w_dec[indices.long()]).sum(dim=1) + b_dec
        optimizer.zero_grad()
        (x_hat - inputs.double()).square().mean().backward()
        assert w_dec.grad is not None
        if unit_norm:
            w_dec.grad -= (w_dec.grad * w_dec.detach()).sum(dim=1, keepdim=True) * w_dec.detach()

        # float32 codes of float64 weights: what is tested begins at the residual.
        values = z.detach().float().to(triton_device)
        with use_backend("reference"):
            residual, _, dots = decode_residual(
                values, raw["indices"], got.w_dec.value, got.b_dec.value, raw["x"]
            )
        rows = raw["x"] - got.b_dec.value
        norm = latent_step(
            rows,
            residual,
            values,
            raw["indices"],
            dots,
            got,
            AdamStep(1e-2),
            -2 / (N * D),
            unit_norm=unit_norm,
        )
        exact = torch.stack([p.grad.square().sum() for p in want.values() if p.grad is not None]).sum().sqrt()
        assert abs(norm.cpu().double() - exact) <= 8 * (N * K + D) * EPS * exact
        optimizer.step()
        if unit_norm:
            with torch.no_grad():
                w_dec /= w_dec.norm(dim=1, keepdim=True)
    for name in WEIGHTS:
        error = rms(getattr(got, name).value.cpu().double() - want[name].detach())
        assert error <= 4 * (N * K + D) * EPS * rms(want[name].detach()), name


def test_a_latent_in_every_row_of_a_long_batch_is_summed_in_pieces_and_wide_rows_in_blocks(triton_device):
    n, f, d = PIECE + 9, 4, 300
    got = make_latents(triton_device, f=f, d=d)
    want = deepcopy(got)
    batch = make_batch(got, 0, n=n, k=2)
    assert (batch["indices"] == 0).any(dim=1).all()
    norms = []
    for latents, backend in ((got, "triton"), (want, "reference")):
        with use_backend(backend):
            norms.append(latent_step(*batch.values(), latents, AdamStep(1e-2), -2 / (n * d), clip=1e-3))
    assert abs(norms[0] - norms[1]) <= 4 * (n + d) * EPS * norms[1]
    assert_close(got, want, terms=n + d)
    unit = got.w_dec.value.norm(dim=1)
    assert (unit - 1).abs().max() <= 4 * EPS * d


def test_compressed_rows_and_a_second_run_give_the_same_bits(triton_device):
    start = make_latents(triton_device, "split", BF16)
    batch = make_batch(start, 0)
    batch["values"][3] = 0
    full = batch["values"] != 0
    ends = full.sum(dim=1).cumsum(0)
    compressed = batch | {name: batch[name][full] for name in ("values", "indices", "dots")}
    runs: list[tuple[dict[str, Tensor], dict[str, Any]]] = [
        (batch, {}),
        (batch, {}),
        (compressed, {"offsets": torch.cat([ends.new_zeros(1), ends])}),
    ]
    after = []
    for tensors_in, more in runs:
        after.append(deepcopy(start))
        latent_step(*tensors_in.values(), after[-1], AdamStep(1e-2), 0.5, **more)
    assert_same_bits(after[1], after[0])
    assert_same_bits(after[2], after[0])
    assert not torch.equal(after[0].w_enc.value, start.w_enc.value)


@pytest.mark.parametrize("n", [0, 1])
def test_a_batch_of_one_row_or_none_moves_what_the_moments_move(triton_device, n):
    got = make_latents(triton_device, f=3, d=1)
    for name in WEIGHTS:
        getattr(got, name).first.fill_(0.5)
        getattr(got, name).second.fill_(0.25)
    want, batch = deepcopy(got), make_batch(got, 0, n=n, k=1)
    for latents, backend in ((got, "triton"), (want, "reference")):
        with use_backend(backend):
            norm = latent_step(*batch.values(), latents, AdamStep(1e-2), 0.5)
    assert_close(got, want, terms=2)
    assert (norm == 0) == (n == 0)
