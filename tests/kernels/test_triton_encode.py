"""Exact selection and encoder E1 in Triton: whatever the guess, the k largest; and the fallback is counted.

The truth is a float64 product of the very operands. A float32 sum of d terms and a bias drifts from it by
at most (d + 1) * EPS times the sum of magnitudes, so two latents may change places only where their exact
pre-activations are closer than twice that.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", exc_type=ImportError)

import triton
import triton.language as tl
from sae_kernels import topk_encode, use_backend
from sae_kernels.triton import encode
from sae_kernels.triton.encode import topk_encode_chunked
from sae_kernels.triton.select import MAX_K, fallback_rows, merge, pack, plan, row_threshold, unpack

EPS = 2.0**-24  # float32 unit roundoff
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def fallbacks() -> int:
    return sum(int(count) for count in fallback_rows().values())


class Counted:
    """Rows that took the fallback within a `with` block."""

    def __enter__(self) -> "Counted":
        self.before = fallbacks()
        return self

    def __exit__(self, *error: object) -> None:
        self.rows = fallbacks() - self.before


def make_encoder(n: int, f: int, d: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(n + f + d)
    x, w, b = (torch.randn(*shape, generator=draw) for shape in ((n, d), (f, d), (f,)))
    return x.to(DEVICE, dtype), w.to(DEVICE, dtype), b.to(DEVICE)


def assert_exact(x: Tensor, w: Tensor, b: Tensor, values: Tensor, indices: Tensor) -> None:
    """Codes are the k largest of float64, in order, but for what float32 cannot tell apart."""
    (_, d), k = x.shape, values.shape[1]
    x, w, b = x.double(), w.double(), b.double()
    pre, drift = x @ w.T + b, (d + 1) * EPS * (x.abs() @ w.abs().T + b.abs())
    assert ((indices >= 0) & (indices < len(w))).all()
    assert (indices.sort(dim=1).values.diff(dim=1) != 0).all(), "an index twice in a row"
    chosen, slack = pre.gather(1, indices.long()), drift.gather(1, indices.long())
    assert ((values - chosen.relu()).abs() <= slack).all()
    assert (values.diff(dim=1) <= 0).all(), "slots are not in order"
    # Nothing left out is larger than anything chosen by more than both may have drifted.
    left_out = torch.where(torch.zeros_like(pre).scatter(1, indices.long(), 1.0) > 0, -torch.inf, pre - drift)
    assert (left_out.amax(dim=1) <= (chosen + slack).amin(dim=1)).all()
    assert values.shape == indices.shape == (len(x), k)


@triton.jit
def pack_and_unpack(scores, indices, keys, scores_again, indices_again, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    key = pack(tl.load(scores + at), tl.load(indices + at))
    score, index = unpack(key)
    tl.store(keys + at, key)
    tl.store(scores_again + at, score)
    tl.store(indices_again + at, index)


def packed(scores: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    keys = torch.empty_like(indices, dtype=torch.int64)
    again = torch.empty_like(scores), torch.empty_like(indices)
    pack_and_unpack[(1,)](scores, indices, keys, *again, SIZE=len(scores))
    return keys, *again


def test_keys_order_by_score_and_then_by_smaller_index_with_nan_on_top():
    inf, nan, tiny = torch.inf, torch.nan, 1e-45
    descending = [nan, nan, inf, 3e38, 1.0, 1.0, tiny, 0.0, -0.0, -tiny, -1.0, -1.0, -3e38, -inf, -inf, -inf]
    indices = [0, 7, 1, 2, 3, 2**31 - 1, 5, 1, 2, 0, 6, 7, 0, 1, 2, 2**31 - 1]
    scores = torch.tensor(descending, device=DEVICE)
    scores[1] = -scores[1]  # NaN of either sign
    index = torch.tensor(indices, dtype=torch.int32, device=DEVICE)
    keys, scores_again, indices_again = packed(scores, index)
    assert (keys.diff() < 0).all()
    assert torch.equal(indices_again, index)
    assert torch.equal(scores_again.nan_to_num(9.0), scores.nan_to_num(9.0))


@pytest.mark.parametrize(("width", "rank"), [(1, 1), (37, 1), (37, 5), (37, 37), (1500, 12)])
def test_the_guess_is_the_rank_th_largest_of_the_sample_rounded_down(width, rank):
    draw = torch.Generator().manual_seed(width)
    sample = torch.randn(3, width + 3, generator=draw).to(DEVICE)[:, :width]
    bias = torch.randn(width, generator=draw).to(DEVICE)
    want = (sample + bias).topk(rank).values[:, -1]
    got = row_threshold(sample, rank, bias)
    assert (got <= want).all()
    assert (got >= want - want.abs() * 2.0**-7).all()  # 8 bits of the significand are kept


def test_a_sample_with_too_few_scores_makes_everything_a_candidate():
    assert row_threshold(torch.ones(2, 3, device=DEVICE), 4, torch.zeros(3, device=DEVICE)).isnan().all()


def test_merge_takes_the_largest_keys_and_reports_rows_with_too_few_or_too_many():
    draw = torch.Generator().manual_seed(1)
    capacity, k = 512, 7
    scores = torch.randn(5, capacity, generator=draw).sub(1.0)
    scores[3] = -scores[3].abs()  # nothing is positive
    scores[:, ::3] = 0.5  # ties at the k-th place
    index = torch.stack([torch.randperm(capacity, generator=draw) for _ in range(5)]).int()
    keys, _, _ = packed(
        scores.flatten()[: 4 * capacity].to(DEVICE), index.flatten()[: 4 * capacity].to(DEVICE)
    )
    keys = torch.cat([keys, keys[:capacity]]).view(5, capacity)
    counts = torch.tensor([capacity, 300, k - 1, k, capacity + 1], dtype=torch.int32, device=DEVICE)
    values, indices, failed = merge(keys, counts, k)
    assert failed.tolist() == [0, 0, 1, 0, 1]
    for row in (0, 1, 3):
        found = sorted(
            zip((-scores[row]).tolist(), index[row].tolist(), strict=True)
            if counts[row] == capacity
            else list(zip((-scores[row]).tolist(), index[row].tolist(), strict=True))[: counts[row]]
        )[:k]
        assert indices[row].tolist() == [latent for _, latent in found]
        assert values[row].tolist() == [max(0.0, -negative) for negative, _ in found]


@pytest.mark.parametrize(
    ("n", "f", "d", "k"),
    [
        (1, 1, 1, 1),
        (9, 24, 16, 24),
        (5, 700, 70, 1),
        (33, 1501, 17, 17),
        (3, 600, 5, 600 - 88),
        (7, 700, 3, 13),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_are_the_k_largest_of_float64(n, f, d, k, dtype):
    x, w, b = make_encoder(n, f, d, dtype)
    assert_exact(x, w, b, *topk_encode_chunked(x, w, b, k))


def test_blocks_of_rows_and_chunks_of_latents_change_nothing_but_rounding(monkeypatch):
    x, w, b = make_encoder(23, 1501, 17)
    whole = topk_encode_chunked(x, w, b, 9)
    monkeypatch.setattr(encode, "BLOCK_ROWS", 8)
    monkeypatch.setattr(encode, "CHUNK_LATENTS", 100)
    values, indices = topk_encode_chunked(x, w, b, 9)
    assert_exact(x, w, b, values, indices)
    assert (values - whole[0]).abs().max() <= 2 * 18 * EPS * float((x.abs() @ w.abs().T + b.abs()).max())


@pytest.mark.parametrize("level", [-torch.inf, torch.nan, torch.inf])
def test_a_wrong_guess_costs_the_fallback_and_not_the_result(level):
    x, w, b = make_encoder(19, 900, 20)
    guess = torch.full((19,), level, device=DEVICE)
    with Counted() as counted:
        codes = topk_encode_chunked(x, w, b, 11, guess)
    assert counted.rows == 19
    assert_exact(x, w, b, *codes)


def test_only_the_rows_with_a_wrong_guess_take_the_fallback():
    x, w, b = make_encoder(20, 1501, 20, torch.bfloat16)
    kth = (x.float() @ w.float().T + b).topk(30).values[:, -1]
    guess = kth.clone()
    guess[[3, 18]], guess[[0, 19]] = torch.inf, -torch.inf
    with Counted() as counted:
        values, indices = topk_encode_chunked(x, w, b, 30, guess - 0.01)
    assert counted.rows == 4
    assert_exact(x, w, b, values, indices)
    with Counted() as counted:
        by_guess, same = topk_encode_chunked(x, w, b, 30)
    assert counted.rows == 0
    kept = [row for row in range(20) if row not in (0, 3, 18, 19)]
    assert torch.equal(values[kept], by_guess[kept])
    assert torch.equal(indices[kept], same[kept])


def test_the_fallback_takes_many_slots_and_scores_that_only_rise():
    """Every step replaces all that was kept before, and a row's codes span many of its buffers."""
    d, f, k = 2, 1400, 300
    x = torch.ones(2, d, device=DEVICE)
    w = torch.arange(f, device=DEVICE, dtype=torch.float32).unsqueeze(1).expand(f, d) / 4 - 100.0
    with Counted() as counted:
        values, indices = topk_encode_chunked(x, w, torch.zeros(f, device=DEVICE), k, x[:, 0] * torch.inf)
    assert counted.rows == 2
    assert indices.tolist() == [list(range(f - 1, f - 1 - k, -1))] * 2  # all of it is exact in float32
    assert torch.equal(values, (w.sum(dim=1)[indices.long()]).relu())


def test_rows_that_are_equal_everywhere_give_the_smallest_indices():
    x, w, b = make_encoder(18, 1501, 6)
    x[[0, 5, 17]] = 0.0  # every pre-activation is a tie, more of them than there are places for candidates
    with Counted() as counted:
        values, indices = topk_encode_chunked(x, w, torch.full_like(b, 0.25), 12)
    assert counted.rows == 3
    for row in (0, 5, 17):
        assert indices[row].tolist() == list(range(12))
        assert values[row].tolist() == [0.25] * 12
    assert_exact(x, w, torch.full_like(b, 0.25), values, indices)


@pytest.mark.parametrize("guess", [None, torch.inf])
def test_ties_at_the_last_place_go_to_the_smaller_index(guess):
    draw = torch.Generator().manual_seed(2)
    # Small integers: sums are exact in any order, and many are equal.
    x, w = (torch.randint(-2, 3, shape, generator=draw).float().to(DEVICE) for shape in ((9, 3), (700, 3)))
    bad = None if guess is None else torch.full((9,), guess, device=DEVICE)
    values, indices = topk_encode_chunked(x, w, torch.zeros(700, device=DEVICE), 20, bad)
    want = (x @ w.T).sort(dim=1, descending=True, stable=True)
    assert torch.equal(indices, want.indices[:, :20].int())
    assert torch.equal(values, want.values[:, :20].relu())


def test_rows_of_only_negative_or_of_huge_scores_are_exact():
    x, w, b = make_encoder(6, 900, 8)
    x[2] *= 1e30
    b = b - 20.0
    values, indices = topk_encode_chunked(x, w, b, 6)
    assert (values[[0, 1, 3, 4, 5]] == 0).all()
    assert (values[2] > 1e29).all()
    assert_exact(x, w, b, values, indices)


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # said of NaN by the interpreter's NumPy
@pytest.mark.parametrize("guess", [None, torch.inf])
def test_numbers_that_are_not_finite_show_in_their_own_rows_only(guess):
    x, w, b = make_encoder(5, 700, 6)
    bad = None if guess is None else torch.full((5,), guess, device=DEVICE)
    clean = topk_encode_chunked(x, w, b, 4, bad)
    x[1, 0] = torch.nan
    x[3, 2] = torch.inf
    values, indices = topk_encode_chunked(x, w, b, 4, bad)
    assert values[1].isnan().all()
    assert (values[3] == torch.inf).all()
    for got, want in ((values, clean[0]), (indices, clean[1])):
        assert torch.equal(got[[0, 2, 4]], want[[0, 2, 4]])


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("guess", [None, torch.inf])
def test_a_latent_that_is_nan_takes_the_first_slot_of_every_row(guess):
    x, w, b = make_encoder(3, 700, 6)
    bad = None if guess is None else torch.full((3,), guess, device=DEVICE)
    clean, others = topk_encode_chunked(x, w, b, 4, bad)
    free = next(latent for latent in range(700) if latent not in others)
    w[free, 1] = torch.nan
    values, indices = topk_encode_chunked(x, w, b, 4, bad)
    assert values[:, 0].isnan().all()
    assert (indices[:, 0] == free).all()
    assert torch.equal(values[:, 1:], clean[:, :3])
    assert torch.equal(indices[:, 1:], others[:, :3])


@pytest.mark.parametrize("guess", [None, torch.inf])
def test_two_runs_give_the_same_bits_and_strides_do_not_matter(guess):
    x, w, b = make_encoder(5, 700, 20)
    bad = None if guess is None else torch.full((5,), guess, device=DEVICE)
    first = topk_encode_chunked(x, w, b, 10, bad)
    strided = (torch.stack([t, t + 1], dim=-1)[..., 0] for t in (x, w, b))
    for one, other in zip(first, topk_encode_chunked(*strided, 10, bad), strict=True):
        assert torch.equal(one, other)


def test_no_rows_give_no_codes_and_no_width_gives_the_bias():
    x, w, b = make_encoder(3, 700, 6)
    values, indices = topk_encode_chunked(x[:0], w, b, 5)
    assert values.shape == indices.shape == (0, 5)
    values, indices = topk_encode_chunked(x[:, :0], w[:, :0], b, 5)
    assert torch.equal(values, b.topk(5).values.expand(3, 5))


@pytest.fixture
def triton_in_force() -> Iterator[None]:
    with use_backend("triton"):
        yield


@pytest.mark.usefixtures("triton_in_force")
def test_more_slots_than_a_list_of_candidates_serves_are_encoded_too():
    x, w, b = make_encoder(4, 800, 8)
    values, indices = topk_encode(x, w, b, MAX_K + 1)
    values, order = values.sort(dim=1, descending=True)
    positive = int((values > 0).sum(dim=1).min())
    assert_exact(x, w, b, values[:, :positive], indices.gather(1, order)[:, :positive])


@pytest.mark.parametrize(
    ("k", "f"), [(32, 24576), (64, 65536), (64, 131072), (64, 1 << 20), (192, 65536), (1, 300)]
)
def test_the_plan_fails_a_row_in_less_than_one_of_ten_thousand_random_ones(k, f):
    """Which of the largest are sampled, drawn many times: few rows may fail, and few candidates come."""
    how = plan(k, f)
    draw = torch.Generator().manual_seed(k)
    trials, top = 10_000, min(f, 2 * how.capacity)
    sampled = torch.rand(trials, top, generator=draw) < 1 / how.stripes
    candidates = (sampled.cumsum(dim=1) < how.rank).sum(dim=1) + 1  # up to the rank-th that is in the sample
    assert ((candidates < k) | (candidates > how.capacity)).sum() <= 1
    assert candidates.double().mean() <= max(1.1 * how.rank * how.stripes, k)
    assert f // how.stripes <= 16384  # what `row_threshold` holds
