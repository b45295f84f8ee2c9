"""Triton's sums over latents against dense float64: lists of every length, and the awkward inputs.

The truth is built from dense matrices and shares no code with the package. A float32 sum of m terms drifts
by about m * EPS of the sum of magnitudes; the root mean square over a tensor is allowed 4 * m * EPS.
"""

import pytest
import torch
from sae_kernels import segment_rows, sparse_grad
from sae_kernels.triton.lists import PIECE
from torch import Tensor

EPS = 2.0**-24  # float32 unit roundoff
SHAPES = [(1, 1, 1, 1), (13, 5, 30, 70), (PIECE + 5, 2, 3, 300)]  # the last: cut lists, two blocks of columns


def make_codes(n: int, k: int, f: int, device: str) -> tuple[Tensor, Tensor]:
    """A third of the slots empty, indices repeated; latent 0 in every row, the last latent in none."""
    draw = torch.Generator().manual_seed(n + k + f)
    values = torch.rand(n, k, generator=draw) + 0.1
    values[:, 1:][torch.rand(n, k - 1, generator=draw) < 0.3] = 0
    indices = torch.randint(max(1, f - 1), (n, k), generator=draw, dtype=torch.int32)
    indices[:, 0] = 0
    return values.to(device), indices.to(device)


def make_rows(n: int, d: int, device: str, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)).to(device)


def dense(values: Tensor, indices: Tensor, f: int) -> Tensor:
    """[N, F] float64"""
    codes = torch.zeros(len(values), f, dtype=torch.float64)
    return codes.scatter_add(1, indices.cpu().long(), values.cpu().double())


def assert_close(got: Tensor, want: Tensor, tolerance: float, name: str = "") -> None:
    error = (got.cpu().double() - want).square().mean().sqrt()
    assert error <= tolerance * want.square().mean().sqrt(), name


def compress(values: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Codes without their empty slots, and offsets."""
    full = values != 0
    ends = full.sum(dim=1).cumsum(0)
    return values[full], *(t[full] for t in others), torch.cat([ends.new_zeros(1), ends])


@pytest.mark.parametrize(("n", "k", "f", "d"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_each_latent_are_summed_as_a_dense_product_would(triton_device, n, k, f, d, dtype):
    values, indices = make_codes(n, k, f, triton_device)
    rows = make_rows(n, d, triton_device).to(dtype)
    want = dense(values, indices, f).T @ rows.cpu().double()
    assert_close(segment_rows(values, indices, rows, f), want, 4 * n * EPS)


def test_no_slot_means_zero_and_no_row_means_zero(triton_device):
    values, indices = make_codes(6, 3, 9, triton_device)
    out = segment_rows(values, indices, make_rows(6, 5, triton_device), 9)
    assert (out[8] == 0).all() and (out[0] != 0).all()
    assert (segment_rows(values * 0, indices, make_rows(6, 5, triton_device), 9) == 0).all()
    assert (segment_rows(values[:0], indices[:0], make_rows(0, 5, triton_device), 9) == 0).all()


def test_compressed_rows_give_the_bits_of_padded_ones(triton_device):
    values, indices = make_codes(20, 4, 9, triton_device)
    values[3] = values[19] = 0  # rows without a slot
    rows = make_rows(20, 17, triton_device)
    v, i, offsets = compress(values, indices)
    assert torch.equal(segment_rows(v, i, rows, 9, offsets), segment_rows(values, indices, rows, 9))


def test_strided_arguments_give_the_bits_of_contiguous_ones_and_two_runs_the_same(triton_device):
    values, indices = make_codes(PIECE + 2, 2, 2, triton_device)
    rows = make_rows(PIECE + 2, 6, triton_device)
    want = segment_rows(values, indices, rows, 2)
    v, i, r = (torch.stack([t, t + 1], dim=-1)[..., 0] for t in (values, indices, rows))
    assert not any(t.is_contiguous() for t in (v, i, r))
    assert torch.equal(segment_rows(v, i, r, 2), want)


@pytest.mark.parametrize(("n", "k", "f", "d"), SHAPES)
@pytest.mark.parametrize("known", [False, True])
def test_all_gradients_of_a_linear_autoencoder_are_those_of_float64_autograd(
    triton_device, n, k, f, d, known
):
    values, indices = make_codes(n, k, f, triton_device)
    x, g, w_dec = (make_rows(m, d, triton_device, seed) for seed, m in enumerate((n, n, f)))
    dots = (g.unsqueeze(1) * w_dec[indices.long()]).sum(dim=-1) if known else None
    got = sparse_grad(x, g, values, indices, w_dec, 0.25, dots)

    # z is `values` plus a zero with the encoder's gradient, so that any codes will do.
    w_enc = torch.zeros(f, d, dtype=torch.float64, requires_grad=True)
    b_enc, b_dec = (torch.zeros(m, dtype=torch.float64, requires_grad=True) for m in (f, d))
    weight = w_dec.cpu().double().requires_grad_()
    pre = (x.cpu().double() @ w_enc.T + b_enc).gather(1, indices.cpu().long())
    pre.retain_grad()
    z = torch.where(values.cpu() != 0, values.cpu().double() + pre, 0)
    x_hat = (z.unsqueeze(-1) * weight[indices.cpu().long()]).sum(dim=1) + b_dec
    x_hat.backward(0.25 * g.cpu().double())
    want = [t.grad for t in (pre, w_enc, weight, b_enc, b_dec)]
    names = ("dz", "d_w_enc", "d_w_dec", "d_b_enc", "d_b_dec")
    for name, a, b in zip(names, got, want, strict=True):
        assert a.dtype == torch.float32 and b is not None
        assert_close(a, b, 4 * (n + d) * EPS, name)


def test_gradients_of_compressed_rows_are_those_of_padded_ones(triton_device):
    values, indices = make_codes(12, 4, 9, triton_device)
    values[3] = 0
    x, g, w_dec = (make_rows(m, 20, triton_device, seed) for seed, m in enumerate((12, 12, 9)))
    v, i, offsets = compress(values, indices)
    dz, *weights = sparse_grad(x, g, v, i, w_dec, 0.5, None, offsets)
    padded_dz, *padded = sparse_grad(x, g, values, indices, w_dec, 0.5)
    assert_close(dz, padded_dz[values != 0].cpu().double(), 4 * 20 * EPS)
    for a, b in zip(weights, padded, strict=True):
        assert_close(a, b.cpu().double(), 4 * 32 * EPS)
