"""The step as sae_train's trainer makes it: scaling, targets, the reconstruction for logging, and AuxK.

`gpu_ours` times the ops; this is what a run pays per batch. Latents that count as dead are the first ones
of the dictionary, a share that stays as it is: whether they fire does not change what AuxK costs.
"""

from collections.abc import Callable
from functools import partial

import torch
from gpu_problem import Problem
from sae_kernels import use_backend
from torch import Tensor

from sae_train.activations.topk import TopKConfig
from sae_train.batch import Batch
from sae_train.sae.linear import LinearConfig
from sae_train.train.kernels import KernelsConfig, choose_stepper
from sae_train.train.members import Member, MemberConfig
from sae_train.train.optim import OptimConfig

LR = 1e-4


def trainer(p: Problem, w: Tensor, device: str, dead: float = 0.0) -> Callable[[Tensor], Tensor]:
    """A step on float32 rows [N, D] that returns the mean squared error; `dead` is a share of the latents."""
    config = MemberConfig(
        name="main",
        hook="rows",
        seed=0,
        sae=LinearConfig(d_sae=p.f, activation=TopKConfig(k=p.k), input_scale="none"),
        optim=OptimConfig(lr=LR, warmup=0, decay=0),
    )
    member = Member(config, p.d, steps=10**6, tokens=10**12, ema=0.0, device=torch.device(device))
    with torch.no_grad():
        member.sae.w_enc.copy_(w)
        member.sae.w_dec.copy_(w)
    member.dead = torch.arange(round(dead * p.f), device=device)
    stepper = choose_stepper(KernelsConfig(stepper="fused"), [member], 1, torch.bfloat16)

    def step(x: Tensor) -> Tensor:
        with use_backend("triton"):
            losses = stepper.step(member, Batch(x, x)).losses
        return losses.terms["mse"].detach()

    return step


TRAINERS = {
    "trainer": trainer,
    "trainer_dead_1": partial(trainer, dead=0.01),
    "trainer_dead_10": partial(trainer, dead=0.10),
}
