"""Loss terms have the values their formulas say and move the parameters they should."""

import pytest
import torch
from sae_kernels import dead_encode

from sae_train import losses
from sae_train.losses import auxk, dead_reconstruction, fvu

EPS = 2.0**-24


def test_fvu_is_zero_for_a_perfect_and_one_for_the_mean_reconstruction():
    y = torch.randn(200, 7, generator=torch.Generator().manual_seed(0)) + 3
    assert fvu(y, y) == 0
    assert abs(float(fvu(y, y.mean(dim=0).expand_as(y))) - 1) < 200 * 7 * EPS


def test_fvu_of_a_batch_without_variance_is_defined():
    y = torch.ones(5, 3)
    assert fvu(y, y) == 0
    assert torch.isfinite(fvu(y, y * 0.999)) and fvu(y, y * 0.999) > 1


def test_fvu_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"\(4, 3\).*\(4, 2\)"):
        fvu(torch.zeros(4, 3), torch.zeros(4, 2))


@pytest.mark.parametrize(("num_dead", "k_aux"), [(1, 4), (4, 4), (9, 4)])
def test_auxk_moves_dead_encoder_and_decoder_rows_and_nothing_else(num_dead, k_aux):
    g = torch.Generator().manual_seed(1)
    residual = torch.randn(32, 6, generator=g, requires_grad=True)
    x = torch.randn(32, 6, generator=g)
    w_enc = torch.randn(num_dead, 6, generator=g, requires_grad=True)
    w_dec = torch.randn(num_dead, 6, generator=g, requires_grad=True)
    b_enc = torch.zeros(num_dead, requires_grad=True)
    auxk(residual, dead_reconstruction(x, w_enc, b_enc, w_dec, k_aux)).backward()
    assert residual.grad is None
    assert (w_enc.grad.abs().sum(dim=-1) > 0).all() and (b_enc.grad != 0).all()
    assert (w_dec.grad.abs().sum(dim=-1) > 0).all()


def test_auxk_keeps_the_k_largest_activations_of_each_row():
    residual = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    x = torch.tensor([[3.0, 2.0, -1.0], [-5.0, 0.5, 4.0]])  # with w_enc = 1, the pre-activations
    w_dec = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    kept = torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.0, 4.0]])
    error = (residual - kept @ w_dec).square().sum()
    variance = (residual - residual.mean(dim=0)).square().sum()
    explained = dead_reconstruction(x, torch.eye(3), torch.zeros(3), w_dec, 1)
    assert torch.equal(auxk(residual, explained), error / variance)


@pytest.mark.parametrize(("num_dead", "k_aux"), [(1, 4), (9, 4), (9, 1), (40, 40)])
@pytest.mark.parametrize("bound", ["MAX_DENSE_DEAD", "MAX_DENSE_ELEMENTS"])
def test_dead_latents_add_up_to_the_same_by_dense_products_and_by_sparse_codes(
    monkeypatch, bound, num_dead, k_aux
):
    g = torch.Generator().manual_seed(2)
    tensors = [
        torch.randn(*shape, generator=g) for shape in ((33, 6), (num_dead, 6), (num_dead,), (num_dead, 6))
    ]
    found = []
    for limit in (None, 0):
        if limit is not None:
            monkeypatch.setattr(losses, bound, limit)
            # only the sparse way may be taken now
            monkeypatch.setattr(losses, "dead_encode", None)
        leaves = [t.clone().requires_grad_() for t in tensors]
        out = dead_reconstruction(*leaves, k_aux)
        (out * torch.arange(6.0)).sum().backward()
        found.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for dense, sparse in zip(*found, strict=True):
        assert (dense - sparse).norm() <= 4 * 33 * EPS * dense.norm()


def test_very_many_dead_latents_use_no_more_than_the_documented_slots(monkeypatch):
    x, w, b = torch.randn(5, 6), torch.randn(30, 6), torch.full((30,), 9.0)
    want = dead_encode(x, w, b, 3) @ w
    monkeypatch.setattr(losses, "MAX_DENSE_DEAD", 29)
    monkeypatch.setattr(losses, "MAX_SPARSE_K", 3)
    torch.testing.assert_close(dead_reconstruction(x, w, b, w, 20), want, rtol=30 * EPS, atol=30 * 30 * EPS)


@pytest.mark.parametrize("residual", [torch.zeros(4, 3), torch.ones(4, 3) / 3, torch.randn(1, 3)])
def test_auxk_of_a_residual_without_variance_is_zero_with_zero_gradient(residual):
    explained = torch.ones(len(residual), 3, requires_grad=True)
    loss = auxk(residual, explained)
    loss.backward()
    assert loss == 0 and explained.grad.abs().sum() == 0
