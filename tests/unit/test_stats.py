"""Feature statistics count exactly, whatever the order, and survive a save."""

import pytest
import torch
from safetensors.torch import load_file

from sae_train.codes import Codes
from sae_train.stats import FIXED_POINT, FeatureStats, write_features

F = 11


def random_codes(n: int, seed: int, k: int = 4) -> Codes:
    g = torch.Generator().manual_seed(seed)
    indices = torch.rand(n, F, generator=g).argsort(dim=-1)[:, :k].int()
    values = torch.rand(n, k, generator=g) * (torch.rand(n, k, generator=g) > 0.3)
    return Codes(values, indices, F)


def test_counts_means_and_maxima_are_those_of_the_dense_codes():
    codes = random_codes(100, 0)
    stats = FeatureStats(F)
    stats.update(codes)
    dense = codes.dense()
    assert torch.equal(stats.counts, (dense > 0).sum(dim=0))
    assert torch.equal(stats.maxima, dense.amax(dim=0))
    mean = dense.double().sum(dim=0) / (dense > 0).sum(dim=0)
    # each of at most 100 terms is rounded to the fixed-point grid
    assert (stats.mean_activation() - mean).abs().max() <= 0.5 / FIXED_POINT + 1e-12


def test_dense_and_sparse_codes_give_the_same_statistics():
    codes = random_codes(50, 1)
    sparse, dense = FeatureStats(F), FeatureStats(F)
    sparse.update(codes)
    dense.update(Codes(codes.dense(), None, F))
    for name in ("counts", "sums", "maxima", "last_fired"):
        assert torch.equal(getattr(sparse, name), getattr(dense, name)), name


def test_merging_two_halves_equals_the_whole():
    whole, left, right = FeatureStats(F), FeatureStats(F), FeatureStats(F)
    for seed in range(4):
        whole.update(random_codes(30, seed))
        (left if seed < 2 else right).update(random_codes(30, seed))
    left.merge(right)
    assert left.tokens == whole.tokens
    for name in ("counts", "sums", "maxima"):
        assert torch.equal(getattr(left, name), getattr(whole, name)), name


def test_a_latent_is_dead_after_more_than_the_given_tokens_without_firing():
    stats = FeatureStats(2)
    only_first = Codes(torch.ones(10, 1), torch.zeros(10, 1, dtype=torch.int32), 2)
    stats.update(only_first)
    assert stats.dead(9).tolist() == [False, True]
    assert stats.dead(10).tolist() == [False, False]
    empty = Codes(torch.zeros(10, 1), torch.ones(10, 1, dtype=torch.int32), 2)
    stats.update(empty)
    assert stats.dead(9).tolist() == [True, True]


@pytest.mark.parametrize("start", [2**24, 2**31])
def test_counters_stay_exact_past_the_limits_of_floats_and_int32(start):
    stats = FeatureStats(2)
    stats.counts.fill_(start)
    stats.update(Codes(torch.ones(3, 1), torch.zeros(3, 1, dtype=torch.int32), 2))
    assert stats.counts.tolist() == [start + 3, start]


def test_state_round_trip_is_exact_and_other_shapes_are_refused():
    stats, copy = FeatureStats(F), FeatureStats(F)
    stats.update(random_codes(20, 3))
    copy.load_state_dict(stats.state_dict())
    assert copy.tokens == 20 and torch.equal(copy.last_fired, stats.last_fired)
    with pytest.raises(ValueError, match="counts"):
        FeatureStats(F + 1).load_state_dict(stats.state_dict())


def test_the_features_file_holds_both_passes_in_the_units_of_the_published_codes(tmp_path):
    train, heldout = FeatureStats(F), FeatureStats(F)
    train.update(random_codes(64, 5))
    heldout.update(random_codes(16, 6))
    write_features(tmp_path / "features.safetensors", train, heldout, input_scale=4.0, dead_after_tokens=10)
    saved = load_file(tmp_path / "features.safetensors")
    assert saved["train_counts"].dtype == torch.int64
    assert torch.equal(saved["train_counts"], train.counts)
    assert torch.equal(saved["heldout_counts"], heldout.counts)
    assert torch.equal(saved["train_max"], train.maxima / 4)
    assert torch.equal(saved["dense"], (train.density() > 0.1).nonzero().flatten())
    assert torch.equal(saved["dead"], train.dead(10).nonzero().flatten())
