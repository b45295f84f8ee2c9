"""BatchTopK: what a batch keeps, the threshold that stands in for the batch, and that L0 stays the same."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sae_train.activations.batch_topk import BatchTopK, BatchTopKConfig
from sae_train.errors import InputError

D, F, N, K = 12, 64, 50, 3


def weights() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(5)
    return functional.normalize(torch.randn(F, D, generator=draw), dim=-1), torch.zeros(F)


def rows(seed: int = 0, n: int = N) -> Tensor:
    """Some rows are much longer than others."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(n, D, generator=draw) * torch.linspace(0.3, 2, n)[:, None]


def build(**options) -> BatchTopK:
    return BatchTopK(BatchTopKConfig(**{"k": K} | options), F)


def test_a_batch_keeps_its_largest_pre_activations_and_rows_share_them_unevenly():
    x, (w, b) = rows(), weights()
    codes = build().encode_training(x, w, b)
    pre = functional.linear(x, w, b)
    smallest = pre.flatten().topk(N * K).values[-1]
    torch.testing.assert_close(codes.dense(), torch.where(pre >= smallest, pre, 0))
    assert codes.l0().sum() == N * K
    assert codes.l0().min() < K < codes.l0().max()


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.999])
def test_the_threshold_is_the_unbiased_average_of_the_smallest_kept(decay):
    activation, (w, b) = build(threshold_decay=decay), weights()
    total = weight = 0.0
    for step in range(30):
        x = rows(step)
        activation.encode_training(x, w, b)
        smallest = float(functional.linear(x, w, b).flatten().topk(N * K).values[-1])
        total, weight = decay * total + (1 - decay) * smallest, decay * weight + (1 - decay)
        assert float(activation.threshold) == pytest.approx(total / weight, rel=1e-4), step
    assert float(activation.threshold_weight) == pytest.approx(weight, rel=1e-4)


def test_a_batch_with_room_to_spare_teaches_the_smallest_that_is_positive():
    x, (w, _) = rows(), weights()
    b = torch.full((F,), -4.0)
    pre = functional.linear(x, w, b)
    assert 0 < (pre > 0).sum() < N * K
    activation = build()
    activation.encode_training(x, w, b)
    assert float(activation.threshold) == pytest.approx(float(pre[pre > 0].min()), rel=1e-5)


def test_a_batch_of_nothing_teaches_nothing():
    activation, (w, b) = build(), weights()
    activation.encode_training(rows(), w, b)
    before = activation.threshold.clone(), activation.threshold_weight.clone()
    assert activation.encode_training(rows(), w, b - 1e6).l0().sum() == 0
    assert (activation.threshold, activation.threshold_weight) == before


def test_before_training_all_that_is_positive_is_active():
    x, (w, b) = rows(), weights()
    want = torch.relu(functional.linear(x, w, b))
    for codes in (build().encode(x, w, b), build()(functional.linear(x, w, b))):
        torch.testing.assert_close(codes.dense(), want)


def test_inference_keeps_what_is_above_the_threshold_and_positive():
    activation, x, (w, b) = build(), rows(), weights()
    pre = functional.linear(x, w, b)
    activation.threshold.fill_(0.8)
    torch.testing.assert_close(activation.encode(x, w, b).dense(), torch.where(pre > 0.8, pre, 0))
    before = activation.threshold.clone()
    activation.encode(rows(1), w, b)
    assert torch.equal(activation.threshold, before), "only training teaches"


def test_k_falls_from_its_start_over_its_share_of_the_run():
    activation, (w, b) = build(k_start=11, k_steps=0.5), weights()
    kept = []
    for step in range(0, 100, 10):
        activation.begin_step(step, 100)
        kept.append(int(activation.encode_training(rows(step), w, b).l0().sum()) / N)
    assert kept == [11, 9, 8, 6, 5, 3, 3, 3, 3, 3]


@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("k", {"k": 0}),
        ("k", {"k": F + 1}),
        ("k_start", {"k_start": K - 1}),
        ("k_start", {"k_start": F + 1}),
        ("k_steps", {"k_steps": 0.0}),
        ("threshold_decay", {"threshold_decay": 1.0}),
        ("threshold_decay", {"threshold_decay": -0.1}),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(key, options):
    with pytest.raises(InputError) as error:
        build(**options)
    assert error.value.field == f"sae.activation.{key}" and "\n" not in str(error.value)
