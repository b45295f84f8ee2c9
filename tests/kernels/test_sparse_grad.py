"""`sparse_grad` on every backend against float64 autograd, which knows codes as a dense mask."""

from typing import Any

import pytest
import torch
from sae_kernels import dispatch, sparse_grad
from torch import Tensor

EPS = 2.0**-24  # float32 unit roundoff
N, K, F, D = 9, 3, 19, 12


def make_problem(device: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights of an SAE; rows with codes at random places and a gradient.

    Latent 0 is in every row, latents from 14 on in none; a third of the slots is empty, indices repeat."""
    draw = torch.Generator().manual_seed(3)
    shapes = {"w_enc": (F, D), "b_enc": (F,), "w_dec": (F, D), "b_dec": (D,)}
    weights = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    x, g = torch.randn(2, N, D, generator=draw)
    indices = torch.randint(14, (N, K), generator=draw, dtype=torch.int32)
    empty = torch.rand(N, K, generator=draw) < 0.3
    indices[:, 0], empty[:, 0] = 0, False
    places = indices.long()
    values = (x.unsqueeze(1) * weights["w_enc"][places]).sum(-1) + weights["b_enc"][places]
    values[empty] = 0
    dots = (g.unsqueeze(1) * weights["w_dec"][places]).sum(-1)
    tensors = {"x": x, "residual": g, "values": values, "indices": indices, "dots": dots}
    return weights, {name: t.to(device) for name, t in tensors.items()}


def rms(t: Tensor) -> float:
    return float(t.double().square().mean().sqrt())


@pytest.mark.parametrize(("compressed", "known"), [(False, False), (False, True), (True, False)])
def test_sparse_grad_is_the_gradient_of_float64_autograd(device, compressed, known):
    weights, problem = make_problem(device)
    if compressed:
        problem["values"][[0, 5, N - 1]] = 0  # rows without a slot
    scale, g = -0.37, problem["residual"]
    leaves = {name: tensor.double().requires_grad_() for name, tensor in weights.items()}
    places, filled = problem["indices"].cpu().long(), problem["values"].cpu() != 0
    mask = torch.zeros(N, F, dtype=torch.float64).scatter_add_(1, places, filled.double())
    pre = problem["x"].cpu().double() @ leaves["w_enc"].T + leaves["b_enc"]
    pre.retain_grad()
    # Values are given, rounded to float32: the truth decodes those, with the gradient of its own.
    dense = torch.zeros(N, F, dtype=torch.float64)
    dense.scatter_add_(1, places, problem["values"].cpu().double())
    z = mask * pre
    z = z + (dense - z).detach()
    (scale * g.cpu().double() * (z @ leaves["w_dec"] + leaves["b_dec"])).sum().backward()
    args: dict[str, Any] = {"values": problem["values"], "indices": problem["indices"], "offsets": None}
    inside = torch.ones(N, K, dtype=torch.bool)
    if compressed:
        inside = filled
        counts = filled.sum(dim=1)
        args["offsets"] = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(device)
        args |= {name: args[name][filled.to(device)] for name in ("values", "indices")}
    dots = problem["dots"] if known else None
    got = sparse_grad(problem["x"], g, w_dec=weights["w_dec"].to(device), scale=scale, dots=dots, **args)
    dz, d_w_enc, d_w_dec, d_b_enc, d_b_dec = (t.cpu().double() for t in got)
    assert all(t.dtype == torch.float32 and not t.requires_grad for t in got)
    slope = (scale * g.cpu().double() @ leaves["w_dec"].detach().T).gather(1, places) * filled
    wanted = {name: leaf.grad for name, leaf in leaves.items()}
    pairs = [(d_w_enc, wanted["w_enc"]), (d_w_dec, wanted["w_dec"]), (d_b_enc, wanted["b_enc"])]
    for number, (mine, want) in enumerate([*pairs, (d_b_dec, wanted["b_dec"]), (dz, slope[inside])]):
        want = want.reshape(mine.shape)
        assert rms(mine - want) <= 4 * (N * K + D) * EPS * rms(want), f"output {number}"


def test_rows_in_bfloat16_are_summed_in_float32(device):
    weights, problem = make_problem(device)
    codes = (problem["values"], problem["indices"], weights["w_dec"].to(device), 0.5, problem["dots"])
    x, g = problem["x"].bfloat16(), problem["residual"].bfloat16()
    got, want = sparse_grad(x, g, *codes), sparse_grad(x.float(), g.float(), *codes)
    for mine, wanted in zip(got, want, strict=True):
        assert mine.dtype == torch.float32
        assert rms(mine - wanted) <= 4 * N * K * EPS * rms(wanted)


def test_no_rows_have_gradients_of_zero(device):
    weights, problem = make_problem(device)
    x, g, values, indices = (problem[name][:0] for name in ("x", "residual", "values", "indices"))
    dz, *others = sparse_grad(x, g, values, indices, weights["w_dec"].to(device))
    assert dz.shape == (0, K)
    assert [tuple(t.shape) for t in others] == [(F, D), (F, D), (F,), (D,)]
    assert all((t == 0).all() for t in others)


def test_two_runs_give_the_same_bits(device):
    if device == "cuda" and dispatch.requested() == "reference":
        pytest.skip("the reference adds with atomics on a GPU, and says so")
    weights, problem = make_problem(device)
    args = (problem["x"], problem["residual"], problem["values"], problem["indices"])
    first, second = (sparse_grad(*args, weights["w_dec"].to(device), -0.1) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
