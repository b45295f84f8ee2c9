"""`decode_residual` on every backend against dense float64 autograd: value and gradients.

The truth is built from one-hot matrices and shares no code with the package.
"""

import pytest
import torch
from sae_kernels import decode_residual, dispatch
from torch import Tensor

from .dense import BF16_EPS, EPS, assert_close, gradients, make_codes, one_hot

SHAPES = [(1, 1, 1, 1), (1, 3, 7, 5), (13, 5, 40, 70), (9, 16, 16, 24), (17, 2, 101, 11)]  # N, K, F, D


def make_decoder(n: int, f: int, d: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """weight, bias, and a target far from what codes decode to, so that no residual is a small difference."""
    draw = torch.Generator().manual_seed(n + f + d)
    weight, bias, target = (torch.randn(*shape, generator=draw) for shape in ((f, d), (d,), (n, d)))
    return weight.to(device), bias.to(device), (target + 20).to(device)


@pytest.mark.parametrize(("n", "k", "f", "d"), SHAPES)
def test_decode_residual_agrees_with_dense_float64_in_value_and_gradients(device, n, k, f, d):
    values, indices = make_codes(n, k, f, device)
    weight, bias, target = make_decoder(n, f, d, device)
    hot = one_hot(indices.cpu(), f)

    def ours(v: Tensor, w: Tensor, c: Tensor, y: Tensor) -> Tensor:
        residual, loss, _ = decode_residual(v, indices, w, c, y)
        assert loss.shape == (n,)
        return torch.cat([residual.flatten(), loss])

    def dense(v: Tensor, w: Tensor, c: Tensor, y: Tensor) -> Tensor:
        residual = y - torch.einsum("nk,nkf->nf", v, hot) @ w - c
        return torch.cat([residual.flatten(), residual.square().sum(dim=1)])

    inputs = (values, weight, bias, target)
    wide = tuple(t.cpu().double() for t in inputs)
    assert_close(gradients(ours, *inputs), gradients(dense, *wide), 8 * max(n, k, d) * EPS)
    residual = dense(*wide)[: n * d].view(n, d)
    dots = torch.einsum("nd,nkf,fd->nk", residual, hot, wide[1])
    assert_close([decode_residual(values, indices, *inputs[1:])[2].cpu().double()], [dots], 8 * (k + d) * EPS)


def test_the_loss_is_that_of_the_residual_before_it_is_rounded(device):
    values, indices = make_codes(12, 4, 30, device)
    weight, bias, target = (t.bfloat16() for t in make_decoder(12, 30, 40, device))
    residual, loss, dots = decode_residual(values, indices, weight, bias, target)
    wide = [t.double() for t in (target, weight, bias, values)]
    exact = wide[0] - (wide[3].unsqueeze(-1) * wide[1][indices.long()]).sum(dim=1) - wide[2]
    assert (residual.dtype, loss.dtype, dots.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert_close([residual.double()], [exact], BF16_EPS)
    assert_close([loss.double()], [exact.square().sum(dim=1)], 8 * 44 * EPS)
    # The products are those of the residual that is returned.
    want = (residual.double().unsqueeze(1) * wide[1][indices.long()]).sum(dim=-1)
    assert_close([dots.double()], [want], 8 * 44 * EPS)


def test_strided_inputs_are_read_where_they_lie(device):
    values, indices = make_codes(20, 4, 36, device)
    weight, bias, target = make_decoder(20, 36, 9, device)
    given = (values, indices, weight, bias, target)
    strided = [torch.stack([t, t + 1], dim=-1)[..., 0] for t in given]
    assert not any(t.is_contiguous() for t in strided)
    for got, want in zip(decode_residual(*strided), decode_residual(*given), strict=True):
        assert_close([got.double()], [want.double()], 8 * 13 * EPS)


def test_empty_codes_leave_the_target_less_the_bias(device):
    weight, bias, target = make_decoder(5, 9, 6, device)
    indices = torch.zeros(5, 3, dtype=torch.int32, device=device)
    values = torch.zeros(5, 3, device=device)
    residual, loss, dots = decode_residual(values, indices, weight, bias, target)
    assert torch.equal(residual, target - bias)
    assert_close([loss.double()], [(target - bias).double().square().sum(dim=1)], 4 * 6 * EPS)
    want = (residual.double() @ weight[0].double()).unsqueeze(1).expand(5, 3)  # of empty slots too
    assert_close([dots.double()], [want], 8 * 6 * EPS)


def test_no_rows_have_no_residual_and_give_no_gradient(device):
    weight, bias, target = make_decoder(2, 9, 6, device)
    weight.requires_grad_()
    codes = torch.zeros(0, 3, device=device), torch.zeros(0, 3, dtype=torch.int32, device=device)
    residual, loss, dots = decode_residual(*codes, weight, bias, target[:0])
    assert (residual.shape, loss.shape, dots.shape) == ((0, 6), (0,), (0, 3))
    (residual.sum() + loss.sum()).backward()
    assert (weight.grad == 0).all()


def test_two_runs_give_the_same_bits(device):
    if device == "cuda" and dispatch.requested() == "reference":
        pytest.skip("the reference adds with atomics on a GPU, and says so")
    values, indices = make_codes(20, 5, 30, device)
    given = make_decoder(20, 30, 12, device)

    def run(v: Tensor, *others: Tensor) -> Tensor:
        residual, loss, dots = decode_residual(v, indices, *others)
        return torch.cat([residual.flatten(), loss, dots.flatten()])

    for first, second in zip(gradients(run, values, *given), gradients(run, values, *given), strict=True):
        assert torch.equal(first, second)
