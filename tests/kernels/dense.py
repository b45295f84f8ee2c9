"""What tests of ops share: rows, weights and codes, the other side's one-hot matrices, gradients, closeness.

A float32 sum of m terms drifts from the exact one by at most about m * EPS of the sum of magnitudes;
random signs make the sum smaller than that by up to sqrt(m), far less in the root mean square
over a whole tensor, for which the tests allow 4 * m * EPS.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

EPS = 2.0**-24  # float32 unit roundoff
BF16_EPS = 2.0**-8  # bfloat16 unit roundoff


def make_encoder(n: int, f: int, d: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(n + f + d)
    x, w, b = (torch.randn(*shape, generator=draw) for shape in ((n, d), (f, d), (f,)))
    return x.to(device), w.to(device), b.to(device)


def make_codes(n: int, k: int, f: int, device: str, empty: float = 0.3) -> tuple[Tensor, Tensor]:
    """Codes whose indices repeat within and across rows; latent 0 is in the first slot of every row."""
    draw = torch.Generator().manual_seed(n + k + f)
    values = torch.randn(n, k, generator=draw)
    values[torch.rand(n, k, generator=draw) < empty] = 0
    indices = torch.randint(f, (n, k), generator=draw, dtype=torch.int32)
    indices[:, 0] = 0
    return values.to(device), indices.to(device)


def one_hot(indices: Tensor, f: int) -> Tensor:
    """[N, K, F] float64"""
    return functional.one_hot(indices.long(), f).double()


def gradients(run: Callable[..., Tensor], *tensors: Tensor) -> list[Tensor]:
    """The output, then the gradient of its sum with fixed random weights in each tensor; float64, on CPU."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = run(*leaves)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (out * weights.to(out)).sum().backward()
    return [t.detach().cpu().double() for t in (out, *(leaf.grad for leaf in leaves))]


def assert_close(got: list[Tensor], want: list[Tensor], tolerance: float) -> None:
    for number, (g, w) in enumerate(zip(got, want, strict=True)):
        assert g.shape == w.shape, f"output or gradient {number}"
        error = (g - w).square().sum().sqrt()
        assert error <= tolerance * w.square().sum().sqrt(), f"output or gradient {number}"
