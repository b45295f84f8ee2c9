"""Inputs that are meant to break a step: each is checked in full, at real size, before anything is timed.

A trial changes the weights, the rows [N, D] or both, and may add gradients of dead latents. What it must
survive: ties of all latents, ties across the k-th place, rows without a positive pre-activation, one row
beside which the others vanish, latents that fire in every row, and no or only dead latents.
"""

from collections.abc import Callable

import torch
from gpu_problem import CHUNK, Problem
from sae_kernels import DeadGrads, Latents
from torch import Tensor

Trial = Callable[[Problem, Latents, Tensor], tuple[Tensor, DeadGrads | None]]
NEAR_MAX = 2.0**12
"""Of the huge row: its squares and products still fit float32 many times over, bfloat16 anyway."""


def equal_rows(p: Problem, latents: Latents, x: Tensor) -> tuple[Tensor, None]:
    """All rows are the same: k latents fire in every row and no other in any."""
    return x[:1].expand_as(x).contiguous(), None


def equal_latents(p: Problem, latents: Latents, x: Tensor) -> tuple[Tensor, None]:
    """All encoder rows are the same: all F pre-activations of a row tie."""
    master = latents.w_enc.master()
    latents.w_enc.store(master[:1].expand_as(master))
    return x, None


def ties_at_k(p: Problem, latents: Latents, x: Tensor) -> tuple[Tensor, None]:
    """Encoder rows in groups of equals whose size does not divide k: the k-th place cuts through a group."""
    size = next(s for s in range(2, p.k + 2) if p.k % s)
    master = latents.w_enc.master()
    first = torch.arange(p.f, device=x.device) // size * size
    latents.w_enc.store(master[first].bfloat16().float())  # a bfloat16 number: products keep the tie
    return x, None


def negative(p: Problem, latents: Latents, x: Tensor) -> tuple[Tensor, None]:
    """No pre-activation is positive: every slot is empty."""
    latents.b_enc.value.fill_(-2 * float(x.float().norm(dim=1).max()) - 1)
    return x, None


def huge_row(p: Problem, latents: Latents, x: Tensor) -> tuple[Tensor, None]:
    """One row is thousands of times as large as the others."""
    x = x.clone()
    x[p.n // 2] *= NEAR_MAX
    return x, None


def one_everywhere(p: Problem, latents: Latents, x: Tensor) -> tuple[Tensor, None]:
    """One latent fires in every row."""
    latents.b_enc.value[p.f // 3] = 2 * float(x.float().norm(dim=1).max()) + 1
    return x, None


def dead(share: float) -> Trial:
    """Gradients of dead latents beside the reconstruction's: of none, or of all."""

    def trial(p: Problem, latents: Latents, x: Tensor) -> tuple[Tensor, DeadGrads]:
        draw = torch.Generator(x.device).manual_seed(3)
        number = round(share * p.f)
        w_enc, w_dec = (torch.empty(number, p.d, device=x.device) for _ in "ab")
        for matrix in (w_enc, w_dec):
            for part in matrix.split(max(1, CHUNK // p.d)):
                part.copy_(torch.randn(part.shape, generator=draw, device=x.device) * 1e-6)
        b_enc = torch.randn(number, generator=draw, device=x.device) * 1e-6
        return x, DeadGrads(torch.arange(number, device=x.device), w_enc, b_enc, w_dec)

    return trial


TRIALS: dict[str, Trial] = {
    "equal rows": equal_rows,
    "equal latents": equal_latents,
    "ties at k": ties_at_k,
    "negative": negative,
    "huge row": huge_row,
    "one everywhere": one_everywhere,
    "none dead": dead(0.0),
    "all dead": dead(1.0),
}


def extra_bytes(p: Problem, name: str) -> int:
    """What a trial holds beyond the step: masters in float32, or gradients of all latents."""
    return p.f * p.d * {"all dead": 8, "equal latents": 4, "ties at k": 10}.get(name, 0)
