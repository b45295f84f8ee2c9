"""The search: Optuna's suggestions, kept in a journal that any number of processes append to.

    SWEEP/optuna.journal       every suggestion, every number reported, how each trial ended
    SWEEP/batches/NAME/        one run of suggested SAEs: who trains it (`.lock`), its job and its log

A trial is one SAE. Trials that are suggested together are trained in one run where they can be, for the
harvest is what a run costs. A trial that is RUNNING in the journal and has nobody who holds its batch was
killed: whoever comes next goes on with its run folder, from its checkpoint. What is suggested is a function
of the journal and the trial's number, so a continued search draws no point twice.
"""

import importlib.util
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from sae_train.errors import InputError, StoppedEarly
from sae_train.log import METRICS_FILE, read_metrics
from sae_train.report.table import complete
from sae_train.seeds import stable_seed
from sae_train.sweep.axes import Axis
from sae_train.sweep.drive import Driver, is_done, last_line, run_folder
from sae_train.sweep.options import SweepConfig
from sae_train.sweep.results import Row, members_of, off_target, read_rows
from sae_train.sweep.runs import ONLY, Layout, Run

if TYPE_CHECKING:
    import optuna

JOURNAL = "optuna.journal"
NAME = "sweep"
SLOT, VALUES, ENDED, NOTE = "run", "values", "pruned_at", "note"
"""What the journal keeps of a trial beside its numbers: its run, its values as the command line has them."""
FAR = 1.0
"""Added to the reported error of an SAE whose L0 stays off target: FVU is below 1 for any that is of use."""

Hold = Callable[[Path], AbstractContextManager[Any]]
"""Takes a folder for this process until it ends; raises InputError if another process has it."""


def check_optuna() -> None:
    """Raises InputError if it is not installed."""
    if importlib.util.find_spec("optuna") is None:
        raise InputError("sweep.trials", "a search", "Optuna: pip install 'sae-train[sweep]'")


@dataclass(frozen=True)
class Batch:
    """Trials that are trained in one run, and what holds its folder."""

    run: str
    trials: list["optuna.trial.Trial"]
    held: ExitStack


class Search:
    """One worker's part of a search.

    Args:
        folder: of the sweep. axes: what is searched.
        steps: of a run: what Hyperband divides.
    """

    def __init__(self, folder: Path, config: SweepConfig, axes: Sequence[Axis], steps: int) -> None:
        import optuna
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.folder, self.config, self.axes, self.steps = folder, config, list(axes), steps
        backend = JournalFileBackend(str(folder / JOURNAL))
        self.study = optuna.create_study(
            storage=optuna.storages.JournalStorage(backend),
            study_name=NAME,
            direction="minimize" if config.lower_is_better else "maximize",
            pruner=_pruner(config, steps),
            load_if_exists=True,
        )
        self._lock = FileLock(folder / ".ask.lock")

    def distributions(self) -> dict[str, "optuna.distributions.BaseDistribution"]:
        """The axes as Optuna knows them. Numbers in order are places in their list: neighbours are alike."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        out: dict[str, optuna.distributions.BaseDistribution] = {}
        for axis in self.axes:
            if axis.values is None and axis.whole:
                out[axis.key] = IntDistribution(int(axis.low), int(axis.high), log=axis.log)
            elif axis.values is None:
                out[axis.key] = FloatDistribution(axis.low, axis.high, log=axis.log)
            elif axis.rises:
                out[axis.key] = IntDistribution(0, len(axis.values) - 1)
            else:
                out[axis.key] = CategoricalDistribution(axis.values)
        return out

    def next_batch(self, hold: Hold) -> Batch | None:
        """Trials to train: those of a worker that was killed, else new ones. None: nothing is left to do."""
        from optuna.trial import Trial, TrialState

        with self._lock:
            trials = self.study.get_trials(deepcopy=False)
            left: dict[str, list[int]] = {}
            for trial in trials:
                if trial.state == TrialState.RUNNING:
                    slot = trial.user_attrs.get(SLOT, slot_of([trial.number]))
                    left.setdefault(slot, []).append(trial._trial_id)
            for slot, ids in left.items():
                if (held := self._held(slot, hold)) is not None:
                    batch = Batch(slot, [Trial(self.study, id) for id in ids], held)
                    return self._described(batch)
            count = min(self.config.batch, (self.config.trials or 0) - len(trials))
            if count < 1:
                return None
            self.study.sampler = self._sampler(len(trials))
            asked = [self.study.ask(self.distributions()) for _ in range(count)]
            slot = slot_of([trial.number for trial in asked])
            held = self._held(slot, hold)
            assert held is not None, f"{slot} is new and somebody has it"
            return self._described(Batch(slot, asked, held))

    def _held(self, slot: str, hold: Hold) -> ExitStack | None:
        held = ExitStack()
        try:
            held.enter_context(hold(self.folder / "batches" / slot))
        except InputError:  # a living worker has it
            return None
        return held

    def _described(self, batch: Batch) -> Batch:
        for trial in batch.trials:
            if SLOT not in trial.user_attrs:
                trial.set_user_attr(VALUES, self.values(trial.params))
                trial.set_user_attr(SLOT, batch.run)
        return batch

    def values(self, params: dict[str, Any]) -> list[str]:
        """A trial's value of each axis, as the command line has it."""
        out = []
        for axis in self.axes:
            value = params[axis.key]
            if axis.values is None:
                out.append(axis.spelt(value))
            else:
                out.append(axis.values[value] if axis.rises else value)
        return out

    def _sampler(self, number: int) -> "optuna.samplers.BaseSampler":
        from optuna.samplers import TPESampler

        seed = stable_seed(self.config.seed, number) % 2**32
        return TPESampler(seed=seed, n_startup_trials=self.config.warmup_trials)

    def train(self, batch: Batch, run: Run, driver: Driver) -> None:
        """Train a batch's run to its end, or until none of its trials is worth it, and tell the journal.

        Args:
            run: its members are the batch's trials, in order.

        Raises:
            Interrupted, StoppedEarly: the run has saved; its trials stay RUNNING, for whoever comes next.
        """
        reporters = [
            _Reporter(t, m, self.config, self.steps) for t, m in zip(batch.trials, run.members, strict=True)
        ]

        def ending() -> list[str]:
            records = _records(run_folder(self.folder, run.name))
            behind = [reporter.is_behind(records) for reporter in reporters]
            return [run.name] if all(behind) else []

        if not all(ENDED in trial.user_attrs for trial in batch.trials):
            driver.start(Layout((run,)))
            state = driver.wait(ending).get(run.name)
            ended = all(ENDED in trial.user_attrs for trial in batch.trials)
            if state == "stopped" and not ended and not is_done(self.folder, run.name):
                raise StoppedEarly(f"{run.name}: {last_line(driver.started[run.name].log)}")
            records = _records(run_folder(self.folder, run.name))
            for reporter in reporters:
                reporter.report(records)  # what came since the last look: later trials are compared with it
        self._tell(batch, run, driver)

    def _tell(self, batch: Batch, run: Run, driver: Driver) -> None:
        from optuna.trial import TrialState

        own = run_folder(self.folder, run.name)
        numbers = members_of(own / "summary.json") if is_done(self.folder, run.name) else {}
        for trial, member in zip(batch.trials, run.members, strict=True):
            metrics = complete(numbers.get(member, {}))
            value = metrics.get(self.config.objective, math.nan)
            if math.isfinite(value):
                if self.config.l0 is not None:
                    trial.set_constraint("l0", min(off_target(metrics, self.config), 1e9))
                self.study.tell(trial, value)
            elif not numbers and ENDED in trial.user_attrs:
                self.study.tell(trial, state=TrialState.PRUNED)
            else:
                why = f"{self.config.objective} is not there, or not finite"
                if not numbers and run.name in driver.started:
                    why = last_line(driver.started[run.name].log)
                self.fail(trial, why)

    def fail(self, trial: "optuna.trial.Trial", why: str) -> None:
        """Tell the journal that a trial came to nothing, and why."""
        from optuna.trial import TrialState

        trial.set_user_attr(NOTE, why)
        self.study.tell(trial, state=TrialState.FAIL)

    def is_over(self) -> bool:
        """Whether every trial has ended."""
        from optuna.trial import TrialState

        trials = self.study.get_trials(deepcopy=False)
        return len(trials) >= (self.config.trials or 0) and all(t.state != TrialState.RUNNING for t in trials)

    def rows(self) -> list[Row]:
        """A row for every trial so far."""
        words = {"PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running"}
        rows: list[Row] = []
        by_run: dict[str, list[Any]] = {}
        for trial in self.study.get_trials(deepcopy=False):
            if SLOT in trial.user_attrs:
                by_run.setdefault(trial.user_attrs[SLOT], []).append(trial)
        for slot, trials in by_run.items():
            names = labels_of([trial.number for trial in trials], self.config.batch)
            members = {
                name or ONLY: tuple(trial.user_attrs[VALUES])
                for name, trial in zip(names, trials, strict=True)
            }
            note = next((trial.user_attrs[NOTE] for trial in trials if NOTE in trial.user_attrs), "")
            said = {slot: (words.get(trials[0].state.name, "done"), note)}
            rows += read_rows(self.folder, [Run(slot, (), members)], said)
        return rows


class _Reporter:
    """Hands the held-out numbers of a run to the pruner as they come."""

    def __init__(self, trial: "optuna.trial.Trial", member: str, config: SweepConfig, steps: int) -> None:
        self.trial, self.member, self.config, self.steps = trial, member, config, steps
        known = trial.study.get_trials(deepcopy=False)[trial.number].intermediate_values
        self._last = max(known, default=0)

    def is_behind(self, records: Sequence[dict[str, Any]]) -> bool:
        """Whether the trial is not worth its time any more; the journal remembers that it was found so."""
        if ENDED not in self.trial.user_attrs and self.report(records) and self.trial.should_prune():
            self.trial.set_user_attr(ENDED, self._last)
        return ENDED in self.trial.user_attrs

    def report(self, records: Sequence[dict[str, Any]]) -> bool:
        """Report what is new; whether anything is."""
        key, news = f"{self.member}/heldout/", False
        for record in records:
            step, fvu = record["step"], record.get(f"{key}fvu")
            if not self._last < step < self.steps or fvu is None:  # the last one is the result
                continue
            self._last = step
            beyond = off_target({"l0": record.get(f"{key}l0") or math.nan}, self.config)
            if beyond > 0 and step < self.steps / 2:
                continue  # where L0 is steered, it takes a while to get there
            error = fvu + (FAR if beyond > 0 else 0.0)
            self.trial.report(error if self.config.lower_is_better else -error, step)
            news = True
        return news


def _records(folder: Path) -> list[dict[str, Any]]:
    """The numbers of a run so far."""
    return read_metrics(folder) if (folder / METRICS_FILE).is_file() else []


def _pruner(config: SweepConfig, steps: int) -> "optuna.pruners.BasePruner":
    import optuna

    if config.pruner == "hyperband":
        return optuna.pruners.HyperbandPruner(min_resource=max(1, steps // 9), max_resource=steps)
    if config.pruner == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=config.warmup_trials)
    return optuna.pruners.NopPruner()


def slot_of(numbers: Sequence[int]) -> str:
    """The name of a batch: `t0007`, or `t0004-t0007`."""
    first, last = f"t{numbers[0]:04}", f"t{numbers[-1]:04}"
    return first if first == last else f"{first}-{last}"


def labels_of(numbers: Sequence[int], batch: int) -> list[str]:
    """What the SAEs of a batch are called; where each has a run of its own it needs no name."""
    return [slot_of([number]) if batch > 1 else "" for number in numbers]
