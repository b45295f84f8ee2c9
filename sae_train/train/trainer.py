"""The training loop: pull rows, step every member, observe, log, evaluate, save.

The loop knows batches, losses and codes. It never asks what kind of SAE it is training.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch

from sae_train.checkpoint import Checkpointer
from sae_train.errors import InputError, NumericsError, StoppedEarly
from sae_train.log import MetricLog
from sae_train.losses import fvu
from sae_train.train.clock import Clock
from sae_train.train.members import Member
from sae_train.train.progress import Progress
from sae_train.train.state import TrainState
from sae_train.train.stepper import Step, Stepper

logger = logging.getLogger("sae_train.train")

MAX_SKIPPED_IN_A_ROW = 10
"""Steps in a row with non-finite gradients after which the run stops: it is not going to recover."""


@dataclass
class TrainConfig:
    """How long and in what pieces the members train."""

    tokens: int = 10_000_000
    """Rows of activations to train on (after filtering)."""
    batch_tokens: int = 4_096
    """Rows per optimizer step."""
    accumulate: int = 1
    """Micro-batches per step, to fit large batches in memory."""
    autocast: str = "auto"
    """Matrix products in bfloat16 (auto: where the hardware has it) or float32; masters are float32."""
    ema: float = 0.0
    """Decay of an average of weights that is evaluated and published instead of the last ones; 0 is off."""

    def __post_init__(self) -> None:
        for key in ("tokens", "batch_tokens", "accumulate"):
            if getattr(self, key) < 1:
                raise InputError(f"train.{key}", getattr(self, key), "a whole number of at least 1")
        if self.tokens < self.batch_tokens:
            raise InputError(
                "train.tokens", self.tokens, f"at least train.batch_tokens={self.batch_tokens}, one step"
            )
        if self.batch_tokens % self.accumulate:
            raise InputError(
                "train.accumulate", self.accumulate, f"a divisor of batch_tokens={self.batch_tokens}"
            )
        if self.autocast not in ("auto", "bfloat16", "float32"):
            raise InputError("train.autocast", self.autocast, "auto, bfloat16 or float32")
        if not 0 <= self.ema < 1:
            raise InputError("train.ema", self.ema, "a number in [0, 1)")

    @property
    def steps(self) -> int:
        return self.tokens // self.batch_tokens


@dataclass
class Trainer:
    """Everything `fit` works with besides the state.

    Attributes:
        stepper: how one step of one member is done.
        clock: where the time goes.
        log, progress: what people see.
        checkpointer: where the state is committed.
        evaluate: judges a member on held-out rows; None leaves evaluation out.
        should_stop: asked after each step; a reason ends the run early, saved.
        log_every, eval_every, save_every: steps; 0 is never.
        run_meta: JSON-able facts about the run stored with every checkpoint.
    """

    stepper: Stepper
    clock: Clock
    log: MetricLog
    progress: Progress
    checkpointer: Checkpointer
    evaluate: Callable[[Member], dict[str, float]] | None
    should_stop: Callable[[], str | None]
    batch_tokens: int
    log_every: int
    eval_every: int
    save_every: int
    run_meta: dict[str, Any]
    process: psutil.Process = field(default_factory=psutil.Process)
    allow_short: bool = False
    """End well, with a warning, when the data ends before the last step."""

    def fit(self, state: TrainState, steps: int) -> None:
        """Train until `state.step == steps`.

        Raises:
            StoppedEarly: a stop was asked for, or the data is out of reach; the state is saved.
            InputError: the data ended early or is damaged; the state is saved.
            NumericsError: too many steps in a row without finite gradients.
        """
        while state.step < steps:
            try:
                with self.clock.phase("rows"):
                    rows = state.source.next_batch()
            except (StoppedEarly, InputError):
                if state.step > 0:
                    self.save(state)
                raise
            if rows is None:
                self.save(state)
                if self.allow_short:
                    logger.warning("the data ended at step %d of %d; the run ends there", state.step, steps)
                    return
                raise InputError(
                    "train.tokens",
                    steps * self.batch_tokens,
                    f"at most the {state.tokens} rows that the data gave (saved at step {state.step}); "
                    "with more passes (corpus.epochs or source.epochs) or corpus.allow_short=true it goes on",
                )
            with self.clock.phase("SAE step"):
                done = [self._step(member, member.batch(rows), state.step) for member in state.members]
            state.step += 1
            state.tokens += len(rows.ids)
            last = state.step == steps
            if last or (self.log_every and state.step % self.log_every == 0):
                self._observe(state, done)
            if (
                self.evaluate is not None
                and self.eval_every
                and not last
                and state.step % self.eval_every == 0
            ):
                self.judge(state)
            stop = self.should_stop()
            if last or stop is not None or (self.save_every and state.step % self.save_every == 0):
                self.save(state)
            if stop is not None and not last:
                raise StoppedEarly(
                    f"{stop}: saved at step {state.step}; the same command continues from there"
                )

    def _step(self, member: Member, batch: Any, step: int) -> Step:
        member.refresh_dead(step)
        return self.stepper.step(member, batch)

    @torch.no_grad()
    def _observe(self, state: TrainState, done: list[Step]) -> None:
        """Log scalars of the last step. Reading them synchronises with the device: every log_every steps."""
        shown: dict[str, dict[str, float]] = {}
        for member, step in zip(state.members, done, strict=True):
            losses = step.losses
            scalars = {f"loss/{name}": float(term) for name, term in losses.terms.items()}
            scalars["loss"] = float(losses.total)
            scalars["fvu"] = float(fvu(step.batch.y, losses.y_hat))
            scalars["l0"] = float(losses.codes.l0().double().mean())
            scalars["dead"] = float(member.stats.dead(member.dead_after_tokens).double().mean())
            scalars["lr"] = float(member.schedule.get_last_lr()[0])
            scalars["grad_norm"] = float(step.grad_norm)
            scalars["skipped_steps"] = float(member.skipped)
            shown[member.name] = scalars
        flat = {f"{name}/{key}": value for name, scalars in shown.items() for key, value in scalars.items()}
        flat["seconds"] = self.clock.total()
        flat["tokens_per_s"] = state.tokens / flat["seconds"]
        flat["rss_bytes"] = float(self.process.memory_info().rss)
        self.log.write(state.step, state.tokens, flat)
        self.progress.update(state.step, state.tokens, shown)
        for member in state.members:
            if (bad := int(member.skipped_in_a_row)) > MAX_SKIPPED_IN_A_ROW:
                raise NumericsError(
                    f"{member.name}: gradients were not finite for {bad} steps in a row (step {state.step}); "
                    "the last good checkpoint is kept. Lower optim.lr or look at the rows"
                )

    def judge(self, state: TrainState) -> dict[str, dict[str, float]]:
        """Evaluate every member and log the numbers under `heldout/`."""
        assert self.evaluate is not None
        out: dict[str, dict[str, float]] = {}
        self.progress.phase("evaluating")
        with self.clock.phase("evaluation"):
            for member in state.members:
                out[member.name] = self.evaluate(member)
        flat = {
            f"{name}/heldout/{key}": value for name, numbers in out.items() for key, value in numbers.items()
        }
        self.log.write(state.step, state.tokens, flat)
        self.progress.phase("training")
        return out

    def save(self, state: TrainState) -> None:
        """Commit the state of this step."""
        self.progress.phase("saving")
        with self.clock.phase("checkpoint"):
            state.extra["log"] = self.log.state_dict()
            state.extra["clock"] = self.clock.state_dict()
            state.extra["producer"] = dict(state.source.seconds)
            try:
                self.checkpointer.save(state.step, state.state_dict(), self.run_meta)
            except OSError as error:
                raise StoppedEarly(
                    f"step {state.step} could not be saved ({error}); the checkpoints before it are whole: "
                    "make room, and the same command continues from the newest"
                ) from error
        self.progress.phase("training")
