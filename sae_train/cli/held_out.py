"""Rows that a run held out, for commands that look at published SAEs without training."""

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from sae_train.cli.eval import places_of, saved_config, wire_again
from sae_train.config import Config
from sae_train.errors import InputError
from sae_train.harvest.model import load_config
from sae_train.places import Places
from sae_train.train.record import RunRecord


def run_of(folder: Path) -> RunRecord | None:
    """The record of a run folder, or of the run that a published SAE lies in; None if it is neither."""
    for run_dir in (folder, folder.parent.parent):
        record = RunRecord.read(run_dir)
        if record is not None:
            return record
    return None


def config_of(folder: Path, record: RunRecord, trust_remote_code: bool) -> Config:
    """The configuration of a run.

    Raises:
        InputError: it is none, or would run a model's own code and the user has not allowed it.
    """
    config = saved_config(folder, record.config)
    if config.model.trust_remote_code and not trust_remote_code:
        names = " and ".join(filter(None, (config.model.name, config.model.other)))
        asked = f"true, to run the Python code of {names} as the run says it did"
        raise InputError("trust_remote_code", False, asked)
    return config


def held_out(config: Config, record: RunRecord, folders: list[Path], rows: int) -> dict[Path, Tensor]:
    """[n, d_in] held-out rows of what each SAE reads, at most so many, ordinary and outliers, as they come.

    Args:
        config: of the run. record: of the run. folders: of published SAEs. rows: at least 1.

    Raises:
        InputError: the run's model or data cannot be had, or an SAE's hook is none of its places.
    """
    config.eval = replace(config.eval, tokens=rows, ce_tokens=0, interval_ce_tokens=0)
    spelt = {folder: places_of(folder) for folder in folders}
    wired = wire_again(config, record, spelt.values())
    try:
        found = wired.heldout().rows
        out = {}
        for folder, places in spelt.items():
            read = Places(tuple(map(wired.key, places.inputs)))
            x, _ = read.batch({hook: found[hook][:rows] for hook in read.inputs})
            out[folder] = x.float().cpu()
        return out
    finally:
        wired.source.close()


def num_layers(config: Config) -> int | None:
    """Layers of the run's model; None where there is no model."""
    if config.source.name != "stream":
        return None
    count: int = load_config(config.model).get_text_config().num_hidden_layers
    return count
