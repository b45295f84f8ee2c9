"""The training loop: pull rows, step every member, observe, log, evaluate, save.

The loop knows batches, losses and codes. It never asks what kind of SAE it is training.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from sae_kernels import fallbacks

from sae_train import stop
from sae_train.batch import RowBatch
from sae_train.errors import InputError, LostProcess, NumericsError, StoppedEarly
from sae_train.log import MetricLog
from sae_train.losses import fvu
from sae_train.places import Places
from sae_train.ranks import ALONE, Ranks
from sae_train.sae.base import SAE
from sae_train.train.clock import Clock
from sae_train.train.members import Member, judged_together
from sae_train.train.progress import Progress
from sae_train.train.resample import resample_member
from sae_train.train.saver import Saver
from sae_train.train.side_by_side import SideBySide
from sae_train.train.state import TrainState
from sae_train.train.stepper import Step, Stepper
from sae_train.train.system import SystemMeter, worst

logger = logging.getLogger("sae_train.train")

STEPS = 1_000
"""Steps at least of a run that does not say its batch: fewer cost quality, at equal tokens
(docs/benchmarks.md, "Learning rate, batch and decay")."""
BATCHES = (512, 1_024, 2_048, 4_096)

MAX_SKIPPED_IN_A_ROW = 10
"""Steps in a row with non-finite gradients after which the run stops: it is not going to recover."""


@dataclass
class TrainConfig:
    """How long and in what pieces the members train."""

    tokens: int = 10_000_000
    """Rows of activations to train on (after filtering)."""
    batch_tokens: int = 0
    """Rows per optimizer step; 0 chooses: of 512, 1,024, 2,048 and 4,096 the most that makes 1,000 steps."""
    accumulate: int = 1
    """Micro-batches per step, to fit large batches in memory."""
    autocast: str = "auto"
    """Matrix products in bfloat16 (auto: where the hardware has it) or float32; masters are float32. Fused
    steps on a CPU round nothing for it but products of dead latents: they are as fast without."""
    spike_sds: float = 6.0
    """A step is left out if its loss is this many standard deviations above the mean of the last
    spike_window ones; 0 is off."""
    spike_window: int = 128
    """Losses that a spike is told by; the first ones of a run never are one."""
    resample_every: int = 0
    """Steps between times at which dead latents start anew from badly reconstructed rows; 0 is never. As many
    are left after the last time. An alternative to AuxK (sae.auxk_coefficient=0)."""
    loss: str = "rows"
    """rows minimises the error of rows; kl and ce train through the language model, with its loss when
    the SAE stands in its place beside that of rows. Slow: for the end of a training (see `start`)."""
    loss_weight: float = 1.0
    """Weight of the language model's loss, which is first made as large as the rows' error."""
    ema: float = 0.0
    """Decay of an average of weights that is evaluated and published instead of the last ones; 0 is off."""

    def __post_init__(self) -> None:
        for key in ("tokens", "accumulate"):
            if getattr(self, key) < 1:
                raise InputError(f"train.{key}", getattr(self, key), "a whole number of at least 1")
        if self.batch_tokens < 0:
            raise InputError("train.batch_tokens", self.batch_tokens, "a whole number of at least 1, or 0")
        batch = self.batch_tokens or batch_for(self.tokens)
        if self.tokens < batch:
            raise InputError("train.tokens", self.tokens, f"at least train.batch_tokens={batch}, one step")
        if batch % self.accumulate:
            raise InputError("train.accumulate", self.accumulate, f"a divisor of batch_tokens={batch}")
        if self.autocast not in ("auto", "bfloat16", "float32"):
            raise InputError("train.autocast", self.autocast, "auto, bfloat16 or float32")
        if not 0 <= self.spike_sds < math.inf:
            raise InputError("train.spike_sds", self.spike_sds, "a number of at least 0 (0 is off)")
        if self.spike_window < 2:
            raise InputError("train.spike_window", self.spike_window, "a whole number of at least 2")
        if self.resample_every < 0:
            raise InputError("train.resample_every", self.resample_every, "a number of steps, or 0 for never")
        if self.loss not in ("rows", "kl", "ce"):
            raise InputError("train.loss", self.loss, "rows, kl or ce")
        if not 0 <= self.loss_weight < math.inf:
            raise InputError("train.loss_weight", self.loss_weight, "a number of at least 0")
        if not 0 <= self.ema < 1:
            raise InputError("train.ema", self.ema, "a number in [0, 1)")

    def settle(self) -> None:
        """Write what follows from other keys into its place; not when made, as defaults are made early."""
        self.batch_tokens = self.batch_tokens or batch_for(self.tokens)

    @property
    def steps(self) -> int:
        return self.tokens // self.batch_tokens


def batch_for(tokens: int) -> int:
    """Rows per step for a budget of rows."""
    return max((size for size in BATCHES if size * STEPS <= tokens), default=BATCHES[0])


@dataclass
class Trainer:
    """Everything `fit` works with besides the state.

    Attributes:
        stepper: how one step of one member is done.
        clock: where the time goes.
        log, progress: what people see; the lead alone has a log.
        saver: commits the state.
        evaluate: judges SAEs on held-out rows, numbers first; None leaves evaluation out.
        log_every, eval_every, save_every: steps; 0 is never.
        ranks: the processes of the run, each with some of its members.
    """

    stepper: Stepper
    clock: Clock
    log: MetricLog | None
    progress: Progress
    saver: Saver
    evaluate: Callable[[list[tuple[SAE, Places]]], list[tuple[dict[str, float], Any]]] | None
    batch_tokens: int
    log_every: int
    eval_every: int
    save_every: int
    ranks: Ranks = ALONE
    meter: SystemMeter = field(default_factory=SystemMeter)
    fallbacks_seen: dict[str, int] = field(default_factory=fallbacks)
    """Of the kernels, in this process, at the last log line; the next one shows what came since."""
    side_by_side: SideBySide = field(default_factory=SideBySide)
    """How many members step at a time."""
    resample_every: int = 0
    """Steps; 0 is never."""
    allow_short: bool = False
    """End well, with a warning, when the data ends before the last step."""

    def fit(self, state: TrainState, steps: int) -> None:
        """Train until `state.step == steps`.

        Raises:
            Interrupted: a stop was asked for; the state is saved.
            StoppedEarly: the data, or the device that saves, is out of reach; saved as far as that goes, or
                another process is (LostProcess).
            InputError: the data ended early or is damaged; the state is saved.
            NumericsError: too many steps in a row without finite gradients; the last good checkpoint is kept.
        """
        try:
            with self.side_by_side:
                self._fit(state, steps)
        except stop.Interrupted as error:
            self.save(state)
            raise stop.Interrupted(
                f"{error}: saved at step {state.step}; the same command continues from there"
            ) from None
        except LostProcess:
            raise  # a state is saved by all or not at all
        except (StoppedEarly, InputError):
            # Those of the data. Where saving itself is what failed there is nothing left to try.
            if self.saver.failures == 0 and state.step > 0:
                self.save(state)
            raise
        except Exception:
            self.saver.join()  # an earlier, good state may be on its way to the disk
            raise

    def _fit(self, state: TrainState, steps: int) -> None:
        due = state.step == 0  # a disk that takes no checkpoint is found out now, not in an hour
        if self._is_judged_at(state.step, steps) and state.extra.get("judged") != state.step:
            self.judge(state)  # the earlier leg was stopped before it could
        units = self.stepper.units(state.members)
        done: list[Step] | None = None  # empty where a process has no members
        while state.step < steps:
            if not self.saver.poll(self.ranks):
                self.save(state)
            if due and self.saver.idle:
                self._start_saving(state)
                due = False
            try:
                with self.clock.phase("rows"):
                    # An error of one process's disk or network, or of its share of the harvest, ends all.
                    rows = self.ranks.all_do(state.source.next_batch)
            except NumericsError:  # the rows are bad, not what was trained on those before
                self.save(state)
                raise
            if rows is None:
                self._end_of_data(state, steps, done)
                return
            with self.clock.phase("SAE step"):
                left = steps - state.step - 1
                step = partial(self._step, rows=rows.widened(), step=state.step, left=left)
                parts = self.side_by_side.each(step, units)
                of_member = {name: one for part in parts for name, one in part.items()}
                done = [of_member[member.name] for member in state.members]
                state.ledger.add(rows.ids)
            state.step += 1
            state.tokens += len(rows.ids)
            last = state.step == steps
            if last or (self.log_every and state.step % self.log_every == 0):
                self._observe(state, done)
            if self._is_judged_at(state.step, steps):
                self.judge(state)
            if self.ranks.any(stop.reason() is not None) and not last:
                raise stop.Interrupted(stop.reason() or "another process was asked to stop")
            due = due or bool(self.save_every and state.step % self.save_every == 0)
        self.save(state)

    def _is_judged_at(self, step: int, steps: int) -> bool:
        """Whether members are evaluated after this step. The end of a run has its own, larger evaluation."""
        wanted = self.evaluate is not None and self.eval_every > 0
        return wanted and 0 < step < steps and step % self.eval_every == 0

    def _end_of_data(self, state: TrainState, steps: int, done: list[Step] | None) -> None:
        if self.allow_short:
            if done is not None and not (self.log_every and state.step % self.log_every == 0):
                self._observe(state, done)  # as after the last step of any run
            self.save(state)
            logger.warning("the data ended at step %d of %d; the run ends there", state.step, steps)
            return
        raise InputError(
            "train.tokens",
            steps * self.batch_tokens,
            f"at most the {state.tokens} rows that the data gave (saved at step {state.step}); "
            "with more passes (corpus.epochs or source.epochs) or corpus.allow_short=true it goes on",
        )

    def _step(self, unit: list[Member], rows: RowBatch, step: int, left: int) -> dict[str, Step]:
        for member in unit:
            member.begin_step(step)
        taken: dict[Places, Any] = {}
        for member in unit:
            if member.places not in taken:
                taken[member.places] = self.stepper.take(member, rows)
        done = self.stepper.step_together(unit, [taken[member.places] for member in unit])
        # A latent that starts anew needs steps to learn: as many as there are between two times, at least.
        if self.resample_every and (step + 1) % self.resample_every == 0 and left >= self.resample_every:
            for member, own in zip(unit, done, strict=True):
                resample_member(member, own, step)
        return {member.name: own for member, own in zip(unit, done, strict=True)}

    @torch.no_grad()
    def _observe(self, state: TrainState, done: list[Step]) -> None:
        """Log scalars of the last step. Reading them synchronises with the device: every log_every steps."""
        own: dict[str, dict[str, float]] = {}
        for member, step in zip(state.members, done, strict=True):
            losses, split = step.losses, member.split
            scalars = {f"loss/{name}": float(term) for name, term in losses.terms.items()}
            scalars["loss"] = float(losses.total)
            y, y_hat = (torch.cat(split.rows.gather(rows)) for rows in (step.batch.y, losses.y_hat))
            scalars["fvu"] = float(fvu(y, y_hat))
            scalars["l0"] = float(split.mean(split.total(losses.codes.l0().double().mean())))
            dead = member.stats.dead(member.dead_after_tokens).double().mean()
            scalars["dead"] = float(split.total(dead) / split.latents.size)
            scalars["lr"] = float(member.schedule.get_last_lr()[0])
            scalars["grad_norm"] = float(step.grad_norm)
            scalars["skipped_steps"] = float(member.skipped)
            scalars["loss_spikes"] = float(member.spikes.spikes)
            scalars["skipped_in_a_row"] = float(member.skipped_in_a_row)
            own[member.name] = scalars
        told = self.ranks.gather((own, self.meter.read(state.tokens)))
        shown = {name: scalars for part, _ in told for name, scalars in part.items()}
        in_a_row = {name: scalars.pop("skipped_in_a_row") for name, scalars in shown.items()}
        flat = {f"{name}/{key}": value for name, scalars in shown.items() for key, value in scalars.items()}
        flat["seconds"] = self.clock.total()
        flat["tokens_per_s"] = state.tokens / flat["seconds"]
        flat |= worst([readings for _, readings in told])
        before, self.fallbacks_seen = self.fallbacks_seen, fallbacks()
        flat |= {f"kernels/{name}": float(n - before.get(name, 0)) for name, n in self.fallbacks_seen.items()}
        if self.log is not None:
            self.log.write(state.step, state.tokens, flat)
        self.progress.update(state.step, state.tokens, shown)
        for name, bad in in_a_row.items():
            if bad > MAX_SKIPPED_IN_A_ROW:
                raise NumericsError(
                    f"{name}: gradients were not finite for {bad:.0f} steps in a row (step {state.step}); "
                    "the last good checkpoint is kept. Lower optim.lr or look at the rows"
                )

    def judge(self, state: TrainState) -> dict[str, dict[str, float]]:
        """Evaluate every member and log the numbers under `heldout/`."""
        assert self.evaluate is not None
        own: dict[str, dict[str, float]] = {}
        self.progress.phase("evaluating")
        with self.clock.phase("evaluation"):
            for wholes in judged_together(state.members):
                judged = self.evaluate([(whole.sae, whole.places) for whole in wholes])
                own |= {whole.name: numbers for whole, (numbers, _) in zip(wholes, judged, strict=True)}
        out = {name: numbers for part in self.ranks.gather(own) for name, numbers in part.items()}
        flat = {
            f"{name}/heldout/{key}": value for name, numbers in out.items() for key, value in numbers.items()
        }
        if self.log is not None:
            self.log.write(state.step, state.tokens, flat)
        state.extra["judged"] = state.step
        self.progress.phase("training")
        return out

    def save(self, state: TrainState) -> None:
        """Commit the state of this step before anything else happens."""
        self.progress.phase("saving")
        with self.clock.phase("checkpoint"):
            self.saver.now(state.step, self._gather(state))
        self.progress.phase("training")

    def _start_saving(self, state: TrainState) -> None:
        with self.clock.phase("checkpoint"):
            self.saver.start(state.step, self._gather(state))

    def _gather(self, state: TrainState) -> dict[str, Any]:
        if self.log is not None:
            state.extra["log"] = self.log.state_dict()
        state.extra["clock"] = self.clock.state_dict()
        state.extra["producer"] = dict(state.source.seconds)
        return state.state_dict()
