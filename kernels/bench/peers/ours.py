"""sae_train's step as the trainer runs it: one member, and the stepper that the trainer would choose for it.

Variants: any value of kernels.stepper.
"""

import torch
from peers.protocol import Job, Start, Step, serve
from torch import Tensor

from sae_train.activations.topk import TopKConfig
from sae_train.batch import Batch
from sae_train.cli.main import one_arena
from sae_train.sae.linear import LinearConfig
from sae_train.train.kernels import KernelsConfig, choose_stepper
from sae_train.train.members import Member, MemberConfig
from sae_train.train.optim import OptimConfig


def build(job: Job, start: Start) -> Step:
    d_sae, d_in = start["w_enc"].shape
    config = MemberConfig(
        name="main",
        hook="rows",
        seed=0,
        sae=LinearConfig(d_sae=d_sae, activation=TopKConfig(k=job.k), input_scale="none"),
        optim=OptimConfig(lr=job.lr, warmup=0, decay=0),
    )
    # Tokens without end: no latent can be dead before the benchmark is over.
    member = Member(config, d_in, steps=10**6, tokens=10**12, ema=0.0, device=torch.device("cpu"))
    with torch.no_grad():
        for name, value in start.items():
            getattr(member.sae, name).copy_(value)
    autocast = torch.bfloat16 if job.bf16 else None
    stepper = choose_stepper(KernelsConfig(stepper=job.variant or "auto"), [member], 1, autocast)
    done = 0

    def step(x: Tensor) -> Tensor:
        nonlocal done
        member.begin_step(done)
        done += 1
        return stepper.step(member, Batch(x, x)).losses.terms["mse"].detach() * d_in

    return step


if __name__ == "__main__":
    one_arena()  # as the command line does
    serve("sae-train", build)
