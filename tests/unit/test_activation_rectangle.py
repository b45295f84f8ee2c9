"""Compressed rows become codes of one shape, with the same slots and gradients, whatever their lengths."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from sae_train.activations.rectangle import DENSE_ABOVE, rectangle

F = 48
SHORT = [3, 0, 1, 5, 0]
LONG = [3, 0, 30, 5, 0]


def compressed(lengths: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    indices = [torch.randperm(F, generator=draw)[:length].int() for length in lengths]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return torch.rand(sum(lengths), generator=draw) + 0.1, torch.cat(indices), offsets


@pytest.mark.parametrize(
    "lengths", [SHORT, LONG, [0, 0], [2]], ids=["short", "one long", "nothing", "one row"]
)
def test_every_slot_keeps_its_row_its_latent_its_value_and_its_gradient(lengths):
    values, indices, offsets = compressed(lengths)
    leaf = values.clone().requires_grad_()
    codes = rectangle(leaf, indices, offsets, F)
    want = torch.zeros(len(lengths), F)
    for row, (first, end) in enumerate(pairwise(offsets.tolist())):
        want[row, indices[first:end].long()] = values[first:end]
    assert torch.equal(codes.dense(), want)
    assert codes.l0().tolist() == lengths and codes.d_sae == F
    g = torch.randn(want.shape, generator=torch.Generator().manual_seed(1))
    (codes.dense() * g).sum().backward()
    assert torch.equal(leaf.grad, g[want != 0][_order(indices, offsets)])


def _order(indices: Tensor, offsets: Tensor) -> Tensor:
    """Of each slot: its place when the slots of a row are in the order of their latents."""
    parts = [indices[a:b].argsort().argsort() + a for a, b in pairwise(offsets.tolist())]
    return torch.cat(parts)


def test_rows_are_as_long_as_the_longest_and_dense_only_where_that_is_cheaper():
    assert max(SHORT) <= DENSE_ABOVE * F < max(LONG)
    short = rectangle(*compressed(SHORT), F)
    assert short.indices is not None and short.values.shape == (5, max(SHORT))
    assert short.indices.dtype == torch.int32
    long = rectangle(*compressed(LONG), F)
    assert long.indices is None and long.values.shape == (5, F)
