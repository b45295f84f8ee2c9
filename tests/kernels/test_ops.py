"""Every op on every backend against dense float64 autograd: value and each gradient, and the awkward inputs.

The truth in these tests is built from one-hot matrices and shares no code with the package; `dense` says how
tolerances are derived.
"""

import itertools
from collections.abc import Callable

import pytest
import torch
from sae_kernels import (
    available_backends,
    cpu,
    dead_encode,
    decode_residual,
    dispatch,
    gather_dot,
    segment_rows,
    sparse_decode,
    topk_encode,
    use_backend,
)
from sae_kernels.chunked import slots_by_latent
from torch import Tensor

from .dense import BF16_EPS, EPS, assert_close, gradients, make_codes, make_encoder, one_hot

SHAPES = [(1, 1, 1, 1), (1, 3, 7, 5), (13, 5, 40, 70), (64, 32, 1024, 96), (9, 16, 16, 24), (33, 2, 3001, 17)]
INTERPRETED_SIZE = 2000  # N * F of the shapes that Triton's interpreter is given


def interpreted(device: str) -> bool:
    """Whether Triton runs in its interpreter, some thousand times slower than on a GPU."""
    return dispatch.requested() == "triton" and device == "cpu"


@pytest.mark.parametrize(("n", "k", "f", "d"), SHAPES)
def test_decode_agrees_with_dense_float64_in_value_and_gradients(device, n, k, f, d):
    if n * f > INTERPRETED_SIZE and interpreted(device):
        pytest.skip("too large for Triton's interpreter")
    values, indices = make_codes(n, k, f, device)
    _, weight, _ = make_encoder(n, f, d, device)
    hot = one_hot(indices.cpu(), f)
    got = gradients(lambda v, w: sparse_decode(v, indices, w), values, weight)
    want = gradients(
        lambda v, w: torch.einsum("nk,nkf->nf", v, hot) @ w, values.cpu().double(), weight.cpu().double()
    )
    assert_close(got, want, 4 * max(n, k, d) * EPS)


@pytest.mark.parametrize(("n", "k", "f", "d"), SHAPES)
def test_gather_dot_agrees_with_dense_float64_in_value_and_gradients(device, n, k, f, d):
    if n * f > INTERPRETED_SIZE and interpreted(device):
        pytest.skip("too large for Triton's interpreter")
    _, indices = make_codes(n, k, f, device)
    rows, weight, _ = make_encoder(n, f, d, device)
    hot = one_hot(indices.cpu(), f)
    got = gradients(lambda r, w: gather_dot(r, indices, w), rows, weight)
    want = gradients(
        lambda r, w: torch.einsum("nf,nkf->nk", r @ w.T, hot), rows.cpu().double(), weight.cpu().double()
    )
    assert_close(got, want, 4 * max(n, k, d) * EPS)


@pytest.mark.parametrize(("n", "k", "f", "d"), SHAPES)
def test_segment_rows_agrees_with_dense_float64_in_value_and_gradients(device, n, k, f, d):
    if n * f > INTERPRETED_SIZE and interpreted(device):
        pytest.skip("too large for Triton's interpreter")
    values, indices = make_codes(n, k, f, device)
    rows, _, _ = make_encoder(n, f, d, device)
    hot = one_hot(indices.cpu(), f)
    got = gradients(lambda v, r: segment_rows(v, indices, r, f), values, rows)
    want = gradients(
        lambda v, r: torch.einsum("nk,nkf->nf", v, hot).T @ r, values.cpu().double(), rows.cpu().double()
    )
    assert_close(got, want, 4 * max(n, k, d) * EPS)


def place_codes(values: Tensor, indices: Tensor, f: int) -> Tensor:
    """[N, F]: codes without the order of their slots, in which backends differ."""
    return values.new_zeros(len(values), f).scatter(1, indices.long(), values)


@pytest.mark.parametrize(("n", "k", "f", "d"), SHAPES)
def test_encode_agrees_with_dense_float64_in_value_and_gradients(device, n, k, f, d):
    if n * f > INTERPRETED_SIZE and interpreted(device):
        pytest.skip("too large for Triton's interpreter")

    def dense(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        pre = (x @ w.T + b).relu()
        return pre * (pre >= pre.topk(k).values[:, -1:])

    tensors = make_encoder(n, f, d, device)
    got = gradients(lambda x, w, b: place_codes(*topk_encode(x, w, b, k), f), *tensors)
    want = gradients(dense, *(t.cpu().double() for t in tensors))
    assert_close(got, want, 4 * max(n, k, d) * EPS)


@pytest.mark.parametrize(("n", "k", "f", "d"), [*SHAPES[:3], (9, 16, 16, 24), (12, 60, 50, 8)])
def test_dead_encode_agrees_with_dense_float64_in_value_and_gradients(device, n, k, f, d):
    def dense(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        pre = (x @ w.T + b).relu()
        return pre * (pre >= pre.topk(min(k, f)).values[:, -1:])

    tensors = make_encoder(n, f, d, device)
    got = gradients(lambda x, w, b: dead_encode(x, w, b, k), *tensors)
    assert_close(got, gradients(dense, *(t.cpu().double() for t in tensors)), 4 * max(n, k, d) * EPS)


@pytest.mark.parametrize(("k", "f"), [(1, 24), (4, 24), (5, 31), (40, 31)])
def test_dead_encode_keeps_exactly_k_however_many_tie(device, k, f):
    x, w, b = make_ties(20, f, 3, device)
    acts = dead_encode(x, w, b + 1, k)
    pre = (x @ w.T + 1).relu()
    assert acts.shape == pre.shape
    assert torch.equal(acts[acts != 0], pre[acts != 0])
    kept = acts.sort(descending=True).values[:, : min(k, f)]
    assert torch.equal(kept, pre.topk(min(k, f)).values)
    assert torch.equal((acts != 0).sum(dim=1), (pre > 0).sum(dim=1).clamp(max=k))


def test_outputs_are_differentiable_or_say_that_they_are_not(device):
    x, w, b = (t.requires_grad_() for t in make_encoder(5, 40, 6, device))
    values, indices = topk_encode(x, w, b, 3)
    assert values.requires_grad
    assert not indices.requires_grad
    residual, loss, dots = decode_residual(values, indices, w, b[:6], x)
    assert residual.requires_grad
    assert loss.requires_grad
    assert not dots.requires_grad
    others = (
        dead_encode(x, w, b, 3),
        sparse_decode(values, indices, w),
        gather_dot(x, indices, w),
        segment_rows(values, indices, x, 40),
    )
    assert all(out.requires_grad for out in others)


def make_ties(n: int, f: int, d: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Small integers: float32 sums of them are exact in any order, and many are equal."""
    draw = torch.Generator().manual_seed(n)
    x, w = (torch.randint(-2, 3, shape, generator=draw).float().to(device) for shape in ((n, d), (f, d)))
    return x, w, torch.zeros(f, device=device)


@pytest.mark.parametrize(("k", "f"), [(1, 64), (4, 64), (5, 203), (64, 64)])
def test_encode_with_ties_has_the_exact_values_at_distinct_latents(device, k, f):
    x, w, b = make_ties(40, f, 3, device)
    values, indices = topk_encode(x, w, b, k)
    pre = (x @ w.T).relu()
    assert torch.equal(values.sort(descending=True).values, pre.topk(k).values)
    assert torch.equal(values, pre.gather(1, indices.long()))
    ordered = indices.sort(dim=1).values
    assert (ordered.diff(dim=1) > 0).all()
    assert ordered.min() >= 0
    assert ordered.max() < f


def test_the_reference_takes_the_smallest_indices_of_a_tie():
    w = torch.full((500, 1), 2.0)
    w[[30, 400]] = 3.0
    with use_backend("reference"):
        values, indices = topk_encode(torch.ones(1, 1), w, torch.zeros(500), 5)
    assert values.tolist() == [[3.0, 3.0, 2.0, 2.0, 2.0]]
    assert indices.tolist() == [[30, 400, 0, 1, 2]]


def test_rows_without_positive_preactivations_have_empty_codes_and_no_gradient(device):
    x, w, b = (t.requires_grad_() for t in make_encoder(12, 128, 6, device))
    values, indices = topk_encode(x, w, b - 100.0, 4)
    assert (values == 0).all()
    assert ((indices >= 0) & (indices < 128)).all()
    (values.sum() + sparse_decode(values, indices, w.detach()).sum()).backward()
    assert all((t.grad == 0).all() for t in (x, w, b))


def test_a_row_that_is_not_finite_shows_in_its_own_codes_and_in_no_others(device):
    x, w, b = make_encoder(5, 128, 6, device)
    clean = place_codes(*topk_encode(x, w, b, 4), 128)
    x[2, 0] = torch.nan
    values, indices = topk_encode(x, w, b, 4)
    assert values[2].isnan().all()
    others = [0, 1, 3, 4]
    assert torch.equal(place_codes(values[others], indices[others], 128), clean[others])


def test_codes_of_only_empty_slots_decode_to_zero_and_sum_to_zero(device):
    indices = torch.zeros(6, 4, dtype=torch.int32, device=device)
    values, rows = torch.zeros(6, 4, device=device), torch.ones(6, 5, device=device)
    assert (sparse_decode(values, indices, torch.ones(9, 5, device=device)) == 0).all()
    assert (segment_rows(values, indices, rows, 9) == 0).all()


def test_empty_slots_are_set_apart_before_anything_is_summed():
    values, indices = make_codes(20, 4, 9, "cpu")
    order, starts = slots_by_latent(values, indices, 9)
    kept = order[: starts[-1]]
    assert (values.flatten()[kept] != 0).all()
    assert (values.flatten()[order[starts[-1] :]] == 0).all()
    latents = indices.flatten()[kept].tolist()
    assert latents == sorted(latents)
    assert all((kept[a:b].diff() > 0).all() for a, b in itertools.pairwise(starts))


def test_no_rows_give_no_codes(device):
    x, w, b = make_encoder(1, 40, 6, device)
    x, w = x[:0].requires_grad_(), w.requires_grad_()
    values, indices = topk_encode(x, w, b, 3)
    out = sparse_decode(values, indices, w)
    out.sum().backward()
    assert out.shape == x.shape == x.grad.shape
    assert (w.grad == 0).all()


def test_strided_inputs_and_gradients_are_read_where_they_lie(device):
    x, w, b = make_encoder(20, 96, 8, device)
    values, indices = make_codes(20, 4, 96, device)
    strided = [torch.stack([t, t + 1], dim=-1)[..., 0] for t in (x, w, b, values, indices)]
    assert not any(t.is_contiguous() for t in strided)
    sx, sw, sb, sv, si = strided
    # The ops that only gather take the same sums; a product may block strided operands in another order.
    assert torch.equal(sparse_decode(sv, si, sw), sparse_decode(values, indices, w))
    assert torch.equal(segment_rows(sv, si, sx, 96), segment_rows(values, indices, x, 96))
    assert torch.allclose(gather_dot(sx, si, sw), gather_dot(x, indices, w), atol=8 * 8 * 16 * EPS)
    got, want = (place_codes(*topk_encode(*t, 5), 96) for t in ((sx, sw, sb), (x, w, b)))
    assert torch.allclose(got, want, atol=8 * 8 * 16 * EPS)  # 8 terms below 16, and as much again

    weight = w.clone().requires_grad_()
    sparse_decode(values, indices, weight).sum().backward()  # the gradient of a sum is one expanded element
    want = segment_rows(values, indices, torch.ones_like(x), 96)
    assert torch.equal(weight.grad, want)


@pytest.mark.parametrize("bf16_product", [False, True])
def test_under_autocast_only_the_encoder_product_is_rounded(device, bf16_product, monkeypatch):
    monkeypatch.setattr(cpu, "NATIVE_BF16", bf16_product)
    n, k, f, d = 24, 6, 160, 48
    x, w, b = make_encoder(n, f, d, device)
    x, w, b = (t.requires_grad_() for t in (x, w, b))
    with torch.autocast(device, dtype=torch.bfloat16):
        values, indices = topk_encode(x, w, b, k)
        out = sparse_decode(values, indices, w.detach())
    # torch advises to leave autocast before backward; only plain autograd, thus the reference, depends on it.
    with torch.autocast(device, torch.bfloat16, enabled=dispatch.requested() != "reference"):
        (out * out.detach()).sum().backward()
    assert values.dtype == out.dtype == w.grad.dtype == torch.float32

    # Sorted values move by no more than the largest change of a pre-activation: two operands and the
    # product are rounded to bfloat16, and the float32 sum has d terms.
    pre = x.detach().double() @ w.detach().double().T + b.detach().double()
    magnitude = float((x.detach().abs().double() @ w.detach().abs().double().T).max())
    want = pre.relu().topk(k).values
    got = values.detach().double().sort(descending=True).values
    change = (got - want).abs().max()
    assert change <= (3 * BF16_EPS + 2 * d * EPS) * magnitude
    assert change > d * EPS * magnitude  # it was rounded

    # Decoding and gradients are not rounded: they are those of float64 for these very codes.
    v, hot = values.detach().cpu().double(), one_hot(indices.cpu(), f)
    wd, xd = w.detach().cpu().double(), x.detach().cpu().double()
    dense = torch.einsum("nk,nkf->nf", v, hot)
    dz = torch.where(dense > 0, (dense @ wd) @ wd.T, 0)
    want = [dense @ wd, dz @ wd, dz.T @ xd, dz.sum(dim=0)]
    got = [t.detach().cpu().double() for t in (out, x.grad, w.grad, b.grad)]
    assert_close(got, want, 4 * (n + k + d) * EPS)


def test_autocast_leaves_float64_alone(device):
    x, w, b = (t.double() for t in make_encoder(6, 128, 8, device))
    want = place_codes(*topk_encode(x, w, b, 4), 128)
    with torch.autocast(device, dtype=torch.bfloat16):
        got = place_codes(*topk_encode(x, w, b, 4), 128)
    assert got.dtype == torch.float64
    assert torch.equal(got, want)


def test_bfloat16_rows_and_weights_are_summed_in_float32(device):
    values, indices = make_codes(16, 8, 50, device)
    rows, weight, _ = (t.bfloat16() for t in make_encoder(16, 50, 30, device))
    wide = rows.float()
    assert torch.equal(gather_dot(rows, indices, weight), gather_dot(wide, indices, weight.float()))
    assert torch.equal(segment_rows(values, indices, rows, 50), segment_rows(values, indices, wide, 50))
    out = sparse_decode(values, indices, weight)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, sparse_decode(values, indices, weight.float()).bfloat16())


def test_two_runs_give_the_same_bits(device):
    if device == "cuda" and dispatch.requested() == "reference":
        pytest.skip("the reference adds with atomics on a GPU, and says so")
    n, k, f, d = (20, 4, 96, 16) if interpreted(device) else (300, 16, 2048, 40)
    tensors = make_encoder(n, f, d, device)

    def step(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return sparse_decode(*topk_encode(x, w, b, k), w)

    for first, second in zip(gradients(step, *tensors), gradients(step, *tensors), strict=True):
        assert torch.equal(first, second)


def test_first_and_second_derivatives_are_those_of_finite_differences(device):
    n, k, f, d = 3, 2, 32, 3
    x, w, b = (t.double().requires_grad_() for t in make_encoder(n, f, d, device))
    values, indices = make_codes(n, k, f, device)
    values = values.double().requires_grad_()
    cases: list[tuple[Callable[..., object], tuple[Tensor, ...]]] = [
        (lambda x, w, b: topk_encode(x, w, b, k)[0], (x, w, b)),
        (lambda v, w: sparse_decode(v, indices, w), (values, w)),
        (lambda r, w: gather_dot(r, indices, w), (x, w)),
        (lambda v, r: segment_rows(v, indices, r, f), (values, x)),
        (lambda x, w, b: dead_encode(x, w, b, k), (x, w, b)),
        (lambda v, w, b, x: decode_residual(v, indices, w, b[:d], x)[:2], (values, w, b, x)),
    ]
    for run, inputs in cases:
        assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("name", [name for name in available_backends() if name != "reference"])
def test_nothing_of_size_rows_times_latents_is_kept_for_the_backward(name):
    n, k, f, d = 64, 4, 512, 16
    x, w, b = (t.requires_grad_() for t in make_encoder(n, f, d, "cpu"))
    sizes: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with use_backend(name), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        sparse_decode(*topk_encode(x, w, b, k), w)
    assert max(sizes) == f * d < n * f
    assert sum(sizes) == 2 * f * d + n * d + 4 * n * k  # w twice, x, and the codes twice


def test_arguments_that_do_not_fit_are_refused():
    x, w, b = make_encoder(4, 10, 6, "cpu")
    values, indices = make_codes(4, 3, 10, "cpu")
    for run, message in [
        (lambda: topk_encode(x, w, b, 0), "k is 0: expected 1 to 10"),
        (lambda: topk_encode(x, w, b, 11), "k is 11: expected 1 to 10"),
        (lambda: topk_encode(x, w[:, :5], b, 2), "expected \\[N, D\\] and \\[F, D\\]"),
        (lambda: topk_encode(x, w, b[:9], 2), "expected \\[10\\], one per row of w"),
        (lambda: topk_encode(x.int(), w, b, 2), "x is torch.int32"),
        (lambda: topk_encode(x, w.to("meta"), b, 2), "w is on meta: expected cpu"),
        (lambda: sparse_decode(values, indices.long(), w), "indices is torch.int64"),
        (lambda: sparse_decode(values[:, :2], indices, w), "expected \\[N, K\\] twice"),
        (lambda: sparse_decode(values, indices, b), "weight is \\(10,\\)"),
        (lambda: gather_dot(x, indices[:3], w), "expected \\[4, K\\]"),
        (lambda: gather_dot(x[:, :5], indices, w), "expected \\[N, D\\] and \\[F, D\\]"),
        (lambda: gather_dot(x, indices + 10, w), "indices run from 10 to 19: expected 0 to 9"),
        (lambda: dead_encode(x, w, b, 0), "k is 0: expected a whole number of at least 1"),
        (lambda: decode_residual(values, indices + 10, w, b[:6], x), "indices run from 10 to 19"),
        (lambda: segment_rows(values, indices, x[:3], 10), "expected \\[4, D\\]"),
        (lambda: segment_rows(values, indices, x, 0), "d_sae is 0"),
        (lambda: segment_rows(values, indices - 1, x, 10), "indices run from -1 to"),
    ]:
        with pytest.raises(ValueError, match=message):
            run()
