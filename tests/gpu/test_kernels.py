"""Triton's kernels on a GPU at the sizes they are for: `make test-gpu`.

The step is held to float64 by the code that guards the benchmark (kernels/bench/gpu_check.py), which is
itself tested without a GPU; the other ops by formulas here. `auto` must choose Triton, and say so when it
cannot.
"""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from sae_kernels import (
    batch_topk_encode,
    dead_encode,
    dispatch,
    gather_dot,
    segment_rows,
    sparse_decode,
    sparse_grad,
    threshold_encode,
    topk_encode,
    use_backend,
)
from torch import Tensor

BENCH = Path(__file__).parents[2] / "kernels" / "bench"
DEVICE = "cuda"
SIZES = ["A", "B"]
EPS = 2.0**-24
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """The benchmark's modules by name; memory is not filled with NaN, which would take long."""
    torch.use_deterministic_algorithms(False)
    monkeypatch.syspath_prepend(str(BENCH))
    names = ("gpu_ours", "gpu_problem", "gpu_check", "gpu_timing")
    return {name: importlib.import_module(name) for name in names}


@pytest.fixture
def codes(bench: dict[str, ModuleType]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [N, D] and w [F, D] in bfloat16, and their codes."""
    problem = bench["gpu_problem"]
    p = problem.PROBLEMS[SIZES[0]]
    w = problem.dictionary(p, DEVICE)
    x = problem.make_batches(p, w)[0]
    with use_backend("triton"):
        values, indices = topk_encode(x, w.bfloat16(), torch.zeros(p.f, device=DEVICE), p.k)
    return x, w.bfloat16(), values, indices


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("encoder", ["e1", "e2"])
def test_each_encoder_is_exact_at_real_size(bench, monkeypatch, size, encoder):
    monkeypatch.setenv("SAE_KERNELS_ENCODER", encoder)
    problem = bench["gpu_problem"]
    p = problem.PROBLEMS[size]
    w = problem.dictionary(p, DEVICE)
    x, w, b = problem.make_batches(p, w)[0], w.bfloat16(), torch.zeros(p.f, device=DEVICE)
    with use_backend("triton"):
        values, indices = topk_encode(x, w, b, p.k)
        bench["gpu_check"].check_encode(p, x, w, b, values, indices)
        again = topk_encode(x, w, b, p.k)
    assert torch.equal(values, again[0]) and torch.equal(indices, again[1])


@pytest.mark.parametrize("encoder", ["e1", "e2"])
@pytest.mark.parametrize("rows", ["equal", "negative", "huge"])
def test_rows_that_no_guess_fits_are_still_exact(bench, monkeypatch, encoder, rows):
    monkeypatch.setenv("SAE_KERNELS_ENCODER", encoder)
    p = bench["gpu_problem"].PROBLEMS[SIZES[0]]
    n, d, f, k = min(p.n, 300), p.d, p.f, p.k
    x = torch.ones(n, d, device=DEVICE, dtype=torch.bfloat16)
    w = torch.full((f, d), 2.0**-6, device=DEVICE, dtype=torch.bfloat16)
    if rows == "negative":
        w = -w
    elif rows == "huge":
        x *= 2.0**40
        w *= torch.arange(1, f + 1, device=DEVICE).remainder(7).unsqueeze(1)
    with use_backend("triton"):
        values, indices = topk_encode(x, w, torch.zeros(f, device=DEVICE), k)
    best = (x[:1].double() @ w.double().T).relu().topk(k, dim=1).values  # powers of two: sums are exact
    assert torch.equal(values.double().sort(dim=1, descending=True).values, best.expand(n, k))
    assert (indices.long().sort(dim=1).values.diff(dim=1) > 0).all()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("clip", ["exact", "none"])
@pytest.mark.parametrize("fmt", ["fp32", "split", "bf16-moments", "lazy"])
def test_a_whole_step_is_that_of_float64(bench, size, fmt, clip):
    problem = bench["gpu_problem"]
    p = problem.PROBLEMS[size]
    batches = problem.make_batches(p, problem.dictionary(p, DEVICE))
    with use_backend("triton"):
        bench["gpu_ours"].check(
            p, fmt, clip, batches, problem.make_latents(p, fmt, DEVICE, noisy_moments=True)
        )


@pytest.mark.parametrize("clip", ["exact", "lag1", "none"])
def test_a_step_repeats_its_bits_and_never_waits_for_the_device(bench, clip):
    problem, ours = bench["gpu_problem"], bench["gpu_ours"]
    p = problem.PROBLEMS[SIZES[0]]
    batches = problem.make_batches(p, problem.dictionary(p, DEVICE))
    digests = []
    with use_backend("triton"):
        for _ in range(2):
            latents = problem.make_latents(p, "split", DEVICE)
            step = ours.OurStep(p, "split", clip, batches, latents, problem.make_counters(p, DEVICE))
            digests.append(problem.digest([step(0), step(1), *problem.tensors_of(latents)]))
        assert digests[0] == digests[1]
        if DEVICE == "cuda":
            assert ours.host_waits(step) is None


@pytest.mark.skipif(DEVICE == "cpu", reason="graphs are captured on a GPU")
def test_a_step_can_be_captured_in_a_graph(bench):
    problem, ours = bench["gpu_problem"], bench["gpu_ours"]
    p = problem.PROBLEMS[SIZES[0]]
    batches = problem.make_batches(p, problem.dictionary(p, DEVICE))
    latents = problem.make_latents(p, "split", DEVICE)
    step = ours.OurStep(p, "split", "exact", batches, latents, problem.make_counters(p, DEVICE))
    with use_backend("triton"):
        step(0)
        found = ours.time_graph(step, bench["gpu_timing"].Clock(DEVICE, warmup=1, repeats=3))
    assert isinstance(found, dict), found


def test_batch_topk_keeps_exactly_the_largest_of_the_batch(codes):
    x, w, _, _ = codes
    x, k = x[: min(len(x), 1024)], codes[2].shape[1]
    with use_backend("triton"):
        values, indices, offsets = batch_topk_encode(x, w, torch.zeros(len(w), device=DEVICE), k)
    pre = x.double() @ w.double().T
    limit = 2 * x.shape[1] * EPS * float(x.double().norm(dim=1).max() * w.double().norm(dim=1).max())
    rows = torch.arange(len(x), device=DEVICE).repeat_interleave(offsets.diff())
    assert len(values) == len(x) * k == int(offsets[-1])
    assert len((rows * len(w) + indices).unique()) == len(values)
    assert (values - pre[rows, indices.long()]).abs().max() <= limit
    want = pre.relu().flatten().topk(len(values)).values
    assert (values.double().sort(descending=True).values - want).abs().max() <= limit


def test_threshold_encode_keeps_what_is_above(codes):
    x, w, values, _ = codes
    x = x[: min(len(x), 1024)]
    threshold = values.median()
    with use_backend("triton"):
        got, indices, offsets = threshold_encode(x, w, torch.zeros(len(w), device=DEVICE), threshold)
    pre = x.double() @ w.double().T
    limit = 2 * x.shape[1] * EPS * float(x.double().norm(dim=1).max() * w.double().norm(dim=1).max())
    rows = torch.arange(len(x), device=DEVICE).repeat_interleave(offsets.diff())
    chosen = torch.zeros_like(pre, dtype=torch.bool)
    chosen[rows, indices.long()] = True
    assert (got > threshold).all() and (got - pre[rows, indices.long()]).abs().max() <= limit
    assert pre[chosen].min() > threshold - limit
    assert pre[~chosen].max() <= threshold + limit


def test_dead_encode_keeps_the_largest_of_few_latents(codes):
    x, w, _, _ = codes
    x, w = x[: min(len(x), 1024)], w[: min(len(w) - 1, 1229)]
    k = len(w) // 3
    with use_backend("triton"):
        acts = dead_encode(x, w, torch.zeros(len(w), device=DEVICE), k)
    pre = x.double() @ w.double().T
    limit = 2 * x.shape[1] * EPS * float(x.double().norm(dim=1).max() * w.double().norm(dim=1).max())
    want = pre.relu().topk(k, dim=1).values
    assert ((acts > 0).sum(dim=1) <= k).all()
    assert (acts.double().sort(dim=1, descending=True).values[:, :k] - want).abs().max() <= limit
    assert (acts - pre)[acts > 0].abs().max() <= limit


def test_decoders_and_gradients_are_those_of_float64(codes):
    x, w, values, indices = codes
    with use_backend("triton"):
        out = sparse_decode(values, indices, w.float())
        dots = gather_dot(x, indices, w)
        segments = segment_rows(values, indices, x, len(w))
        dz, d_w_enc, d_w_dec, d_b_enc, d_b_dec = sparse_grad(x, x, values, indices, w, -0.5, dots)
    flat, row = (
        indices.reshape(-1).long(),
        torch.arange(len(x), device=DEVICE).repeat_interleave(values.shape[1]),
    )

    def by_latent(slot_values: Tensor, rows: Tensor) -> Tensor:
        parts = slot_values.reshape(-1, 1).double() * rows[row].double()
        return parts.new_zeros(len(w), parts.shape[1]).index_add_(0, flat, parts)

    want_dots = torch.cat(
        [
            torch.einsum("nd,nkd->nk", a.double(), w[i.long()].double())
            for a, i in zip(x.split(512), indices.split(512), strict=True)
        ]
    )
    want_dz = torch.where(values == 0, 0, -0.5 * want_dots)
    want_out = torch.cat(
        [
            torch.einsum("nk,nkd->nd", v.double(), w[i.long()].double())
            for v, i in zip(values.split(512), indices.split(512), strict=True)
        ]
    )
    terms = max(x.shape[1], int(flat.bincount().max()))
    for name, got, want in (
        ("sparse_decode", out, want_out),
        ("gather_dot", dots, want_dots),
        ("segment_rows", segments, by_latent(values, x)),
        ("dz", dz, want_dz),
        ("d_w_enc", d_w_enc, by_latent(want_dz, x)),
        ("d_w_dec", d_w_dec, -0.5 * by_latent(values, x)),
        ("d_b_enc", d_b_enc, by_latent(want_dz, torch.ones_like(x[:, :1])).squeeze(1)),
        ("d_b_dec", d_b_dec, -0.5 * x.double().sum(dim=0)),
    ):
        assert (got.double() - want).norm() <= 4 * terms * EPS * want.norm(), name


@pytest.mark.skipif(DEVICE == "cpu", reason="interpreted Triton is not chosen")
def test_auto_takes_triton_for_every_op():
    tensor = torch.zeros(1, device=DEVICE)
    ops = (
        "topk_encode",
        "batch_topk_encode",
        "threshold_encode",
        "dead_encode",
        "sparse_decode",
        "gather_dot",
    )
    for op in (*ops, "decode_residual", "segment_rows", "sparse_grad", "latent_step", "settle"):
        assert dispatch.select(op, "auto", tensor)[0] == "triton", op


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter needs no cache")
def test_a_cache_that_cannot_be_written_is_one_warning_and_torch_runs(tmp_path):
    (tmp_path / "file").touch()
    code = """
import logging, torch
from sae_kernels import sparse_decode
logging.basicConfig(format="%(levelname)s %(message)s")
for _ in range(2):
    codes = torch.ones(2, 3, device="cuda"), torch.zeros(2, 3, dtype=torch.int32, device="cuda")
    print(sparse_decode(*codes, torch.ones(5, 4, device="cuda")).sum().item())
"""
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "file" / "cache")}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert out.stdout.split() == ["24.0", "24.0"]
    assert out.stderr.count("WARNING Triton is not used: a test kernel failed with") == 1
