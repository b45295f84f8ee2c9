"""The first step in dense float64, with which every implementation's first step is compared.

Every implementation starts from the same weights and sees the same first batch, so its loss and the
direction of its encoder's gradient must be these, up to how it rounds. The direction, because some clip and
some scale their loss; Adam's first moment has it after one step. A slice of latents stands for all.

Written to a file once per shape by a process of its own; imports torch alone, as `gpu_problem` does.
"""

from pathlib import Path
from typing import Any

import torch
from gpu_problem import CHUNK, Problem, dictionary, make_batches
from torch import Tensor

PICKED = 64  # latents of each kind: firing often, now and then


def first_step(p: Problem, device: str) -> dict[str, Any]:
    """mse: squared error per element; picked: latents; d_w_enc: their gradient rows, up to scale."""
    w = dictionary(p, device)
    x = make_batches(p, w)[0].double()
    best = torch.full((p.n, p.k), -torch.inf, dtype=torch.float64, device=device)
    chosen = torch.zeros(p.n, p.k, dtype=torch.int64, device=device)
    width = max(p.k, CHUNK // max(p.n, p.d))
    for start in range(0, p.f, width):
        scores = x @ w[start : start + width].double().T
        at = torch.arange(start, start + scores.shape[1], device=device).expand_as(scores)
        top = torch.cat([best, scores], dim=1).topk(p.k, dim=1)
        best, chosen = top.values, torch.cat([chosen, at], dim=1).gather(1, top.indices)
    codes = best.clamp_min(0)
    error, dz = torch.empty_like(x), torch.empty_like(codes)
    for rows in torch.arange(p.n, device=device).split(max(1, CHUNK // (p.k * p.d))):
        gathered = w[chosen[rows]].double()
        error[rows] = x[rows] - torch.einsum("nk,nkd->nd", codes[rows], gathered)
        dz[rows] = torch.einsum("nd,nkd->nk", error[rows], gathered) * (codes[rows] > 0)
    counts = chosen[codes > 0].bincount(minlength=p.f)
    often = counts.argsort(descending=True, stable=True)
    middle = int((counts > 0).sum()) // 2
    picked = torch.cat([often[:PICKED], often[middle : middle + PICKED]]).unique()
    return {
        "mse": float(error.square().mean()),
        "picked": picked.cpu(),
        "d_w_enc": _rows(p, picked, chosen, dz, x).cpu(),
    }


def _rows(p: Problem, picked: Tensor, chosen: Tensor, dz: Tensor, x: Tensor) -> Tensor:
    place = torch.full((p.f,), -1, dtype=torch.int64, device=x.device)
    place[picked] = torch.arange(len(picked), device=x.device)
    at = place[chosen.reshape(-1)]
    out = torch.zeros(len(picked), p.d, dtype=torch.float64, device=x.device)
    for part in (at >= 0).nonzero().squeeze(1).split(max(1, CHUNK // p.d)):
        out.index_add_(0, at[part], dz.reshape(-1)[part, None] * x[part // p.k])
    return out


def write(p: Problem, device: str, path: Path) -> None:
    torch.save(first_step(p, device), path)


def compare(path: str, mse: float, moment: Tensor | None) -> dict[str, float]:
    """loss: relative error of the first loss. gradient: distance of unit vectors along the encoder's
    gradient in the picked latents, 0 the same, 2 the opposite.

    Args:
        mse: squared error per element of the first batch.
        moment: [F, D] anything in proportion to the gradient of w_enc, or None.

    Empty where there is no such file: that it could not be made has been reported."""
    if not Path(path).exists():
        return {}
    want = torch.load(path, weights_only=True)
    loss = {"loss": abs(mse / want["mse"] - 1)}
    if moment is None:
        return loss
    got = moment[want["picked"].to(moment.device)].double().cpu()
    # The gradient of the loss points away from the error's products: signs differ.
    directions = [-got / got.norm().clamp_min(1e-300), want["d_w_enc"] / want["d_w_enc"].norm()]
    return loss | {"gradient": float((directions[0] - directions[1]).norm())}
