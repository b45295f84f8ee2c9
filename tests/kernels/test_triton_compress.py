"""BatchTopK and threshold encoders in Triton: exact whatever was guessed, and in one order.

Integer inputs make float32 sums exact in any order, so results on them are compared bit for bit with the
reference, ties included. Real inputs are compared with float64: a pre-activation drifts from the exact one
by at most about D * EPS of its terms' magnitudes, and only what is that close to the border may differ.
"""

import pytest
import torch
from sae_kernels import batch_topk_encode, reference, threshold_encode, use_backend
from sae_kernels.triton import compress
from torch import Tensor

EPS = 2.0**-24  # float32 unit roundoff


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of rows and of latents, rows that outgrow what is kept, and guesses, at small sizes."""
    monkeypatch.setattr(compress, "CHUNK_ROWS", 16)
    monkeypatch.setattr(compress, "CHUNK_LATENTS", 128)
    monkeypatch.setattr(compress, "KEPT", 16)
    monkeypatch.setattr(compress, "SMALL", 0)


def real(n: int, f: int, d: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(n + f + d)
    x, w, b = (torch.randn(*shape, generator=draw) for shape in ((n, d), (f, d), (f,)))
    return x.to(device), w.to(device), b.to(device)


def integers(n: int, f: int, d: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Products that are exact and often equal; about half of them are positive."""
    draw = torch.Generator().manual_seed(n + f + d)
    x, w, b = (torch.randint(-2, 3, shape, generator=draw).float() for shape in ((n, d), (f, d), (f,)))
    return x.to(device), w.to(device), b.to(device)


def exact(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, float]:
    """Pre-activations [N, F] in float64, and by how much a float32 one may be away from them."""
    x, w, b = (t.cpu().double() for t in (x, w, b))
    size = (x.abs() @ w.abs().T + b.abs()).max() if len(x) else torch.zeros(())
    return x @ w.T + b, 2 * (x.shape[1] + 1) * EPS * float(size)


def rows_of(offsets: Tensor) -> Tensor:
    counts = offsets.cpu().diff()
    return torch.arange(len(counts)).repeat_interleave(counts)


def assert_same(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for g, w, name in zip(got, want, ("values", "indices", "offsets"), strict=True):
        assert g.dtype == w.dtype and torch.equal(g.cpu(), w.cpu()), name


def assert_ordered(indices: Tensor, offsets: Tensor) -> None:
    rows, latents = rows_of(offsets), indices.cpu().long()
    assert ((rows.diff() > 0) | (latents.diff() > 0)).all()


@pytest.mark.parametrize(
    ("n", "k", "f", "d"), [(1, 1, 1, 1), (1, 3, 300, 5), (21, 5, 201, 19), (33, 2, 135, 70)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_keeps_its_largest_activations(triton_device, small_chunks, n, k, f, d, dtype):
    x, w, b = real(n, f, d, triton_device)
    x, w = x.to(dtype), w.to(dtype)
    values, indices, offsets = batch_topk_encode(x, w, b, k)
    assert values.dtype == torch.float32 and indices.dtype == torch.int32 and offsets.dtype == torch.int64
    assert values.shape == indices.shape == (n * k,) and offsets[0] == 0 and offsets[-1] == n * k
    assert_ordered(indices, offsets)
    pre, error = exact(x, w, b)
    acts = pre.relu()
    place = rows_of(offsets) * f + indices.cpu().long()
    assert (values.cpu() - acts.flatten()[place]).abs().max() <= error
    least = acts.flatten().topk(n * k).values[-1]
    assert acts.flatten()[place].min() >= least - error
    left = acts.flatten().index_fill(0, place, 0.0)
    assert left.max() <= least + error


@pytest.mark.parametrize("how", [{}, {"guess": 1e9}, {"guess": 0.0}, {"guess": 3.0}, {"room": 30}])
def test_a_batch_is_the_same_whatever_is_guessed_and_ties_go_to_the_smaller_place(
    triton_device, small_chunks, how
):
    tensors = integers(37, 301, 7, triton_device)
    want = reference.batch_topk_encode(*tensors, 3)
    least = want[0].min()
    assert (want[0] == least).sum() < (torch.relu(tensors[0] @ tensors[1].T + tensors[2]) == least).sum()
    assert_same(compress.batch_topk_encode(*tensors, 3, **how), want)


def test_a_wrong_guess_is_counted_and_a_good_one_is_not(triton_device, small_chunks):
    tensors = real(18, 300, 9, triton_device)
    counter = compress.fallback_batches(tensors[0].device)
    before = int(counter)
    good = compress.batch_topk_encode(*tensors, 4)
    assert int(counter) == before
    too_high = compress.batch_topk_encode(*tensors, 4, guess=float(good[0].max()))
    assert int(counter) == before + 1
    too_low = compress.batch_topk_encode(*tensors, 4, room=4 * 18 - 1)
    assert int(counter) == before + 2
    for other in (too_high, too_low):
        assert torch.equal(other[1], good[1]) and torch.equal(other[2], good[2])
        # The fallback multiplies in another order: 9 terms, of magnitude below 16, and the bias.
        assert (other[0] - good[0]).abs().max() <= 2 * 10 * 10 * 16 * EPS


def test_dense_latents_and_rows_with_many_activations_do_not_mislead_the_guess(triton_device, small_chunks):
    x, w, b = real(48, 640, 12, triton_device)
    b = b - 8
    b[[3, 200, 391]] = 300.0  # active in every row
    x[[5, 40]] *= 12.0  # with far more than k active latents
    counter = compress.fallback_batches(x.device)
    before = int(counter)
    _, indices, offsets = batch_topk_encode(x, w, b, 6)
    want = reference.batch_topk_encode(x, w, b, 6)
    assert int(counter) == before
    assert offsets.diff().max() > 60 and offsets.diff().min() == 3
    assert torch.equal(indices, want[1]) and torch.equal(offsets, want[2])
    assert (indices.bincount(minlength=640)[[3, 200, 391]] == 48).all()


def test_a_batch_without_enough_positive_activations_is_filled_with_empty_slots(triton_device, small_chunks):
    x, w, b = integers(20, 150, 4, triton_device)
    assert_same(batch_topk_encode(x, w, b - 100, 3), reference.batch_topk_encode(x, w, b - 100, 3))
    some = b - 8  # a few are left
    want = reference.batch_topk_encode(x, w, some, 3)
    assert 0 < (want[0] > 0).sum() < 60
    assert_same(batch_topk_encode(x, w, some, 3), want)


def test_all_latents_of_all_rows_may_be_asked_for(triton_device, small_chunks):
    tensors = integers(5, 33, 4, triton_device)
    assert_same(batch_topk_encode(*tensors, 33), reference.batch_topk_encode(*tensors, 33))


@pytest.mark.parametrize("how", [{}, {"guess": 1e9}])
def test_a_row_of_nan_takes_the_slots_it_can_and_shows(triton_device, small_chunks, how):
    x, w, b = integers(20, 40, 4, triton_device)
    x[7, 1] = torch.nan
    values, _, offsets = compress.batch_topk_encode(x, w, b, 3, **how)
    assert values[offsets[7] : offsets[8]].isnan().all() and offsets.diff()[7] == 40
    others = torch.cat([values[: offsets[7]], values[offsets[8] :]])
    want = torch.relu(x[torch.arange(20) != 7] @ w.T + b).flatten().topk(20).values
    assert torch.equal(others.sort(descending=True).values, want)


def thresholds(f: int, device: str) -> Tensor:
    return torch.randint(-3, 4, (f,), generator=torch.Generator().manual_seed(f)).float().to(device)


@pytest.mark.parametrize(("n", "f", "d"), [(1, 1, 1), (1, 300, 5), (19, 201, 7), (16, 128, 3)])
@pytest.mark.parametrize("per_latent", [False, True])
def test_what_is_above_its_threshold_is_kept_and_what_equals_it_is_not(
    triton_device, small_chunks, n, f, d, per_latent
):
    x, w, b = integers(n, f, d, triton_device)
    limit = thresholds(f, triton_device) if per_latent else torch.tensor(2.0, device=triton_device)
    got = threshold_encode(x, w, b, limit)
    assert_same(got, reference.threshold_encode(x, w, b, limit))
    assert_ordered(got[1], got[2])


def test_rows_that_hold_more_than_is_kept_at_first_are_filled_and_others_are_left(
    triton_device, small_chunks
):
    x, w, b = integers(50, 200, 6, triton_device)
    x[17], b[9] = 0.0, 3.0  # a row with the bias alone, and a latent that is active in every row
    x[35:] *= 100.0
    limit = torch.tensor(60.0, device=triton_device)
    b[9] = 2000.0
    want = reference.threshold_encode(x, w, b, limit)
    counts = want[2].diff()
    assert counts[:35].max() <= compress.KEPT < counts[35:].max() and counts.min() == 1
    assert_same(threshold_encode(x, w, b, limit), want)


def test_thresholds_of_real_numbers_are_compared_with_the_values_that_are_returned(triton_device):
    x, w, b = (t.bfloat16() for t in real(29, 333, 40, triton_device))
    pre, error = exact(x, w, b)
    limit = torch.rand(333, generator=torch.Generator().manual_seed(1)).to(triton_device) * 8
    values, indices, offsets = threshold_encode(x, w, b, limit)
    rows, latents = rows_of(offsets), indices.cpu().long()
    assert (values.cpu() > limit.cpu()[latents]).all()
    assert (values.cpu() - pre[rows, latents]).abs().max() <= error
    certain = pre > limit.cpu() + error
    found = torch.zeros_like(certain).index_put((rows, latents), torch.ones(len(rows), dtype=torch.bool))
    assert (found | ~certain).all()
    assert (pre[found] > limit.cpu().expand(29, 333)[found] - error).all()


def test_no_rows_give_no_slots(triton_device):
    x, w, b = real(1, 40, 6, triton_device)
    for values, indices, offsets in (
        batch_topk_encode(x[:0], w, b, 3),
        threshold_encode(x[:0], w, b, torch.zeros((), device=triton_device)),
    ):
        assert values.shape == indices.shape == (0,) and offsets.tolist() == [0]


def test_nothing_above_the_threshold_gives_empty_rows(triton_device):
    x, w, b = real(4, 40, 6, triton_device)
    values, indices, offsets = threshold_encode(x, w, b, torch.tensor(1e9, device=triton_device))
    assert len(values) == len(indices) == 0 and offsets.tolist() == [0] * 5


def test_strided_operands_are_read_where_they_lie(triton_device, small_chunks):
    x, w, b = integers(20, 96, 8, triton_device)
    strided = [torch.stack([t, t + 1], dim=-1)[..., 0] for t in (x, w, b)]
    assert not any(t.is_contiguous() for t in strided)
    for how in ({}, {"guess": 1e9}):
        got = compress.batch_topk_encode(*strided, 5, **how)
        assert_same(got, reference.batch_topk_encode(x, w, b, 5))
    limits = torch.stack([thresholds(96, triton_device)] * 2, dim=-1)[..., 0]
    assert_same(threshold_encode(*strided, limits), reference.threshold_encode(x, w, b, limits))


@pytest.mark.parametrize("how", [{}, {"guess": 1e9}])
def test_two_batches_give_the_same_bits(triton_device, small_chunks, how):
    tensors = real(20, 300, 9, triton_device)
    first, second = (compress.batch_topk_encode(*tensors, 4, **how) for _ in range(2))
    assert_same(first, second)


def test_gradients_are_those_of_the_reference(triton_device, small_chunks):
    n, f, d = 5, 70, 10
    tensors = real(n, f, d, triton_device)
    limit = torch.tensor(2.0, device=triton_device)

    def gradients(backend: str) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in tensors]
        with use_backend(backend):
            for values, indices, _ in (batch_topk_encode(*leaves, 3), threshold_encode(*leaves, limit)):
                (values * indices).sum().backward()
        return [leaf.grad for leaf in leaves]

    for got, want in zip(gradients("triton"), gradients("reference"), strict=True):
        assert (got - want).square().mean().sqrt() <= 4 * max(n, d) * EPS * want.square().mean().sqrt()
