"""The step as sae_train's trainer makes it: scaling, targets, the reconstruction for logging, and AuxK.

`gpu_ours` times the ops; this is what a run pays per batch. Latents that count as dead are the first ones
of the dictionary, a share that stays as it is: whether they fire does not change what AuxK costs.
"""

import torch
from gpu_peers import LR, Peer
from gpu_problem import Problem
from sae_kernels import use_backend
from torch import Tensor

from sae_train.activations.topk import TopKConfig
from sae_train.batch import Batch
from sae_train.sae.linear import LinearConfig
from sae_train.train.kernels import KernelsConfig, choose_stepper
from sae_train.train.members import Member, MemberConfig
from sae_train.train.optim import OptimConfig

DEAD = {"no dead": 0.0, "1% dead": 0.01, "10% dead": 0.10}
STATE = {"masters": "fp32 and a bf16 copy", "moments": "fp32", "products": "bf16, fp32 sums"}


def trainer(
    p: Problem, w: Tensor, device: str, variant: str, backend: str = "triton", lr: float = LR
) -> Peer:
    """The fused step in the format that bf16 autocast gives it; the variant is the share of dead latents."""
    config = MemberConfig(
        name="main",
        hook="rows",
        seed=0,
        sae=LinearConfig(d_sae=p.f, activation=TopKConfig(k=p.k), input_scale="none"),
        optim=OptimConfig(lr=lr, warmup=0, decay=0),
    )
    member = Member(config, p.d, steps=10**6, tokens=10**12, ema=0.0, device=torch.device(device))
    sae = member.sae
    with torch.no_grad():
        sae.w_enc.copy_(w)
        sae.w_dec.copy_(w)
    member.dead = torch.arange(round(DEAD[variant] * p.f), device=device)
    stepper = choose_stepper(KernelsConfig(stepper="fused"), [member], 1, torch.bfloat16)

    def step(x: Tensor) -> Tensor:
        with use_backend(backend):
            losses = stepper.step(member, Batch(x, x)).losses
        return losses.terms["mse"].detach()

    return Peer(
        step,
        mse=lambda mse, x: float(mse),
        moment=None if len(member.dead) else lambda: member.optimizer.state[sae.w_enc]["exp_avg"],
        tensors=lambda: [t.detach() for t in (sae.w_enc, sae.w_dec, sae.b_enc, sae.b_dec)],
        state=STATE | {"backend": backend},
    )
