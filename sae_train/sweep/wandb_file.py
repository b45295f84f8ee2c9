"""The same sweep for those who run sweeps with Weights & Biases: a file for `wandb sweep`.

    sae-train sweep experiment=demo 'optim.lr=interval(1e-4,1e-2)' sweep.trials=20 sweep.wandb=sweep.yaml
    wandb sweep sweep.yaml                      # prints the sweep's id
    wandb agent USER/sae-train/ID               # on every machine that shall take part

Each agent starts `sae-train train` with the values that the server picked, each as a run of its own: agents
share no harvest. `sae-train sweep` itself does, so this is for those who want the server to decide.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from sae_train.errors import InputError
from sae_train.files import write_bytes
from sae_train.redact import refuse_secrets
from sae_train.sweep.axes import ALIASES, Axis, K
from sae_train.sweep.options import SweepConfig

LOGGED = {"ce_increase": "ce_sae"}
"""What a run logs for a number that follows from it; of one model the two differ by a constant."""


def write_wandb(
    path: Path, fixed: Sequence[str], axes: Sequence[Axis], config: SweepConfig, name: str, member: str
) -> None:
    """Write the file.

    Args:
        fixed: arguments of `train` that do not vary.
        member: the SAE of each run, whose number is the objective.

    Raises:
        InputError: a value that may not be written down, or an axis that `train` has no key for.
    """
    if K in [axis.key for axis in axes] + [one.partition("=")[0] for one in fixed]:
        raise InputError(
            K, "...", "sae.activation.k or sae.activation.target_l0: wandb passes keys on as they are"
        )
    told: dict[str, Any] = {
        "name": name,
        "program": "sae-train",
        "method": "grid" if config.trials is None else "bayes",
        "metric": {
            "name": f"{member}/heldout/{LOGGED.get(config.objective, config.objective)}",
            "goal": "minimize" if config.lower_is_better else "maximize",
        },
        "parameters": {ALIASES.get(axis.key, axis.key): _parameter(axis) for axis in axes},
        "command": [
            "${env}",
            "sae-train",
            "train",
            *fixed,
            "logger.wandb=true",
            "logger.wandb_mode=online",
            "${args_no_hyphens}",
        ],
    }
    if config.trials is not None:
        told["run_cap"] = config.trials
    if config.trials is not None and config.pruner != "none":
        told["early_terminate"] = {"type": "hyperband", "min_iter": 1}
    refuse_secrets(told)
    write_bytes(path, yaml.safe_dump(told, sort_keys=False, allow_unicode=True).encode())


def _parameter(axis: Axis) -> dict[str, Any]:
    if axis.values is not None:
        return {"values": [_number(value) for value in axis.values]}
    kind = "log_uniform_values" if axis.log else "uniform"
    if axis.whole:
        low, high = int(axis.low), int(axis.high)
        return {"distribution": f"q_{kind}" if axis.log else "int_uniform", "min": low, "max": high}
    return {"distribution": kind, "min": axis.low, "max": axis.high}


def _number(value: str) -> int | float | str:
    """A value as the server should compare it: a number, if it is one."""
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value
