"""How a run computes: which kernels, and whether its steps are fused or go through autograd."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sae_kernels import available_backends
from sae_kernels.dispatch import select, way_of
from torch import Tensor

from sae_train.batch import RowBatch
from sae_train.errors import InputError
from sae_train.registry import nearest
from sae_train.train.end_to_end import EndToEndStepper, SplicedModel
from sae_train.train.fused import FusedStepper, cannot_fuse
from sae_train.train.members import Member
from sae_train.train.optim import CHOICES
from sae_train.train.stepper import AutogradStepper, Step, Stepper

logger = logging.getLogger("sae_train.train")


@dataclass
class KernelsConfig:
    """What computes a step. Either choice may move the last bits of a run, nothing else."""

    backend: str = "auto"
    """auto takes for each op the first backend that can: cpu, triton, torch, reference. A name forces one."""
    stepper: str = "auto"
    """fused computes a step in a few sparse ops, autograd as the loss says; auto fuses the steps of every
    member of which that works."""
    together: str = "auto"
    """Members of one shape whose steps are fused share launches: always, never, or, on auto, on a GPU that
    would wait for launches."""

    def __post_init__(self) -> None:
        known = ["auto", *available_backends()]
        if self.backend not in known:
            raise InputError("kernels.backend", self.backend, nearest(str(self.backend), known))
        if self.stepper not in ("auto", "autograd", "fused"):
            raise InputError("kernels.stepper", self.stepper, "auto, autograd or fused")
        if self.together not in ("auto", "always", "never"):
            raise InputError("kernels.together", self.together, "auto, always or never")


OPS = ("topk_encode", "sparse_decode", "gather_dot", "segment_rows", "dead_encode")
"""What every run may call; a backend asked for by name has to have them all."""
FUSED_OPS = ("decode_residual", "latent_step")
MOST_TOGETHER = 16
"""Members that share launches; each has temporaries of its own."""
SMALL_FLOP = 1e11
"""Of a step's encoder product. A GPU takes a tenth of a millisecond for that, and launching a step at least
four tenths: reckoned, not measured."""
MAX_NAMED = 8
"""Members that a line of the log names."""


def choose_stepper(
    config: KernelsConfig,
    members: Sequence[Member],
    accumulate: int,
    autocast: torch.dtype | None,
    through: SplicedModel | None = None,
    weight: float = 1.0,
    rows: int = 0,
) -> Stepper:
    """The stepper of a run; says in the log which it is, for which members if not for all, and why.

    Args:
        config: what was asked for.
        members: every member of the run, on the device that trains.
        accumulate: micro-batches per step.
        autocast: dtype of matrix products, or None for float32.
        through: the language model to train through, with its loss of this `weight`; None trains on rows.
        rows: of a step.

    Raises:
        InputError: the backend cannot run here, or fused steps are asked for, by name or by an option of
            `optim` that only they have, and cannot be had.
    """
    on_device = members[0].sae.input_scale
    on_cpu = on_device.device.type == "cpu"
    missing = _cannot_run(config.backend, OPS, on_device)
    if missing is not None:
        raise InputError("kernels.backend", config.backend, f"auto, or one that runs here: {missing}")
    every = _cannot_run(config.backend, FUSED_OPS, on_device)  # a reason that holds for all members
    if through is not None:
        every = f"train.loss={through.loss_name} goes through the language model"
    if config.stepper == "autograd":
        every = "kernels.stepper=autograd"
    reasons = {m.name: every or cannot_fuse(m, accumulate, autocast) for m in members}
    unfused = {name: why for name, why in reasons.items() if why is not None}
    first = next(iter(unfused.values()), "")
    if config.stepper == "fused" and unfused:
        raise InputError("kernels.stepper", config.stepper, "auto or autograd: " + first)
    for member in members:
        key = member.config.optim.beyond_adam()
        if key is not None and member.name in unfused:
            plain = f"{CHOICES[key][0]}, or fused steps, which cannot be had: {unfused[member.name]}"
            raise InputError(f"optim.{key}", getattr(member.config.optim, key), plain)
    if not unfused:
        asked = config.stepper == "fused"
        why = "kernels.stepper=fused" if asked else "every SAE is linear with top-k codes, under plain Adam"
        faster = FusedStepper(autocast, at_once(config, members, rows), only_dead=on_cpu)
        shared = [len(unit) for unit in faster.units(members) if len(unit) > 1]
        logger.info("steps are fused: %s%s", why, f"; {sum(shared)} SAEs share launches" if shared else "")
        return faster
    if len(unfused) == len(members):
        logger.info("steps go through autograd: %s", first)
        if through is not None:
            return EndToEndStepper(through, weight, accumulate, autocast)
        return AutogradStepper(accumulate, autocast)
    fused = [name for name in reasons if name not in unfused]
    told = f"{len(fused)} of {len(members)} SAEs" if len(fused) > MAX_NAMED else ", ".join(fused)
    logger.info("steps of %s are fused, the others go through autograd: %s", told, first)
    own = [member for member in members if member.name in fused]
    faster = FusedStepper(autocast, at_once(config, own, rows), only_dead=on_cpu)
    return MixedStepper(fused, faster, AutogradStepper(accumulate, autocast))


def at_once(config: KernelsConfig, members: Sequence[Member], rows: int) -> int:
    """How many members of one shape, of which all can be fused, may share launches."""
    weights = [form.w_enc for member in members if (form := member.sae.latents()) is not None]
    backend, _ = select("latent_step", config.backend, weights[0].detach())
    shares = weights[0].is_cuda and way_of(backend, "latent_step_many") is not None
    return most_together(config, shares, 2 * rows * max(w.numel() for w in weights))


def most_together(config: KernelsConfig, shares: bool, flop: int) -> int:
    """How many SAEs may share launches, where there is a way to, with so much work in the product of one."""
    wanted = config.together == "always" or (config.together == "auto" and shares and flop <= SMALL_FLOP)
    return MOST_TOGETHER if wanted else 1


class MixedStepper:
    """Each member as it can be: the steps of some are fused, those of the others go through autograd.

    Args:
        fused: names of the members whose steps are.
        faster, other: what does them, and what does the rest.
    """

    def __init__(self, fused: Sequence[str], faster: Stepper, other: Stepper) -> None:
        self.fused, self.faster, self.other = frozenset(fused), faster, other

    def _of(self, member: Member) -> Stepper:
        return self.faster if member.name in self.fused else self.other

    def take(self, member: Member, rows: RowBatch) -> Any:
        return self._of(member).take(member, rows)

    def step(self, member: Member, batch: Any) -> Step:
        return self._of(member).step(member, batch)

    def units(self, members: Sequence[Member]) -> list[list[Member]]:
        fused = [member for member in members if member.name in self.fused]
        others = [member for member in members if member.name not in self.fused]
        return self.faster.units(fused) + self.other.units(others)

    def step_together(self, members: Sequence[Member], batches: Sequence[Any]) -> list[Step]:
        return self._of(members[0]).step_together(members, batches)


def _cannot_run(backend: str, ops: Sequence[str], tensor: Tensor) -> str | None:
    """None, or why a backend asked for by name cannot run one of the ops where the tensor is."""
    for op in ops if backend != "auto" else ():
        try:
            select(op, backend, tensor)
        except ValueError as error:
            return str(error)
    return None
