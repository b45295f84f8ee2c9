"""GroupMax: one winner per group, found in pieces and with the gradients of the winners alone."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sae_train.activations import group_max
from sae_train.activations.group_max import GroupMax, GroupMaxConfig
from sae_train.errors import InputError

D, F, N, K = 12, 40, 50, 5


def weights() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(5)
    return functional.normalize(torch.randn(F, D, generator=draw), dim=-1), 0.3 * torch.randn(
        F, generator=draw
    )


def rows() -> Tensor:
    return torch.randn(N, D, generator=torch.Generator().manual_seed(1))


def build(k: int = K) -> GroupMax:
    return GroupMax(GroupMaxConfig(k=k), F)


@pytest.mark.parametrize("k", [1, 5, 8, F])
def test_each_group_of_neighbours_keeps_its_largest_positive_latent(k):
    x, (w, b) = rows(), weights()
    codes, pre, size = build(k).encode(x, w, b - 0.8), functional.linear(x, w, b - 0.8), F // k
    assert codes.values.shape == (N, k)
    for group in range(k):
        part = pre[:, group * size : (group + 1) * size]
        assert torch.equal(codes.indices[:, group].long(), part.argmax(dim=-1) + group * size)
        torch.testing.assert_close(codes.values[:, group], torch.relu(part.amax(dim=-1)))
    assert k < F or (codes.values == 0).any(), "some groups must have nothing positive"
    assert ((codes.values == 0) == (codes.dense().gather(1, codes.latents()) == 0)).all()


def test_pieces_of_rows_give_the_codes_and_gradients_of_the_whole(monkeypatch):
    found = []
    for elements in (group_max.CHUNK_ELEMENTS, 7 * F, 1):
        monkeypatch.setattr(group_max, "CHUNK_ELEMENTS", elements)
        leaves = [t.clone().requires_grad_() for t in (rows(), *weights())]
        codes = build().encode(*leaves)
        codes.values.square().sum().backward()
        found.append([codes.indices, codes.values.detach(), *(leaf.grad for leaf in leaves)])
    for other in found[1:]:
        assert torch.equal(other[0], found[0][0])
        for one, two in zip(found[0][1:], other[1:], strict=True):
            torch.testing.assert_close(one, two)


@pytest.mark.parametrize("k", [0, 7, F + 1])
def test_groups_that_do_not_divide_the_latents_are_refused_in_one_line(k):
    with pytest.raises(InputError) as error:
        build(k)
    assert error.value.field == "sae.activation.k" and "\n" not in str(error.value)
