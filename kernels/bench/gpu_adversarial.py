"""Inputs that are meant to break a step: each is checked in full, at real size, before anything is timed.

A trial changes the weights, the rows [N, D] or both, and may add gradients of dead latents. What it must
survive: ties of all latents, ties across the k-th place, rows without a positive pre-activation, one row
beside which the others vanish, latents that fire in every row, and no or only dead latents.
"""

from collections.abc import Callable

import torch
from gpu_problem import CHUNK, Problem
from gpu_state import master_rows
from sae_kernels import DeadGrads, Latents
from sae_kernels.chunked_step import rows_of
from torch import Tensor

Trial = Callable[[Problem, Latents, Tensor], tuple[Tensor, DeadGrads | None]]
NEAR_MAX = 2.0**12
"""Of the huge row: its squares and products still fit float32 many times over, bfloat16 anyway."""


def equal_rows(p: Problem, latents: Latents, x: Tensor) -> tuple[Tensor, None]:
    """All rows are the same: k latents fire in every row and no other in any."""
    return x[:1].expand_as(x).contiguous(), None


def equal_latents(p: Problem, latents: Latents, x: Tensor) -> tuple[Tensor, None]:
    """All encoder rows are the same: all F pre-activations of a row tie."""
    first = master_rows(latents.w_enc, slice(1)).float()
    for rows in _parts(p):
        rows_of(latents.w_enc, rows).store(first.expand(rows.stop - rows.start, -1))
    return x, None


def ties_at_k(p: Problem, latents: Latents, x: Tensor) -> tuple[Tensor, None]:
    """Encoder rows in groups of equals whose size does not divide k: the k-th place cuts through a group."""
    size = next(s for s in range(2, p.k + 2) if p.k % s)
    for rows in reversed(_parts(p)):  # from the end: a part copies rows of its own or of the one before it
        first = torch.arange(rows.start, rows.stop, device=x.device) // size * size
        copied = master_rows(latents.w_enc, first).bfloat16()  # a bfloat16 number: products keep the tie
        rows_of(latents.w_enc, rows).store(copied.float())
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


def _parts(p: Problem) -> list[slice]:
    """Latents, in slices whose masters take next to nothing beside the parameters of the largest shapes."""
    step = max(1, CHUNK // p.d)
    return [slice(start, min(start + step, p.f)) for start in range(0, p.f, step)]


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
    """What a trial holds beyond the step: gradients of all latents."""
    return p.f * p.d * {"all dead": 8}.get(name, 0)
