"""Held-out metrics: known values on hand-made cases, and merge equals update on everything."""

import weakref
from types import SimpleNamespace

import pytest
import torch

from sae_train.activations.topk import TopKConfig
from sae_train.codes import Codes
from sae_train.errors import InputError
from sae_train.evaluate import EvalConfig, HeldOut, build_metrics, collect, evaluate, ordinary_rows
from sae_train.metrics.base import METRICS, EvalBatch, MetricConfig
from sae_train.metrics.twins import twins
from sae_train.places import Places
from sae_train.registry import discover
from sae_train.sae.linear import LinearConfig, LinearSAE
from sae_train.sae.matryoshka import MatryoshkaConfig, MatryoshkaSAE
from sae_train.shards.synthetic import Truth
from sae_train.train.members import judged_together

discover("sae_train.metrics")
D, F = 5, 9


def batch(n: int, seed: int) -> EvalBatch:
    g = torch.Generator().manual_seed(seed)
    y = torch.randn(n, D, generator=g) + 2
    y_hat = y + 0.3 * torch.randn(n, D, generator=g)
    indices = torch.rand(n, F, generator=g).argsort(dim=-1)[:, :3].int()
    values = torch.rand(n, 3, generator=g) * (torch.rand(n, 3, generator=g) > 0.2)
    return EvalBatch(y, y_hat, Codes(values, indices, F), torch.rand(n, generator=g) > 0.1)


@pytest.mark.parametrize("name", list(METRICS))
def test_merging_parts_equals_updating_with_everything(name):
    whole, left, right = (METRICS.build(MetricConfig(name), D, F) for _ in range(3))
    for seed in range(4):
        whole.update(batch(20, seed))
        (left if seed < 2 else right).update(batch(20, seed))
    left.merge(right)
    assert left.compute() == pytest.approx(whole.compute(), rel=1e-12)


def test_fvu_is_over_the_mean_of_the_whole_set_not_of_the_batch():
    metric = METRICS.build(MetricConfig("fvu"), 1, F)
    codes = Codes(torch.zeros(2, 1), torch.zeros(2, 1, dtype=torch.int32), F)
    plain = torch.ones(2, dtype=torch.bool)
    for y in (torch.tensor([[0.0], [2.0]]), torch.tensor([[10.0], [12.0]])):
        metric.update(EvalBatch(y, y + 1, codes, plain))
    # errors 4 x 1; mean 6, squared distances 36 + 16 + 16 + 36
    assert metric.compute()["fvu"] == pytest.approx(4 / 104)


def test_one_outlier_changes_fvu_all_and_leaves_fvu_alone():
    b = batch(50, 0)
    clean, with_sink = (METRICS.build(MetricConfig("fvu"), D, F) for _ in range(2))
    everything = torch.ones(50, dtype=torch.bool)
    clean.update(EvalBatch(b.y, b.y_hat, b.codes, everything))
    sink = 1000 * torch.ones(1, D)
    codes = Codes(
        torch.cat([b.codes.values, torch.zeros(1, 3)]),
        torch.cat([b.codes.indices, torch.zeros(1, 3, dtype=torch.int32)]),
        F,
    )
    with_sink.update(
        EvalBatch(
            torch.cat([b.y, sink]),
            torch.cat([b.y_hat, sink]),
            codes,
            torch.cat([everything, torch.tensor([False])]),
        )
    )
    assert with_sink.compute()["fvu"] == pytest.approx(clean.compute()["fvu"], rel=1e-12)
    assert with_sink.compute()["fvu_all"] < 0.01 * clean.compute()["fvu_all"]


def test_l0_is_a_mean_with_its_distribution():
    metric = METRICS.build(MetricConfig("l0"), D, F)
    values = torch.tensor([[1.0, 0.0], [1.0, 2.0], [0.0, 0.0]])
    codes = Codes(values, torch.tensor([[0, 1], [2, 3], [0, 0]], dtype=torch.int32), F)
    y = torch.zeros(3, D)
    metric.update(EvalBatch(y, y, codes, torch.tensor([True, True, True])))
    assert metric.compute() == {"l0": 1.0}
    assert metric.histogram[:3].tolist() == [1, 1, 1]


def test_a_shrunk_reconstruction_shows_as_shrunk():
    metric = METRICS.build(MetricConfig("fidelity"), D, F)
    b = batch(30, 2)
    metric.update(EvalBatch(b.y, 0.5 * b.y, b.codes, b.ordinary))
    numbers = metric.compute()
    assert numbers["cosine"] == pytest.approx(1)
    assert numbers["l2_ratio"] == pytest.approx(0.5)
    assert numbers["relative_reconstruction_bias"] == pytest.approx(0.5)


def test_density_counts_silent_and_dense_latents():
    metric = METRICS.build(MetricConfig("density"), D, 4)
    indices = torch.zeros(20, 2, dtype=torch.int32)
    indices[:, 1] = 1
    values = torch.ones(20, 2)
    values[1:, 1] = 0
    y = torch.zeros(20, D)
    metric.update(EvalBatch(y, y, Codes(values, indices, 4), torch.ones(20, dtype=torch.bool)))
    assert metric.compute() == {"silent": 0.5, "dense": 0.25}


def test_an_unknown_metric_is_refused_with_a_suggestion():
    with pytest.raises(InputError, match="did you mean fvu"):
        build_metrics(["fvuu"], D, F)


def test_held_out_rows_are_collected_up_to_the_asked_number_and_outliers_marked():
    g = torch.Generator().manual_seed(0)
    parts = [{"h": torch.randn(10, D, generator=g)} for _ in range(5)]
    parts[0]["h"][3] *= 1000
    heldout = collect(iter(parts), 25, outlier_multiple=10.0)
    assert heldout.rows["h"].shape == (25, D)
    assert (~heldout.ordinary["h"]).nonzero().flatten().tolist() == [3]
    assert torch.isfinite(heldout.mean("h")).all() and heldout.mean("h").abs().max() < 5
    with pytest.raises(InputError, match=r"source\.holdout"):
        collect(iter([]), 25, 10.0)


def test_ordinary_rows_are_judged_against_the_median_norm():
    rows = torch.eye(4) * torch.tensor([1.0, 1.0, 1.0, 11.0])
    assert ordinary_rows(rows, 10.0).tolist() == [True, True, True, False]


@pytest.mark.parametrize("sampled", [0, 2])
def test_prefixes_of_a_matryoshka_sae_are_judged_by_what_they_reconstruct_without_the_others(sampled):
    torch.manual_seed(0)
    config = MatryoshkaConfig(d_sae=12, activation=TopKConfig(k=3), prefixes="1/4 2/3 1", sampled=sampled)
    sae = MatryoshkaSAE(config, 5).eval()
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_()
    sae.begin_step(3, 10)  # draws prefixes of its own where it is asked to
    x = torch.randn(50, 5)
    held = HeldOut({"h": x}, {"h": torch.ones(50, dtype=torch.bool)})
    [(numbers, _)] = evaluate([(sae, Places(("h",)))], held, EvalConfig(batch_tokens=16))
    dense, variance = sae.encode(x).dense(), (x - x.mean(dim=0)).square().sum()
    for count in (3, 8):
        alone = dense.clone()
        alone[:, count:] = 0
        missed = (x - sae.decode(Codes(alone, None, 12))).square().sum()
        assert numbers[f"fvu_first/{count}"] == pytest.approx(float(missed.detach() / variance), rel=1e-5)
    assert [name for name in numbers if name.startswith("fvu_first/")] == ["fvu_first/3", "fvu_first/8"]


def test_latents_that_point_the_same_way_are_counted_and_those_that_never_fire_are_not():
    sae = LinearSAE(LinearConfig(d_sae=3000, activation=TopKConfig(k=4)), 32)
    sae.initialise(
        torch.randn(64, 32, generator=torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1)
    )
    fires = torch.ones(3000, dtype=torch.bool)
    same, seen = twins(sae, fires)
    assert same == 0 and 900 < seen <= 1024
    with torch.no_grad():
        sae.w_dec[750:1500] = sae.w_dec[:750]
        sae.w_dec[1500:2250] = -sae.w_dec[:750]  # the other way is no twin
    same, seen = twins(sae, fires)
    assert same / seen == pytest.approx(1 / 2, abs=0.01)
    fires[750:1500] = False
    assert twins(sae, fires)[0] == 0
    assert twins(sae, ~fires & False) == (0, 0)


def test_the_first_held_out_rows_are_judged_as_rows_of_their_own():
    torch.manual_seed(0)
    sae = LinearSAE(LinearConfig(d_sae=12, activation=TopKConfig(k=3)), 5).eval()
    x, ordinary = torch.randn(50, 5), torch.rand(50) < 0.8
    truth = Truth(torch.eye(5), torch.full((5,), 0.5), Codes(x.relu(), None, 5))
    whole = HeldOut({"h": x}, {"h": ordinary}, truth)
    config, places = EvalConfig(batch_tokens=16), Places(("h",))
    [(first, _)] = evaluate([(sae, places)], whole.first(20), config)
    own = Truth(truth.features, truth.frequencies, Codes(x[:20].relu(), None, 5))
    [(alone, _)] = evaluate([(sae, places)], HeldOut({"h": x[:20]}, {"h": ordinary[:20]}, own), config)
    [(all_of_them, _)] = evaluate([(sae, places)], whole, config)
    assert first == alone != all_of_them and "recovery/mcc" in first
    assert whole.first(500).rows["h"].shape == x.shape
    assert torch.equal(whole.first(20).mean("h"), whole.mean("h"))


def test_saes_that_are_made_to_be_judged_are_made_one_after_the_other():
    made = []

    class Whole:
        pass

    class Averaged:
        averages, split = True, SimpleNamespace(whole=True)

        def whole(self):
            whole = Whole()
            made.append(weakref.ref(whole))
            assert sum(one() is not None for one in made) == 1
            return whole

    seen = 0
    for wholes in judged_together([Averaged(), Averaged(), Averaged()]):
        seen += len(wholes)
    assert seen == len(made) == 3
