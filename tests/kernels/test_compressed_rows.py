"""Codes with a number of slots that differs from row to row: encoders that give them, ops that read them.

The truth is dense float64 and shares no code with the package. Integer inputs make float32 products
exact, so that selections and their ties can be compared exactly.
"""

from collections.abc import Callable

import pytest
import torch
from sae_kernels import (
    batch_topk_encode,
    decode_residual,
    dispatch,
    gather_dot,
    segment_rows,
    sparse_decode,
    threshold_encode,
    use_backend,
)
from torch import Tensor

from .dense import BF16_EPS, EPS, assert_close, gradients, make_encoder

SHAPES = [(1, 1, 1, 1), (1, 3, 17, 5), (13, 4, 40, 20), (16, 4, 128, 24), (9, 16, 16, 24)]  # N, k, F, D


def make_integers(n: int, f: int, d: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Float32 sums of small integers are exact in any order, and many are equal."""
    draw = torch.Generator().manual_seed(n + f)
    x, w, b = (torch.randint(-2, 3, s, generator=draw).float().to(device) for s in ((n, d), (f, d), (f,)))
    return x, w, b


def make_rows(n: int, f: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """values, indices, offsets of rows of 0 to 6 slots; the first and the last row are empty if n > 2.

    Latent 0 is in every row that is not empty, the last third of the latents in none; indices repeat
    and some slots are empty."""
    draw = torch.Generator().manual_seed(n + f)
    counts = torch.randint(0, 7, (n,), generator=draw)
    counts[n // 2] = 6
    if n > 2:
        counts[[0, -1]] = 0
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    m = int(offsets[-1])
    values = torch.randn(m, generator=draw)
    values[torch.rand(m, generator=draw) < 0.3] = 0
    indices = torch.randint(-(-f * 2 // 3), (m,), generator=draw, dtype=torch.int32)
    first = offsets[:-1][counts > 0]
    indices[first] = 0
    return values.to(device), indices.to(device), offsets.to(device)


def dense_places(offsets: Tensor, indices: Tensor, f: int) -> Tensor:
    """[M, N, F] float64: one at each slot's row and latent."""
    out = torch.zeros(len(indices), len(offsets) - 1, f, dtype=torch.float64)
    for row, (start, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        for slot in range(start, end):
            out[slot, row, int(indices[slot])] = 1
    return out


def scatter_rows(values: Tensor, indices: Tensor, offsets: Tensor, f: int) -> Tensor:
    """Codes as a dense [N, F], differentiable in values."""
    n = len(offsets) - 1
    row = torch.arange(n, device=values.device).repeat_interleave(offsets.diff())
    return values.new_zeros(n * f).scatter(0, row * f + indices.long(), values).view(n, f)


def assert_codes(values: Tensor, indices: Tensor, offsets: Tensor, n: int, f: int) -> None:
    """Distinct indices in range within each row, and offsets that run from 0 to M."""
    assert (indices.dtype, offsets.dtype) == (torch.int32, torch.int64)
    assert values.shape == indices.shape == (int(offsets[-1]),)
    assert offsets.shape == (n + 1,)
    assert offsets[0] == 0
    assert (offsets.diff() >= 0).all()
    row = torch.arange(n, device=indices.device).repeat_interleave(offsets.diff())
    places = row * f + indices.long()
    assert len(places.unique()) == len(places)
    assert ((indices >= 0) & (indices < f)).all()


@pytest.mark.parametrize(("n", "k", "f", "d"), SHAPES)
def test_batch_topk_agrees_with_dense_float64_in_value_and_gradients(device, n, k, f, d):
    def dense(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        pre = (x @ w.T + b).relu()
        return pre * (pre >= pre.flatten().topk(n * k).values[-1])

    tensors = make_encoder(n, f, d, device)
    codes = batch_topk_encode(*tensors, k)
    assert len(codes[0]) == n * k
    assert_codes(*codes, n, f)
    got = gradients(lambda x, w, b: scatter_rows(*batch_topk_encode(x, w, b, k), f), *tensors)
    want = gradients(dense, *(t.cpu().double() for t in tensors))
    assert_close(got, want, 4 * max(n, k, d) * EPS)


@pytest.mark.parametrize(("n", "k", "f"), [(20, 1, 64), (20, 5, 64), (11, 6, 29), (7, 16, 16)])
def test_batch_topk_with_ties_has_exactly_the_budget_and_the_exact_values(device, n, k, f):
    x, w, b = make_integers(n, f, 3, device)
    values, indices, offsets = batch_topk_encode(x, w, b, k)
    pre = (x.double() @ w.double().T + b.double()).relu()
    assert len(values) == n * k
    assert_codes(values, indices, offsets, n, f)
    assert torch.equal(values.double().sort(descending=True).values, pre.flatten().topk(n * k).values)
    assert torch.equal(
        scatter_rows(values, indices, offsets, f)[scatter_mask(offsets, indices, f)].sort()[0],
        pre[scatter_mask(offsets, indices, f)].float().sort()[0],
    )


def scatter_mask(offsets: Tensor, indices: Tensor, f: int) -> Tensor:
    ones = torch.ones(len(indices), device=indices.device)
    return scatter_rows(ones, indices, offsets, f) > 0


@pytest.mark.parametrize("name", ["cpu", "torch", "reference"])
@pytest.mark.parametrize("shift", [0.0, -7.0])
def test_batch_topk_takes_the_first_of_a_tie_by_row_and_then_by_latent(name, shift):
    n, k, f = 20, 5, 64
    x, w, b = make_integers(n, f, 3, "cpu")
    pre = (x @ w.T + b + shift).relu().flatten()  # with the shift too few are positive: zeros are tied
    chosen = pre.sort(descending=True, stable=True).indices[: n * k].sort().values
    with use_backend(name):
        values, indices, offsets = batch_topk_encode(x, w, b + shift, k)
    row = torch.arange(n).repeat_interleave(offsets.diff())
    order = (row * f + indices.long()).sort()
    assert torch.equal(order.values, chosen)
    assert torch.equal(values[order.indices], pre[chosen])


def test_batch_topk_gives_a_budget_of_empty_slots_where_nothing_is_positive(device):
    x, w, b = (t.requires_grad_() for t in make_encoder(6, 24, 5, device))
    values, indices, offsets = batch_topk_encode(x, w, b - 100, 3)
    assert_codes(values, indices, offsets, 6, 24)
    assert len(values) == 18
    assert (values == 0).all()
    (values.sum() + sparse_decode(values, indices, w.detach(), offsets).sum()).backward()
    assert all((t.grad == 0).all() for t in (x, w, b))


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("name", ["cpu", "torch"])
def test_batch_topk_does_not_depend_on_its_chunks(name, rows, monkeypatch):
    n, k, f = 23, 4, 48
    x, w, b = make_integers(n, f, 4, "cpu")
    x[:10] *= 3  # the threshold rises and falls from chunk to chunk
    with use_backend("reference"):
        want = batch_topk_encode(x, w, b, k)
    monkeypatch.setattr("sae_kernels.chunked.CHUNK_ELEMENTS", 4 * rows * f)
    monkeypatch.setattr("sae_kernels.cpu.CHUNK_ELEMENTS", rows * f)
    monkeypatch.setattr("sae_kernels.cpu.MIN_CHUNK_ROWS", 1)
    with use_backend(name):
        got = batch_topk_encode(x, w, b, k)
        thresholds = threshold_encode(x, w, b, torch.tensor(2.0))
    for g, wanted in zip(got, want, strict=True):
        assert torch.equal(g, wanted)
    with use_backend("reference"):
        for g, wanted in zip(thresholds, threshold_encode(x, w, b, torch.tensor(2.0)), strict=True):
            assert torch.equal(g, wanted)


@pytest.mark.parametrize("per_latent", [False, True])
@pytest.mark.parametrize(("n", "k", "f", "d"), SHAPES)
def test_threshold_encode_agrees_with_dense_float64_in_value_and_gradients(device, n, k, f, d, per_latent):
    tensors = make_encoder(n, f, d, device)
    draw = torch.Generator().manual_seed(f)
    threshold = torch.randn(f, generator=draw) + 1 if per_latent else torch.tensor(1.5)  # some are negative
    wide = threshold.double()
    threshold = threshold.to(device)

    def dense(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        pre = x @ w.T + b
        return pre * ((pre > wide) & (pre > 0))

    codes = threshold_encode(*tensors, threshold)
    assert_codes(*codes, n, f)
    assert (codes[0] > 0).all()
    got = gradients(lambda x, w, b: scatter_rows(*threshold_encode(x, w, b, threshold), f), *tensors)
    want = gradients(dense, *(t.cpu().double() for t in tensors))
    assert_close(got, want, 4 * max(n, k, d) * EPS)


def test_a_preactivation_at_its_threshold_is_not_above_it(device):
    x, w, b = make_integers(30, 40, 3, device)
    pre = x @ w.T + b
    threshold = torch.arange(-2, 38, device=device).float() % 5
    values, indices, offsets = threshold_encode(x, w, b, threshold)
    want = torch.where((pre > threshold) & (pre > 0), pre, 0)
    assert int((pre == threshold).sum()) > 50
    assert torch.equal(scatter_rows(values, indices, offsets, 40), want)
    assert torch.equal(offsets.diff(), (want > 0).sum(dim=1))


@pytest.mark.parametrize("kind", ["threshold", "batch"])
def test_no_rows_and_no_slots_give_empty_codes(device, kind):
    x, w, b = make_encoder(3, 40, 6, device)

    def encode(x: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if kind == "batch":
            return batch_topk_encode(x, w, b, 2)
        return threshold_encode(x, w, b, torch.tensor(1.0, device=device))

    values, indices, offsets = encode(x[:0], b)
    assert (values.shape, indices.shape, offsets.tolist()) == ((0,), (0,), [0])
    out = sparse_decode(values, indices, w, offsets)
    assert out.shape == (0, 6)
    if kind == "threshold":
        values, indices, offsets = encode(x, b - 100)
        assert (values.shape, offsets.tolist()) == ((0,), [0, 0, 0, 0])
        assert (sparse_decode(values, indices, w, offsets) == 0).all()
        assert (segment_rows(values, indices, x, 40, offsets) == 0).all()
        assert gather_dot(x, indices, w, offsets).shape == (0,)


@pytest.mark.parametrize(("n", "f", "d"), [(1, 1, 1), (2, 5, 3), (14, 41, 30), (20, 6, 17)])
def test_ops_read_rows_of_different_lengths_as_dense_float64_does(device, n, f, d):
    values, indices, offsets = make_rows(n, f, device)
    rows, weight, _ = make_encoder(n, f, d, device)
    draw = torch.Generator().manual_seed(d)
    bias, target = torch.randn(d, generator=draw).to(device), torch.randn(n, d, generator=draw).to(device)
    places = dense_places(offsets.cpu(), indices.cpu(), f)
    per_row, per_latent = places.sum(dim=2), places.sum(dim=1)
    v, r, w, c, y = (t.cpu().double() for t in (values, rows, weight, bias, target))

    def dense_decode(v: Tensor, w: Tensor) -> Tensor:
        return torch.einsum("m,mnf->nf", v, places) @ w

    def both(run: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
        return lambda *args: torch.cat([part.flatten() for part in run(*args)])

    pairs = [
        (lambda v, w: sparse_decode(v, indices, w, offsets), dense_decode, (values, weight), (v, w)),
        (
            lambda r, w: gather_dot(r, indices, w, offsets),
            lambda r, w: ((per_row @ r) * (per_latent @ w)).sum(dim=1),
            (rows, weight),
            (r, w),
        ),
        (
            lambda v, r: segment_rows(v, indices, r, f, offsets),
            lambda v, r: torch.einsum("m,mnf->fn", v, places) @ r,
            (values, rows),
            (v, r),
        ),
        (
            both(lambda v, w, c, y: decode_residual(v, indices, w, c, y, offsets)[:2]),
            both(lambda v, w, c, y: ((e := y - dense_decode(v, w) - c), e.square().sum(dim=1))),
            (values, weight, bias, target),
            (v, w, c, y),
        ),
    ]
    for ours, dense, inputs, wide in pairs:
        assert_close(gradients(ours, *inputs), gradients(dense, *wide), 8 * max(n, 6, d) * EPS)
    residual = y - dense_decode(v, w) - c
    dots = decode_residual(values, indices, weight, bias, target, offsets)[2]
    want = ((per_row @ residual) * (per_latent @ w)).sum(dim=1)
    assert_close([dots.cpu().double()], [want], 8 * max(6, d) * EPS)


def test_first_and_second_derivatives_of_compressed_codes_are_those_of_finite_differences(device):
    n, k, f, d = 4, 2, 24, 3
    x, w, b = (t.double().requires_grad_() for t in make_encoder(n, f, d, device))
    values, indices, offsets = make_rows(n, f, device)
    values = values.double().requires_grad_()
    bias, target = torch.randn(2, d, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    bias, target = (t.to(device).requires_grad_() for t in (bias, target.expand(n, d).clone()))
    threshold = torch.tensor(0.7, dtype=torch.float64, device=device)
    cases: list[tuple[Callable[..., object], tuple[Tensor, ...]]] = [
        (lambda x, w, b: batch_topk_encode(x, w, b, k)[0], (x, w, b)),
        (lambda x, w, b: threshold_encode(x, w, b, threshold)[0], (x, w, b)),
        (lambda v, w: sparse_decode(v, indices, w, offsets), (values, w)),
        (lambda r, w: gather_dot(r, indices, w, offsets), (x, w)),
        (lambda v, r: segment_rows(v, indices, r, f, offsets), (values, x)),
        (lambda v, w, c, y: decode_residual(v, indices, w, c, y, offsets)[:2], (values, w, bias, target)),
    ]
    for run, inputs in cases:
        assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


def test_outputs_are_differentiable_or_say_that_they_are_not(device):
    x, w, b = (t.requires_grad_() for t in make_encoder(5, 40, 6, device))
    threshold = torch.tensor(0.5, device=device)
    batch, above = batch_topk_encode(x, w, b, 3), threshold_encode(x, w, b, threshold)
    for values, indices, offsets in (batch, above):
        assert values.requires_grad
        assert not indices.requires_grad
        assert not offsets.requires_grad
    values, indices, offsets = batch
    residual, loss, dots = decode_residual(values, indices, w, b[:6], x, offsets)
    assert residual.requires_grad
    assert loss.requires_grad
    assert not dots.requires_grad
    for out in (
        sparse_decode(values, indices, w, offsets),
        gather_dot(x, indices, w, offsets),
        segment_rows(values, indices, x, 40, offsets),
    ):
        assert out.requires_grad


def test_under_autocast_only_the_product_of_these_encoders_is_rounded(device):
    n, k, f, d = 12, 4, 80, 32
    x, w, b = make_encoder(n, f, d, device)
    exact = x.double() @ w.double().T + b.double()
    magnitude = float((x.double().abs() @ w.double().abs().T).max())
    threshold = torch.tensor(3.0, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        for values, indices, offsets in (
            batch_topk_encode(x, w, b, k),
            threshold_encode(x, w, b, threshold),
        ):
            assert values.dtype == torch.float32
            row = torch.arange(n, device=device).repeat_interleave(offsets.diff())
            change = (values.double() - exact[row, indices.long()].relu()).abs().max()
            assert d * EPS * magnitude < change <= (3 * BF16_EPS + 2 * d * EPS) * magnitude
            out = sparse_decode(values, indices, w, offsets)
            assert out.dtype == torch.float32
            want = scatter_rows(values, indices, offsets, f).double() @ w.double()
            assert_close([out.double()], [want], 4 * f * EPS)


def test_two_runs_give_the_same_bits(device):
    if device == "cuda" and dispatch.requested() == "reference":
        pytest.skip("the reference adds with atomics on a GPU, and says so")
    tensors = make_encoder(12, 96, 16, device)

    def step(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        values, indices, offsets = batch_topk_encode(x, w, b, 4)
        return decode_residual(values, indices, w, b[:16], x, offsets)[1]

    for first, second in zip(gradients(step, *tensors), gradients(step, *tensors), strict=True):
        assert torch.equal(first, second)


def test_strided_inputs_are_read_where_they_lie(device):
    values, indices, offsets = make_rows(14, 41, device)
    rows, weight, _ = make_encoder(14, 41, 6, device)
    sv, si, so, sr, sw = (
        torch.stack([t, t + 1], dim=-1)[..., 0] for t in (values, indices, offsets, rows, weight)
    )
    assert not any(t.is_contiguous() for t in (sv, si, so, sr, sw))
    assert torch.equal(sparse_decode(sv, si, sw, so), sparse_decode(values, indices, weight, offsets))
    assert torch.equal(segment_rows(sv, si, sr, 41, so), segment_rows(values, indices, rows, 41, offsets))
    got, want = gather_dot(sr, si, sw, so), gather_dot(rows, indices, weight, offsets)
    assert torch.allclose(got, want, atol=8 * 6 * 16 * EPS)


def test_arguments_that_do_not_fit_are_refused():
    x, w, b = make_encoder(4, 10, 6, "cpu")
    values, indices, offsets = make_rows(4, 10, "cpu")
    one = torch.tensor(1.0)
    for run, message in [
        (lambda: batch_topk_encode(x, w, b, 11), "k is 11: expected 1 to 10"),
        (
            lambda: threshold_encode(x, w, b, torch.ones(9)),
            "threshold is \\(9,\\): expected \\[10\\] or \\[\\]",
        ),
        (lambda: threshold_encode(x, w, b, one.to("meta")), "threshold is on meta"),
        (lambda: sparse_decode(values, indices, w, offsets.int()), "offsets is torch.int32"),
        (lambda: sparse_decode(values[None], indices[None], w, offsets), "expected \\[M\\] twice"),
        (lambda: gather_dot(x[:3], indices, w, offsets), "expected \\[M\\] with offsets \\[4\\]"),
        (lambda: segment_rows(values, indices, x[:3], 10, offsets), "expected \\[4, D\\]"),
        (lambda: decode_residual(values, indices, w, b, x, offsets), "bias is \\(10,\\): expected \\[6\\]"),
        (lambda: decode_residual(values, indices, w, b[:6], x[:3], offsets), "target is \\(3, 6\\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            run()
