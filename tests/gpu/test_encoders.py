"""Every encoder at real size: exact against float64, in the same bits every time, E2 as E1.

A pre-activation drifts from the exact one by at most D * EPS of the product of the norms; tensor cores may
cut where others round, hence twice that. Small whole numbers have exact sums in any order.
"""

import pytest
import torch
from sae_kernels import batch_topk_encode, dead_encode, threshold_encode, topk_encode, use_backend
from torch import Tensor

from .problem import DEVICE, EPS, SIZES, TINY, Size, dictionary, draws, make_rows, needs_gpu

pytestmark = needs_gpu
ENCODERS = ("e1", "e2")
FEW = 16 if TINY else 1024  # rows, for what needs all their pre-activations


@pytest.fixture(autouse=True)
def plain_memory() -> None:
    """Memory is not filled with NaN, which would take long; Triton runs everything."""
    torch.use_deterministic_algorithms(False)
    with use_backend("triton"):
        yield


def problem(size: Size, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    """x [N, D], w [F, D], and biases that matter [F]"""
    w = dictionary(size)
    b = torch.randn(size.f, generator=draws(5), device=DEVICE) * 0.05
    return make_rows(size, w, 1).to(dtype), w.to(dtype), b


def whole_numbers(size: Size) -> tuple[Tensor, Tensor, Tensor]:
    """Pre-activations that are exact, and many of them equal, also at the k-th place."""
    x, w, b = (
        torch.randint(-1, 2, shape, generator=draws(seed), device=DEVICE).bfloat16()
        for seed, shape in enumerate(((size.n, size.d), (size.f, size.d), (size.f,)))
    )
    return x, w, b.float()


def limit_of(x: Tensor, w: Tensor, b: Tensor) -> float:
    longest = x.double().norm(dim=1).max() * w.double().norm(dim=1).max() + b.abs().max()
    return 2 * x.shape[1] * EPS * float(longest)


def best_of(x: Tensor, w: Tensor, b: Tensor, k: int) -> Tensor:
    """The k + 1 largest pre-activations of each row in float64, from some latents at a time."""
    best = torch.full((len(x), k + 1), -torch.inf, dtype=torch.float64, device=DEVICE)
    for part in torch.arange(len(w), device=DEVICE).split(4096):
        scores = x.double() @ w[part].double().T + b[part].double()
        best = torch.cat([best, scores], dim=1).topk(k + 1, dim=1).values
    return best


def chosen_scores(x: Tensor, w: Tensor, b: Tensor, indices: Tensor) -> Tensor:
    parts = zip(x.split(256), indices.long().split(256), strict=True)
    return torch.cat(
        [torch.einsum("nd,nkd->nk", a.double(), w[i].double()) + b[i].double() for a, i in parts]
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_each_encoder_is_exact_at_real_size(monkeypatch, size, encoder, dtype):
    monkeypatch.setenv("SAE_KERNELS_ENCODER", encoder)
    size = SIZES[size]
    x, w, b = problem(size, dtype)
    values, indices = topk_encode(x, w, b, size.k)
    best, limit = best_of(x, w, b, size.k), limit_of(x, w, b)
    scores = chosen_scores(x, w, b, indices)
    assert (indices.long().sort(dim=1).values.diff(dim=1) > 0).all()
    assert (values - scores.clamp_min(0)).abs().max() <= limit
    assert (best[:, size.k - 1, None] - scores).max() <= 2 * limit
    again = topk_encode(x, w, b, size.k)
    assert torch.equal(values, again[0]) and torch.equal(indices, again[1])


@pytest.mark.parametrize("size", SIZES)
def test_e2_has_the_bits_of_e1_where_sums_are_exact(monkeypatch, size):
    size = SIZES[size]
    x, w, b = whole_numbers(size)
    found = []
    for encoder in ENCODERS:
        monkeypatch.setenv("SAE_KERNELS_ENCODER", encoder)
        values, indices = topk_encode(x, w, b, size.k)
        order = indices.argsort(dim=1)
        found.append((values.gather(1, order), indices.gather(1, order)))
    best = best_of(x, w, b, size.k)
    assert (best[:, -1] == best[:, -2]).any(), "no row has a tie at the k-th place"
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("size", SIZES)
def test_e2_chooses_the_latents_of_e1_in_every_row_without_a_near_tie(monkeypatch, size):
    size = SIZES[size]
    x, w, b = problem(size)
    found = []
    for encoder in ENCODERS:
        monkeypatch.setenv("SAE_KERNELS_ENCODER", encoder)
        values, indices = topk_encode(x, w, b, size.k)
        found.append(indices.masked_fill(values == 0, size.f).sort(dim=1).values)
    best, limit = best_of(x, w, b, size.k), limit_of(x, w, b)
    clear = (best[:, -2] - best[:, -1] > 2 * limit) & ((best[:, :-1].abs() > limit).all(dim=1))
    assert clear.double().mean() > 0.5
    assert torch.equal(found[0][clear], found[1][clear])


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("rows", ["equal", "negative", "huge"])
def test_rows_that_no_guess_fits_are_still_exact(monkeypatch, encoder, rows):
    monkeypatch.setenv("SAE_KERNELS_ENCODER", encoder)
    size = SIZES["A"]
    n, d, f, k = min(size.n, 300), size.d, size.f, size.k
    x = torch.ones(n, d, device=DEVICE, dtype=torch.bfloat16)
    w = torch.full((f, d), 2.0**-6, device=DEVICE, dtype=torch.bfloat16)
    if rows == "negative":
        w = -w
    elif rows == "huge":
        x *= 2.0**40
        w *= torch.arange(1, f + 1, device=DEVICE).remainder(7).unsqueeze(1)
    values, indices = topk_encode(x, w, torch.zeros(f, device=DEVICE), k)
    best = (x[:1].double() @ w.double().T).relu().topk(k, dim=1).values  # powers of two: sums are exact
    assert torch.equal(values.double().sort(dim=1, descending=True).values, best.expand(n, k))
    assert (indices.long().sort(dim=1).values.diff(dim=1) > 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("guess", [None, 1e9], ids=["sampled", "wrong"])
def test_batch_topk_keeps_exactly_the_largest_of_the_batch(dtype, guess):
    size = SIZES["A"]
    x, w, b = problem(size, dtype)
    x, k = x[:FEW], size.k
    if guess is None:
        values, indices, offsets = batch_topk_encode(x, w, b, k)
    else:  # the fallback, which encodes everything again
        from sae_kernels.triton import compress

        values, indices, offsets = compress.batch_topk_encode(x, w, b, k, guess=guess)
    pre, limit = x.double() @ w.double().T + b, limit_of(x, w, b)
    rows = torch.arange(len(x), device=DEVICE).repeat_interleave(offsets.diff())
    assert len(values) == len(x) * k == int(offsets[-1])
    assert len((rows * len(w) + indices).unique()) == len(values)
    assert (values - pre[rows, indices.long()].relu()).abs().max() <= limit
    want = pre.relu().flatten().topk(len(values)).values
    assert (values.double().sort(descending=True).values - want).abs().max() <= limit


def test_threshold_encode_keeps_what_is_above():
    size = SIZES["A"]
    x, w, b = problem(size)
    x = x[:FEW]
    threshold = topk_encode(x, w, b, size.k)[0].median()
    got, indices, offsets = threshold_encode(x, w, b, threshold)
    pre, limit = x.double() @ w.double().T + b, limit_of(x, w, b)
    rows = torch.arange(len(x), device=DEVICE).repeat_interleave(offsets.diff())
    chosen = torch.zeros_like(pre, dtype=torch.bool)
    chosen[rows, indices.long()] = True
    assert (got > threshold).all() and (got - pre[rows, indices.long()]).abs().max() <= limit
    assert pre[chosen].min() > threshold - limit
    assert pre[~chosen].max() <= threshold + limit


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("share", [20, 2], ids=["in registers", "read anew"])  # 1228 and 12288 of A's latents
def test_dead_encode_keeps_the_largest_of_some_latents_and_its_gradients_are_theirs(dtype, share):
    size = SIZES["A"]
    x, w, b = problem(size, dtype)
    x, w, b = x[:FEW], w[: size.f // share], b[: size.f // share]
    k = max(1, len(w) // 3)
    leaves = [t.clone().requires_grad_() for t in (x, w, b)]
    acts = dead_encode(*leaves, k)
    upstream = torch.randn(acts.shape, generator=draws(6), device=DEVICE)
    grads = torch.autograd.grad(acts, leaves, upstream)
    acts = acts.detach()
    pre, limit = x.double() @ w.double().T + b, limit_of(x, w, b)
    want = pre.relu().topk(k, dim=1).values
    assert ((acts > 0).sum(dim=1) <= k).all()
    assert (acts.double().sort(dim=1, descending=True).values[:, :k] - want).abs().max() <= limit
    assert ((acts - pre)[acts > 0].abs() <= limit).all()
    # dz is rounded to narrow operands' dtype before it is multiplied, and so are the products.
    dz = upstream.double().masked_fill(acts == 0, 0)
    rounding = 4 * max(len(x), len(w)) * EPS if dtype == torch.float32 else 4 * 2.0**-8
    for got, exact in zip(grads, (dz @ w.double(), dz.T @ x.double(), dz.sum(dim=0)), strict=True):
        assert (got.double() - exact).norm() <= rounding * exact.norm()
