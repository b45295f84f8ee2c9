"""The keys of `sweep`: how many runs, over which rows, and what a search looks for."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sae_train.errors import InputError
from sae_train.report.table import METRICS

PREFIX = "sweep."
PRUNERS = ("median", "hyperband", "none")


@dataclass
class SweepConfig:
    """`sweep`: the keys of `train`, and these as sweep.KEY."""

    dir: str | None = None
    """Folder of the sweep. Unset: runs/sweeps/<run.name>-<hash>: the same command continues the sweep."""
    share: Any = "auto"
    """Whether runs that would harvest the same rows read them from shards that are harvested once. auto: if
    there are several. true: always, or say why not. Cross-entropy is not measured on shards."""
    members_per_run: int | None = None
    """Most SAEs that one run trains. Unset: as many as fit the device."""
    max_runs: int = 100
    """A sweep of more runs is refused: it is a slip more often than a wish."""
    trials: int | None = None
    """Search instead of trying all combinations: how many SAEs to try (Optuna 5)."""
    batch: int = 1
    """With trials: how many are suggested at a time and trained in one run, on one harvest."""
    workers: int = 1
    """With trials: processes that suggest and train at the same time."""
    objective: str = "fvu"
    """What the best SAE has least of (most, where more is better): a number of the final table."""
    l0: float | None = None
    """The L0 at which SAEs are compared. Unset: at whatever they have."""
    l0_tolerance: float = 0.1
    """How far L0 may be from that, as a share of it. What is further off is never the best."""
    pruner: str = "median"
    """With trials: what ends runs that fall behind in held-out FVU: median, hyperband or none."""
    warmup_trials: int = 5
    """With trials: how many are drawn at random, and have ended before the median pruner ends one."""
    seed: int = 0
    """With trials: of what is suggested."""
    wandb: str | None = None
    """Write the sweep as a file for `wandb sweep`, and start nothing."""
    worker: int | None = None
    """Set by the command itself: which of several workers this process is."""

    def __post_init__(self) -> None:
        if self.share not in ("auto", True, False):
            raise InputError("sweep.share", self.share, "auto, true or false")
        least = {"members_per_run": 1, "max_runs": 1, "trials": 1, "batch": 1, "workers": 1, "seed": 0}
        for key, smallest in (least | {"warmup_trials": 1}).items():
            value = getattr(self, key)
            if value is not None and value < smallest:
                raise InputError(f"sweep.{key}", value, f"a whole number of at least {smallest}")
        if self.objective not in METRICS:
            raise InputError("sweep.objective", self.objective, f"one of {', '.join(METRICS)}")
        if not METRICS[self.objective].better:
            raise InputError("sweep.objective", self.objective, "a number of which less, or more, is better")
        if self.l0 is not None and not 0 < self.l0 < math.inf:
            raise InputError("sweep.l0", self.l0, "a number of latents above 0")
        if not 0 <= self.l0_tolerance < math.inf:
            raise InputError("sweep.l0_tolerance", self.l0_tolerance, "a share of at least 0")
        if self.pruner not in PRUNERS:
            raise InputError("sweep.pruner", self.pruner, ", ".join(PRUNERS))
        for key in ("dir", "wandb"):
            if (path := getattr(self, key)) is not None and not path.strip():
                raise InputError(f"sweep.{key}", path, "the name of a file or folder, or null")
        if self.trials is None and (self.batch > 1 or self.workers > 1):
            key = "batch" if self.batch > 1 else "workers"
            raise InputError(f"sweep.{key}", getattr(self, key), "1, or sweep.trials=N to search")

    @property
    def lower_is_better(self) -> bool:
        return METRICS[self.objective].better == "lower"

    @property
    def folder(self) -> Path | None:
        return None if self.dir is None else Path(self.dir).expanduser()


def read_options(args: Sequence[str]) -> SweepConfig:
    """The sweep's own keys, typed and checked.

    Args:
        args: those of the command that begin with `sweep.`.

    Raises:
        InputError: a key that is not there, or a value that it cannot have.
    """
    told: Any = OmegaConf.structured(SweepConfig)
    for arg in args:
        key, _, value = arg.partition("=")
        try:
            told = OmegaConf.merge(told, OmegaConf.from_dotlist([arg.removeprefix(PREFIX)]))
        except OmegaConfBaseException as error:
            known = key.removeprefix(PREFIX) in SweepConfig.__dataclass_fields__
            wanted = str(error).splitlines()[0] if known else "a key that sae-train sweep --help lists"
            raise InputError(key, value, wanted) from None
    try:
        config = OmegaConf.to_object(told)
    except OmegaConfBaseException as error:
        if isinstance(error.__cause__, InputError):
            raise error.__cause__ from None
        raise InputError("sweep", " ".join(args), str(error).splitlines()[0]) from None
    assert isinstance(config, SweepConfig)
    return config
