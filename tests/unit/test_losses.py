"""Loss terms have the values their formulas say and move the parameters they should."""

import pytest
import torch

from sae_train.losses import auxk, fvu

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
    auxk(residual, x @ w_enc.T, w_dec, k_aux).backward()
    assert residual.grad is None
    assert (w_enc.grad.abs().sum(dim=-1) > 0).all()
    assert (w_dec.grad.abs().sum(dim=-1) > 0).all()


def test_auxk_keeps_the_k_largest_activations_of_each_row():
    residual = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    pre = torch.tensor([[3.0, 2.0, -1.0], [-5.0, 0.5, 4.0]])
    w_dec = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    kept = torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.0, 4.0]])
    error = (residual - kept @ w_dec).square().sum()
    variance = (residual - residual.mean(dim=0)).square().sum()
    assert torch.equal(auxk(residual, pre, w_dec, 1), error / variance)


@pytest.mark.parametrize("residual", [torch.zeros(4, 3), torch.ones(4, 3) / 3, torch.randn(1, 3)])
def test_auxk_of_a_residual_without_variance_is_zero_with_zero_gradient(residual):
    pre = torch.ones(len(residual), 2, requires_grad=True)
    loss = auxk(residual, pre, torch.ones(2, 3), 2)
    loss.backward()
    assert loss == 0 and pre.grad.abs().sum() == 0


def test_auxk_without_dead_latents_is_zero():
    assert auxk(torch.randn(4, 3), torch.zeros(4, 0), torch.zeros(0, 3), 2) == 0
