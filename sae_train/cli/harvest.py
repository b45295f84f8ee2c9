"""sae-train harvest: write activation shards, and held-out ones beside them, to disk.

The same command continues a harvest that was interrupted; whole shards are kept. As many rows are
written as `train.tokens` asks for, and `eval.tokens` held-out rows, outlier tokens included.
"""

import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from sae_train import stop
from sae_train.cli.compose import run_composed
from sae_train.cli.folder import Ownership, owned
from sae_train.cli.launch import goes_elsewhere, submit
from sae_train.cli.signals import StopSignals
from sae_train.cli.unused import row_keys
from sae_train.cli.wire import HELDOUT, wire
from sae_train.config import HarvestConfig, to_config
from sae_train.devices import pick_device
from sae_train.errors import InputError, StoppedEarly
from sae_train.member_set import members
from sae_train.shards.disk import ShardWriter
from sae_train.shards.shard import ShardStream
from sae_train.train.progress import Progress


def run(args: list[str]) -> int:
    return run_composed("harvest", args, lambda composed: harvest(composed, ["harvest", *args]))


def harvest(composed: DictConfig, args: list[str]) -> int:
    """Harvest into `out`, or have a cluster do it; returns 0."""
    config: HarvestConfig = to_config(composed)
    if config.source.name == "shards":
        raise InputError("source", "shards", "stream, tensors or synthetic: these rows are harvested already")
    hooks = list(dict.fromkeys(h for member in members(config, composed) for h in member.places.hooks))
    out = Path(config.out).expanduser()
    if goes_elsewhere(config.launch):
        if (size := config.launch.nodes * config.launch.tasks_per_node) > 1:
            wanted = "1: a harvest is made by one process"
            raise InputError("launch.nodes x launch.processes_per_node", size, wanted)
        return submit(config.launch, args, "out", out)
    with StopSignals() as signals, owned("out", out) as ownership:
        return _harvest(config, hooks, out, signals, ownership, args)


def _harvest(
    config: HarvestConfig,
    hooks: list[str],
    out: Path,
    signals: StopSignals,
    ownership: Ownership,
    args: list[str],
) -> int:
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    wired = wire(config, hooks, pick_device(config.model.device), {}, lambda dims: None)
    heldout = wired.heldout_shards()
    # Taking stock reads every byte that is there; a signal ends that at once.
    about: dict[str, Any] = {}
    if config.source.name == "stream":
        about = {"description": {"hooks": wired.description["hooks"]}, "config": row_keys(config)}
    parts = (
        (ShardWriter(out / HELDOUT, heldout, about), heldout, config.eval.tokens),
        (ShardWriter(out, wired.shards, about), wired.shards, config.train.tokens),
    )
    signals.defer()
    with Progress(config.train.tokens) as progress:
        for writer, shards, rows in parts:
            progress.phase("harvesting held-out rows" if shards is heldout else "harvesting")
            write(writer, shards, rows, ownership, progress)
    told = [arg for arg in args[1:] if not arg.startswith(("out=", "source="))]
    print("harvested:", shlex.join(["sae-train", "train", *told, "source=shards", f"source.path={out}"]))
    return 0


def write(
    writer: ShardWriter, shards: ShardStream, rows: int, ownership: Ownership, progress: Progress
) -> None:
    """Write shards until there are `rows` rows or the data ends; skips what an earlier call wrote.

    Raises:
        Interrupted: a stop was asked for; whole shards are kept.
        StoppedEarly: the device is full or fails; whole shards are kept.
    """
    if writer.complete and writer.rows >= rows:
        print(f"{writer.folder} is complete: {writer.rows} rows in {writer.shards} shards", file=sys.stderr)
        return
    writer.resume(shards)
    while writer.rows < rows:
        try:
            stop.check()
            shard = shards.next_shard()
        except stop.Interrupted as error:
            raise stop.Interrupted(
                f"{error}: {writer.shards} shards are written; the same command continues"
            ) from None
        if shard is None:
            break
        ownership.check()
        try:
            writer.write(shard)
        except OSError as error:
            raise StoppedEarly(
                f"shard {shard.index} could not be written ({error}); those before it are whole; "
                "make room and run the same command again"
            ) from error
        progress.update(writer.shards, writer.rows, {})
    writer.finish()
