"""A small encoder and what it reads, for tests of activations by themselves."""

import torch
from torch import Tensor
from torch.nn import functional

D, F, N = 12, 24, 200


def weights() -> tuple[Tensor, Tensor]:
    """[F, D] unit rows, [F] small biases."""
    draw = torch.Generator().manual_seed(5)
    w = functional.normalize(torch.randn(F, D, generator=draw), dim=-1)
    return w, 0.1 * torch.randn(F, generator=draw)


def rows(seed: int = 0, n: int = N) -> Tensor:
    """[n, D] standard normal."""
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed))
