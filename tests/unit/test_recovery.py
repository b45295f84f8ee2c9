"""Recovery of a known dictionary: hand-made scores, the truth of held-out rows, what training must reach."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sae_train.activations.topk import TopKConfig
from sae_train.cli.compose import compose
from sae_train.cli.main import main
from sae_train.cli.wire import HELDOUT, wire
from sae_train.codes import Codes
from sae_train.config import to_config
from sae_train.metrics import matching
from sae_train.metrics.matching import match
from sae_train.metrics.recovery import decoder_directions, recovery
from sae_train.sae.io import load_sae
from sae_train.sae.linear import LinearConfig, LinearSAE
from sae_train.shards.shard import PermutedShards
from sae_train.shards.synthetic import SyntheticConfig, SyntheticRows, Truth

T, D, R = 12, 16, 400
PERFECT = {"mmcs": 1, "above_0.9": 1, "rare": 1, "common": 1, "mcc": 1, "f1": 1, "duplicates": 0, "silent": 0}


def sparse(dense: Tensor) -> Codes:
    """[N, F] -> codes in slots; where a row has fewer latents than slots, the empty ones name latent 0."""
    values, indices = dense.topk(max(1, int((dense != 0).sum(dim=1).max())), dim=1)
    return Codes(values, torch.where(values == 0, 0, indices).int(), dense.shape[1])


def firing(rate: float = 0.3, rows: int = R, seed: int = 0) -> Tensor:
    """[rows, T] amplitudes, in which every feature is on somewhere; feature 0 is the commonest."""
    g = torch.Generator().manual_seed(seed)
    on = torch.rand(rows, T, generator=g) < rate * torch.linspace(1, 0.3, T)
    return on * (0.5 + torch.rand(rows, T, generator=g))


def orthogonal(dense: Tensor) -> Truth:
    return Truth(torch.eye(D)[:T], torch.linspace(0.3, 0.1, T, dtype=torch.float64), sparse(dense))


def scores(directions: Tensor, codes: Codes, truth: Truth) -> dict[str, float]:
    return {name.removeprefix("recovery/"): v for name, v in recovery(directions, [codes], truth).items()}


# ---- scores -------------------------------------------------------------------------------------


def test_the_true_dictionary_with_the_true_codes_is_recovered_whole():
    dense = firing()
    truth = orthogonal(dense)
    assert scores(truth.features, sparse(dense), truth) == PERFECT
    assert scores(truth.features, Codes(dense, None, T), truth) == PERFECT, "dense codes"


def test_the_order_of_latents_their_lengths_and_the_scale_of_codes_are_of_no_account():
    g = torch.Generator().manual_seed(1)
    dense = firing()
    truth = orthogonal(dense)
    directions = torch.randn(15, D, generator=g)
    directions[:T] += 3 * truth.features
    codes = torch.rand(R, 15, generator=g) * (torch.rand(R, 15, generator=g) < 0.3)
    want = scores(directions, sparse(codes), truth)
    assert 0.3 < want["mcc"] < 0.95 and 0.1 < want["f1"] < 0.9, "nothing is at its end"
    order = torch.randperm(15, generator=g)
    lengths = torch.logspace(-30, 30, 15)[:, None]
    changed = scores((lengths * directions)[order], sparse(1000 * codes[:, order]), truth)
    assert changed == pytest.approx(want, abs=1e-6)


def test_the_opposite_of_a_feature_does_not_recover_it():
    dense = firing()
    truth = orthogonal(dense)
    half = torch.where(torch.arange(T) < T // 2, 1.0, -1.0)[:, None]
    found = scores(truth.features * half, sparse(dense), truth)
    assert (found["above_0.9"], found["mmcs"], found["mcc"]) == (0.5, 0.5, 0.5)
    assert (found["common"], found["rare"]) == (1, 0)


def test_features_that_no_latent_is_left_for_count_as_nothing():
    dense = firing()
    truth = orthogonal(dense)
    few = scores(truth.features[: T // 2], sparse(dense[:, : T // 2]), truth)
    wanted = {"mmcs": 0.5, "above_0.9": 0.5, "rare": 0, "common": 1, "mcc": 0.5, "f1": 0.5}
    assert few == pytest.approx(wanted | {"duplicates": 0, "silent": 0})


def test_half_as_many_directions_between_two_features_are_no_recovery():
    # One latent for each pair: cosine 1/sqrt(2) with both; it fires when either does.
    truth = orthogonal(firing())
    pairs = truth.features[0::2] + truth.features[1::2]
    dense = truth.codes.dense()
    found = scores(pairs, sparse(dense[:, 0::2] + dense[:, 1::2]), truth)
    assert found["mmcs"] == pytest.approx(0.5**0.5) and found["above_0.9"] == 0
    assert found["mcc"] == pytest.approx(0.5 * 0.5**0.5), "one of each pair has no latent left"


def test_duplicates_are_latents_that_fire_and_whose_feature_another_one_is_nearer_to():
    dense = firing()
    truth = orthogonal(dense)
    lean = torch.eye(D)[T:][:1]  # away from every feature
    third = T // 3
    directions = torch.cat([truth.features, truth.features[:third] + 0.2 * lean])
    first = torch.arange(R)[:, None] % 2 == 0
    codes = torch.cat([dense, 0 * dense[:, :third]], dim=1)
    found = scores(directions, sparse(codes), truth)
    assert found == pytest.approx(PERFECT), "copies that never fire are dead latents, not duplicates"
    codes[:, T:] = torch.where(first, dense[:, :third], 0)
    codes[:, :third] = torch.where(first, 0, dense[:, :third])
    found = scores(directions, sparse(codes), truth)
    assert found["duplicates"] == pytest.approx(third / (T + third))
    assert (found["mcc"], found["above_0.9"]) == (pytest.approx(1), 1)
    assert found["f1"] < 1, "half of the rows of a split feature are found by the other latent"
    assert scores(directions[T:], sparse(codes[:, T:]), truth)["duplicates"] == 0


def test_f1_is_precision_and_recall_of_the_matched_latent():
    on = torch.zeros(10, T)
    on[:4, 0] = 1.0  # fires in rows 0-3; its latent in rows 2-7: 2 of 6 right, 2 of 4 found
    on[:5, 1:] = 1.0
    codes = on.clone()
    codes[:, 0] = 0
    codes[2:8, 0] = 3.0
    truth = orthogonal(on)
    precision, recall = 2 / 6, 2 / 4
    f1 = 2 * precision * recall / (precision + recall)
    assert scores(truth.features, sparse(codes), truth)["f1"] == pytest.approx((f1 + T - 1) / T)


def test_an_empty_slot_is_no_firing_and_hides_none():
    truth = orthogonal(torch.eye(T))  # row i: feature i
    slots = torch.arange(T, dtype=torch.int32)[:, None]
    values = torch.tensor([[2.0, 0.0]]).expand(T, 2)
    for empty in (slots, slots.roll(1)):  # the empty slot names the latent that fires, or another one
        codes = Codes(values, torch.cat([slots, empty], dim=1), T)
        assert scores(truth.features, codes, truth)["f1"] == 1
    truth.codes.values[3] = 0
    assert scores(truth.features, Codes(values, torch.cat([slots, slots], dim=1), T), truth)["silent"] == 1


def test_rare_and_common_go_by_frequency_and_not_by_place():
    dense = firing()
    frequencies = torch.linspace(0.1, 0.3, T, dtype=torch.float64)  # the last is the commonest
    frequencies[[0, 11]] = frequencies[[11, 0]]
    truth = Truth(torch.eye(D)[:T], frequencies, sparse(dense))
    directions = truth.features.clone()
    directions[[0, 8, 9]] = 0
    found = scores(directions, sparse(dense), truth)
    assert (found["common"], found["rare"]) == (0.25, 1), "of the commonest, 0 8 9 10, the last is left"
    directions[11] = 0
    assert scores(directions, sparse(dense), truth)["rare"] == 0.75, "the rarest are 11 1 2 3"


def test_features_that_are_never_on_are_left_out_of_f1_and_counted():
    dense = firing()
    dense[:, 2:5] = 0
    truth = orthogonal(dense)
    assert scores(truth.features, sparse(dense), truth) == PERFECT | {"silent": 3}
    codes = dense.clone()
    codes[:, 3] = 1.0
    assert scores(truth.features, sparse(codes), truth)["f1"] == 1, "nothing is known of a silent feature"


@pytest.mark.parametrize("latents", [1, 5, T, 40])
@pytest.mark.parametrize("kind", ["zero rows", "no codes", "not finite", "silent truth", "one feature"])
def test_every_score_is_a_share_whatever_is_dead_or_missing(kind, latents):
    g = torch.Generator().manual_seed(2)
    truth = orthogonal(firing() * (kind != "silent truth"))
    if kind == "one feature":
        truth = Truth(truth.features[:1], truth.frequencies[:1], sparse(firing()[:, :1]))
    directions = torch.randn(latents, D, generator=g)
    codes = torch.rand(R, latents, generator=g) * (torch.rand(R, latents, generator=g) < 0.2)
    if kind == "zero rows":
        directions.zero_()
    if kind == "no codes":
        codes.zero_()
    if kind == "not finite":
        directions[0] = math.nan
        directions[latents // 2, 3] = math.inf
    found = scores(directions, sparse(codes), truth)
    assert found.keys() == PERFECT.keys()
    assert all(-1 <= found[name] <= 1 for name in found if name != "silent"), found
    if kind == "zero rows":
        assert (found["mmcs"], found["mcc"], found["duplicates"]) == (0, 0, 0)
    if kind in ("no codes", "silent truth"):
        assert found["f1"] == 0
    assert found["silent"] == (T if kind == "silent truth" else 0)


def test_batches_add_up_and_more_rows_than_are_known_are_refused():
    g = torch.Generator().manual_seed(3)
    dense = firing()
    truth = orthogonal(dense)
    codes = Codes(dense * (torch.rand(R, T, generator=g) < 0.7), None, T)
    directions = truth.features + 0.1 * torch.randn(T, D, generator=g)
    parts = [Codes(values, None, T) for values in codes.values.split([100, 1, 299])]
    assert recovery(directions, parts, truth) == recovery(directions, [codes], truth)
    with pytest.raises(AssertionError, match="401 rows, 400 known"):
        recovery(directions, [codes, Codes(dense[:1], None, T)], truth)


# ---- matching -----------------------------------------------------------------------------------


def total(score: Tensor, column_of: Tensor) -> float:
    """The sum of a matching's scores, after a check that it is one."""
    pairs = (column_of >= 0).nonzero().flatten()
    assert len(pairs) == min(score.shape) and len(column_of[pairs].unique()) == len(pairs)
    assert len(column_of) == len(score) and int(column_of.max()) < score.shape[1]
    return float(score[pairs, column_of[pairs]].sum())


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (4, 4), (3, 6), (6, 3), (6, 6), (1, 5)])
@pytest.mark.parametrize("ties", [True, False])
def test_the_matching_is_the_best_of_all(shape, ties):
    g = torch.Generator().manual_seed(0)
    for _ in range(30):
        score = torch.rand(shape, generator=g, dtype=torch.float64) - 0.3
        score = (4 * score).round() if ties else score
        few, many = sorted(shape)
        wide = score if shape == (few, many) else score.T
        best = max(float(wide[range(few), p].sum()) for p in itertools.permutations(range(many), few))
        assert total(score, match(score)) == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("kind", ["noise", "crowded"])
def test_no_exchange_improves_a_large_matching(kind):
    # Optimal if and only if no chain of rows, each taking the column of the next, ends with a gain: at its
    # own start or at a free column. Shortest paths between all pairs find the best chain.
    g = torch.Generator().manual_seed(1)
    score = torch.rand(90, 120, generator=g, dtype=torch.float64)
    if kind == "crowded":  # most rows want the same columns
        score += torch.linspace(0, 2, 120)
    column_of = match(score)
    assert total(score, column_of) > 0
    own = score.gather(1, column_of[:, None])
    free = torch.ones(120, dtype=torch.bool).index_fill(0, column_of, False)
    cost = torch.zeros(91, 91, dtype=torch.float64)  # place 90: the free columns
    cost[:90, :90] = own - score[:, column_of]
    cost[:90, 90] = own[:, 0] - score[:, free].amax(dim=1)
    for via in range(91):
        cost = torch.minimum(cost, cost[:, via, None] + cost[via])
    assert cost.diagonal().min() > -1e-9


def test_beyond_its_bound_the_matching_takes_the_best_pair_that_is_left(monkeypatch):
    g = torch.Generator().manual_seed(2)
    monkeypatch.setattr(matching, "MAX_EXACT", 0)
    for shape in ((20, 30), (30, 20), (20, 20)):
        score = torch.rand(shape, generator=g, dtype=torch.float64)
        left, wanted = score.clone(), 0.0
        for _ in range(20):
            wanted += float(left.max())
            row, column = divmod(int(left.argmax()), shape[1])
            left[row], left[:, column] = -1, -1
        assert total(score, match(score)) == pytest.approx(wanted)
    assert total(torch.zeros(5, 5), match(torch.zeros(5, 5))) == 0


# ---- truth --------------------------------------------------------------------------------------


def test_the_truth_belongs_to_every_held_out_row_of_a_run_in_its_order():
    overrides = [
        "source=synthetic",
        "source.synthetic={d: 24, features: 60, groups: 6, group_size: 8, l0: 3, rows: 20_070}",
        "source.holdout=0.1",  # 2,007 rows in shards of 768, 768 and 471; the last drops 7 of them
        "source.shard_tokens=768",
        "source.seed=3",
        "eval.tokens=1950",
    ]
    config = to_config(compose("train", overrides))
    source = config.source
    wired = wire(config, ["auto"], torch.device("cpu"), {}, lambda dims: None)
    try:
        (rows,) = wired.heldout().rows.values()
        producer = SyntheticRows(
            source.synthetic, 768, source.lanes, seed=3, holdout=source.holdout, split=HELDOUT
        )
        truth = producer.truth_along(wired.heldout_shards(), config.eval.tokens)
    finally:
        wired.source.close()
    assert len(rows) == len(truth.codes.values) == 1950
    off = (rows - producer.bias - truth.codes.decode(truth.features)).abs().amax(dim=1)
    # 6 sigma of 46,800 draws: none in ten thousand such sets. The nearest other row is further away.
    assert off.max() < 6 * source.synthetic.noise
    shifted = rows.roll(1, 0) - producer.bias - truth.codes.decode(truth.features)
    assert (shifted.abs().amax(dim=1) > 6 * source.synthetic.noise).double().mean() > 0.95


def test_the_truth_is_a_function_of_the_ids_alone():
    rows = SyntheticRows(SyntheticConfig(d=8, features=20, groups=2, group_size=4, l0=2, rows=900), 400, 4)
    ids = torch.randperm(900, generator=torch.Generator().manual_seed(0))
    truth = rows.truth(ids)
    whole = torch.cat([rows.make(shard, count)[1] for shard, count in ((0, 400), (1, 400), (2, 100))])
    assert torch.equal(truth.codes.dense(), whole[ids])
    assert torch.equal(rows.truth(ids[5:7]).codes.dense(), whole[ids[5:7]])
    assert torch.equal(truth.features, rows.features) and torch.equal(truth.frequencies, rows.frequencies)
    with pytest.raises(AssertionError):
        rows.truth(torch.tensor([900]))


def test_directions_are_decoder_rows_whatever_bias_and_scale():
    sae = LinearSAE(LinearConfig(d_sae=40, activation=TopKConfig(k=3)), D)
    g = torch.Generator().manual_seed(0)
    sae.initialise(5 + torch.randn(200, D, generator=g), g)
    with torch.no_grad():
        sae.w_dec[7] = 0
        directions = decoder_directions(sae)
        assert torch.equal(directions[7], torch.zeros(D))
        alive = torch.arange(40) != 7
        cosine = torch.cosine_similarity(directions, sae.w_dec)[alive]
    assert (cosine > 1 - 1e-5).all() and not torch.allclose(directions, sae.w_dec)


# ---- what training must reach -------------------------------------------------------------------


def test_a_short_training_recovers_most_of_a_dictionary(tmp_path: Path, no_pictures: None):
    """96 features in 32 dimensions, 150,016 rows, 293 steps; about 10 s of one core.

    A mean vector of norm 20 makes centring matter, and a high learning rate makes AuxK matter. Seeds 0 to 3
    of dictionary, rows and weights, measured on 2026-11-21:

                                  mcc             f1              rare third      dead
        as it should be           0.906 to 0.927  0.616 to 0.650  66 to 75 %      3 to 4 %
        without AuxK              0.796 to 0.828  0.484 to 0.525  28 to 41 %      17 to 22 %
        b_dec starts at zero      0.42            0.01            0 %             87 %
    """
    run = tmp_path / "run"
    arguments = [
        "train",
        "source=synthetic",
        "source.synthetic={d: 32, features: 96, groups: 12, group_size: 8, l0: 3, bias: 20, rows: 160_000}",
        "source.holdout=0.05",
        "source.shard_tokens=16384",
        "sae.d_sae=96",
        "sae.activation.k=3",
        "optim.lr=2.6e-2",
        "train.tokens=150_016",
        "train.batch_tokens=512",
        "train.autocast=float32",
        "eval.every=0",
        "run.threads=1",
        f"run.dir={run}",
    ]
    assert main(arguments) == 0
    source = to_config(compose("train", arguments[1:])).source
    rows = SyntheticRows(source.synthetic, source.shard_tokens, source.lanes, holdout=0.05, split=HELDOUT)
    order = PermutedShards(rows, source.seed, source.lanes)
    heldout = order.next_shard()
    order.seek(heldout.cursor)
    truth = rows.truth_along(order, 8000)
    sae = load_sae(run / "saes/main")
    batches = (sae.encode(x) for x in heldout.rows["synthetic"].split(2048))
    found = {
        name.removeprefix("recovery/"): v
        for name, v in recovery(decoder_directions(sae), batches, truth).items()
    }
    assert found["mcc"] > 0.87 and found["above_0.9"] > 0.78, found
    assert found["f1"] > 0.57 and found["rare"] > 0.5 and found["common"] > 0.9, found
    assert found["duplicates"] < 0.15 and found["silent"] == 0, found
