"""How a run computes: which kernels, and whether its steps are fused or go through autograd."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from sae_kernels import available_backends
from sae_kernels.dispatch import select
from torch import Tensor

from sae_train.errors import InputError
from sae_train.registry import nearest
from sae_train.train.end_to_end import EndToEndStepper, SplicedModel
from sae_train.train.fused import FusedStepper, cannot_fuse
from sae_train.train.members import Member
from sae_train.train.optim import CHOICES
from sae_train.train.stepper import AutogradStepper, Stepper

logger = logging.getLogger("sae_train.train")


@dataclass
class KernelsConfig:
    """What computes a step. Either choice may move the last bits of a run, nothing else."""

    backend: str = "auto"
    """auto takes for each op the first backend that can: cpu, triton, torch, reference. A name forces one."""
    stepper: str = "auto"
    """fused computes a step in a few sparse ops, autograd as the loss says; auto fuses where that works."""

    def __post_init__(self) -> None:
        known = ["auto", *available_backends()]
        if self.backend not in known:
            raise InputError("kernels.backend", self.backend, nearest(str(self.backend), known))
        if self.stepper not in ("auto", "autograd", "fused"):
            raise InputError("kernels.stepper", self.stepper, "auto, autograd or fused")


OPS = ("topk_encode", "sparse_decode", "gather_dot", "segment_rows", "dead_encode")
"""What every run may call; a backend asked for by name has to have them all."""
FUSED_OPS = ("decode_residual", "latent_step")


def choose_stepper(
    config: KernelsConfig,
    members: Sequence[Member],
    accumulate: int,
    autocast: torch.dtype | None,
    through: SplicedModel | None = None,
    weight: float = 1.0,
) -> Stepper:
    """The stepper of a run, all of its members together; says in the log which one it is and why.

    Args:
        config: what was asked for.
        members: every member of the run, on the device that trains.
        accumulate: micro-batches per step.
        autocast: dtype of matrix products, or None for float32.
        through: the language model to train through, with its loss of this `weight`; None trains on rows.

    Raises:
        InputError: the backend cannot run here, or fused steps are asked for, by name or by an option of
            `optim` that only they have, and cannot be had.
    """
    on_device = members[0].sae.input_scale
    missing = _cannot_run(config.backend, OPS, on_device)
    if missing is not None:
        raise InputError("kernels.backend", config.backend, f"auto, or one that runs here: {missing}")
    reasons = [why for member in members if (why := cannot_fuse(member, accumulate, autocast)) is not None]
    if (missing := _cannot_run(config.backend, FUSED_OPS, on_device)) is not None:
        reasons.append(missing)
    if through is not None:
        reasons = [f"train.loss={through.loss_name} goes through the language model"]
    if config.stepper == "fused" and reasons:
        raise InputError("kernels.stepper", config.stepper, f"auto or autograd: {reasons[0]}")
    if config.stepper == "autograd" or reasons:
        why = "kernels.stepper=autograd" if config.stepper == "autograd" else reasons[0]
        for optim in (member.config.optim for member in members):
            if (key := optim.beyond_adam()) is not None:
                plain = f"{CHOICES[key][0]}, or fused steps, which cannot be had: {why}"
                raise InputError(f"optim.{key}", getattr(optim, key), plain)
        logger.info("steps go through autograd: %s", why)
        if through is not None:
            return EndToEndStepper(through, weight, accumulate, autocast)
        return AutogradStepper(accumulate, autocast)
    asked = config.stepper == "fused"
    why = "kernels.stepper=fused" if asked else "every SAE is linear with top-k codes, under plain Adam"
    logger.info("steps are fused: %s", why)
    return FusedStepper(autocast)


def _cannot_run(backend: str, ops: Sequence[str], tensor: Tensor) -> str | None:
    """None, or why a backend asked for by name cannot run one of the ops where the tensor is."""
    for op in ops if backend != "auto" else ():
        try:
            select(op, backend, tensor)
        except ValueError as error:
            return str(error)
    return None
