"""Ten small SAEs on one batch: one after the other, and in launches that they share.

The size is that of `make demo`: the encoder's product takes an H200 a few microseconds, and what a step
costs is its launches. Their k and learning rates differ, as in a grid. Both ways start from the same weights
and see the same rows; they may differ by the order of the norm's sum, by which gradients are clipped.
"""

import statistics
from typing import Any

import torch
from gpu_problem import PROBLEMS, Problem, dictionary, make_batches
from gpu_timing import Clock
from torch import Tensor

from sae_train.activations.topk import TopKConfig
from sae_train.batch import Batch
from sae_train.sae.linear import LinearConfig
from sae_train.train.fused import FusedStepper
from sae_train.train.members import Member, MemberConfig
from sae_train.train.optim import OptimConfig

DEMO = Problem("demo", 512, 576, 2304, 32)
CHECK_STEPS, LIMIT = {"cuda": 10, "cpu": 2}, 1e-2
"""Steps after which weights are compared, and by how much of what they moved they may differ."""


def make_members(p: Problem, w: Tensor, count: int) -> list[Member]:
    members = []
    for number in range(count):
        sae = LinearConfig(d_sae=p.f, activation=TopKConfig(k=p.k + 2 * (number % 2)), input_scale="none")
        optim = OptimConfig(lr=1e-3 * (1 + number), warmup=0.0, decay=0.0)
        config = MemberConfig(f"sae{number}", "rows", number, sae, optim)
        member = Member(config, p.d, 10**6, 10**12, 0.0, w.device)
        with torch.no_grad():
            member.sae.w_enc.copy_(w)
            member.sae.w_dec.copy_(w)
        members.append(member)
    return members


def run(device: str, repeats: int, saes: int) -> dict[str, Any]:
    """Milliseconds of a step of all SAEs, either way; `wrong` if their weights differ by more than LIMIT."""
    p = DEMO if device == "cuda" else PROBLEMS["tiny"]
    w = dictionary(p, device)
    batches = make_batches(p, w)
    clock, ms, host, ends = Clock(device), {}, {}, {}
    for name, at_once in (("turns", 1), ("together", saes)):
        members = make_members(p, w, saes)
        stepper = FusedStepper(torch.bfloat16, at_once)
        units = stepper.units(members)

        def step(number: int, units: list[list[Member]] = units, stepper: FusedStepper = stepper) -> None:
            x = batches[number % len(batches)]
            for unit in units:
                stepper.step_together(unit, [Batch(x, x)] * len(unit))

        for number in range(CHECK_STEPS[device]):
            step(number)
        ends[name] = [member.sae.w_dec.detach().clone() for member in members]
        times, host[name] = clock.steps(step, repeats)
        ms[name] = statistics.median(times)
    moved = [float((end - w).norm()) for end in ends["turns"]]
    apart = [float((a - b).norm()) for a, b in zip(ends["turns"], ends["together"], strict=True)]
    off = max(a / b for a, b in zip(apart, moved, strict=True))
    found = {
        "problem": {"n": p.n, "d": p.d, "f": p.f, "k": p.k},
        "saes": saes,
        "ms": ms,
        "host_ms": host,
        "off": off,
    }
    if not off <= LIMIT:
        found["wrong"] = f"weights are {off:.1e} of what they moved apart, where {LIMIT:.0e} is allowed"
    return found
