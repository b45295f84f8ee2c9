"""Do our steps train what dense torch trains? Two runs from the same weights on the same rows.

Ours is the trainer's step with bfloat16 operands and float32 masters, moments and sums. The other is dense
torch without autocast: float32 everywhere (TF32 products on a GPU, whose sums are float32 too). The weights
start away from the dictionary that made the rows, every step sees new rows, and both are judged in float32 on
rows that neither has seen. Ours fails if its fraction of variance unexplained differs by more than 0.2 %.
"""

from typing import Any

import torch
from gpu_problem import PROBLEMS, Problem, dictionary, synthetic_batch
from torch import Tensor
from torch.nn import functional

LIMIT = 2e-3
LR = 4e-4
WINDOW = 10  # steps whose mean is a point of a curve
HELD_OUT = 8  # batches
ON_CPU = Problem("curve", 256, 48, 256, 4)  # the interpreter's shape is too small to have a curve


def start_weights(p: Problem, device: str) -> Tensor:
    """[F, D] unit rows that have nothing to do with the dictionary of the rows."""
    draw = torch.Generator(device).manual_seed(5)
    return functional.normalize(torch.randn(p.f, p.d, generator=draw, device=device), dim=1)


def variance(x: Tensor) -> float:
    x = x.double()
    return float((x - x.mean(dim=0)).square().mean())


@torch.no_grad()
def fvu(p: Problem, tensors: list[Tensor], batches: list[Tensor]) -> float:
    """Of batches, dense and in float32; `tensors` are w_enc, w_dec, b_enc, b_dec."""
    w_enc, w_dec, b_enc, b_dec = tensors
    error = total = 0.0
    for x in batches:
        x = x.float()
        top = functional.linear(x - b_dec, w_enc, b_enc).relu().topk(p.k, dim=-1)
        x_hat = torch.zeros(len(x), p.f, device=x.device).scatter_(1, top.indices, top.values) @ w_dec + b_dec
        error += float((x - x_hat).double().square().mean())
        total += variance(x)
    return error / total


def train(p: Problem, name: str, device: str, steps: int, backend: str) -> tuple[list[float], float]:
    """Mean FVU of every ten batches, and that of held-out rows at the end."""
    if name == "ours":
        from gpu_trainer import trainer

        peer = trainer(p, start_weights(p, device), device, "no dead", backend, lr=LR)
    else:
        from gpu_peers import dense

        peer = dense(p, start_weights(p, device), device, "eager", products=torch.float32, lr=LR)
    w = dictionary(p, device)
    draw = torch.Generator(device).manual_seed(7)
    held_out = [synthetic_batch(p, w, draw) for _ in range(HELD_OUT)]
    total = variance(torch.cat(held_out))
    losses = []
    for _ in range(steps):
        losses.append(peer.step(synthetic_batch(p, w, draw).float()))
    points = torch.stack(losses)[: steps // WINDOW * WINDOW].view(-1, WINDOW).double().mean(dim=1) / total
    return points.tolist(), fvu(p, peer.tensors(), held_out)


def run(device: str, steps: int, backend: str, shape: str = "S") -> dict[str, Any]:
    """Both curves and their held-out ends; `failed` if these differ by more than LIMIT."""
    if device == "cuda":
        torch.set_float32_matmul_precision("high")
    p = PROBLEMS[shape] if device == "cuda" else ON_CPU
    curves, ends = {}, {}
    for name in ("dense", "ours"):
        curves[name], ends[name] = train(p, name, device, steps, backend)
    off = abs(ends["ours"] / ends["dense"] - 1)
    found = {
        "problem": {"n": p.n, "d": p.d, "f": p.f, "k": p.k},
        "steps": steps,
        "lr": LR,
        "window": WINDOW,
        "fvu": curves,
        "held_out_fvu": ends,
        "off": off,
    }
    if not off <= LIMIT:
        found["wrong"] = f"held-out FVU differs by {off:.2%}, where {LIMIT:.1%} is allowed"
    return found
