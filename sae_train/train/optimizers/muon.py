"""Muon: momentum whose matrix is orthogonalised before it is used, so that every direction moves alike.

torch.optim.Muon takes matrices; biases, thresholds and gates are stepped by Adam. One learning rate serves
both, because updates are scaled to the root mean square that Adam's have (Liu et al. 2025, arXiv:2502.16982);
so Adam's rule for it, 1/sqrt(F), stays too.

Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks", whose momentum of 0.95
is kept. No weight decay: decoder rows have unit norm anyway. The products that orthogonalise are in bfloat16,
which is for GPUs: a step of 4,608 x 576 takes 4 s on 2 CPU cores without instructions for it, Adam's 0.04 s.
"""

from collections.abc import Iterable

import torch
from torch import nn

from sae_train.train.optimizers.base import Composed


class Muon(Composed):
    """torch.optim.Muon for parameters of two dimensions, fused torch.optim.Adam for the others."""

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, betas: tuple[float, float], eps: float
    ) -> None:
        params = list(params)
        matrices = [p for p in params if p.ndim == 2]
        others = [p for p in params if p.ndim != 2]
        parts: list[torch.optim.Optimizer] = []
        if matrices:
            parts.append(torch.optim.Muon(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
        if others:
            parts.append(torch.optim.Adam(others, lr=lr, betas=betas, eps=eps, fused=True))
        super().__init__(parts)
