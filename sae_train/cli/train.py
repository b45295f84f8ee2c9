"""sae-train train: compose, check, wire, train, evaluate, publish into the run folder, report."""

import logging
import shlex
import sys
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from sae_train.checkpoint import Checkpointer
from sae_train.cli.compose import run_composed
from sae_train.cli.finish import finish
from sae_train.cli.signals import StopSignals
from sae_train.cli.wire import Wired, wire
from sae_train.config import Config, as_tree, members, run_folder, to_config
from sae_train.devices import native_bfloat16, pick_device
from sae_train.errors import InputError
from sae_train.evaluate import build_metrics, evaluate
from sae_train.files import write_bytes
from sae_train.log import MetricLog, setup_logging
from sae_train.train.clock import Clock
from sae_train.train.members import Member, MemberConfig
from sae_train.train.progress import Progress
from sae_train.train.record import RunRecord, versions
from sae_train.train.resume import check_fingerprint, check_resume
from sae_train.train.state import TrainState
from sae_train.train.stepper import AutogradStepper
from sae_train.train.trainer import Trainer

logger = logging.getLogger("sae_train.train")


def run(args: list[str]) -> int:
    return run_composed("train", args, lambda composed: train(composed, ["train", *args]))


def train(composed: DictConfig, args: list[str]) -> int:
    """Run (or continue) one training run; returns 0."""
    config: Config = to_config(composed)
    wanted = members(config, composed)
    check(config)
    folder = run_folder(config)
    record = RunRecord.read(folder)
    tree = as_tree(config) | {"members": {m.name: as_tree(m) for m in wanted}}
    if record is not None:
        check_resume(record.config, tree)
        if record.status == "done":
            print(f"{folder} is finished ({record.step} steps); its report is {folder / 'report.html'}")
            return 0
    make_folder(folder)
    setup_logging(folder)
    chosen = dict(record.chosen) if record is not None else {}
    device = pick_device(config.model.device)
    chosen["threads"] = config.run.threads or chosen.get("threads") or torch.get_num_threads()
    torch.set_num_threads(chosen["threads"])
    if chosen.setdefault("autocast", config.train.autocast) == "auto":
        chosen["autocast"] = "bfloat16" if native_bfloat16(device) else "float32"
    autocast = torch.bfloat16 if chosen["autocast"] == "bfloat16" else None

    clock = Clock()
    with clock.phase("loading"):
        wired = wire(config, [m.hook for m in wanted], device, chosen)
    for member in wanted:
        member.hook = wired.key(member.hook)
    if record is not None:
        check_fingerprint(record.fingerprint, dict(wired.source.fingerprint))
    steps = config.train.steps
    record = RunRecord(
        "running",
        tree,
        dict(wired.source.fingerprint),
        chosen,
        steps,
        command="sae-train " + shlex.join(args),
        versions=versions(),
    )
    try:
        return _train(config, folder, record, wired, wanted, clock, device, autocast)
    finally:
        wired.source.close()


def _train(
    config: Config,
    folder: Path,
    record: RunRecord,
    wired: Wired,
    wanted: list[MemberConfig],
    clock: Clock,
    device: torch.device,
    autocast: torch.dtype | None,
) -> int:
    steps = record.steps
    built = [
        Member(m, wired.source.dims[m.hook], steps, config.train.tokens, config.train.ema, device)
        for m in wanted
    ]
    state = TrainState(built, wired.source)
    checkpointer = Checkpointer(folder / "checkpoints", config.checkpoint.keep)
    loaded = checkpointer.load()
    if loaded is not None:
        with clock.phase("loading"):
            state.load_state_dict(loaded[1])
        clock.load_state_dict(state.extra["clock"])
        logger.info("continuing from step %d of %d", state.step, steps)
        print(f"continuing {folder} from step {state.step} of {steps}", file=sys.stderr)
    record.step, record.tokens = state.step, state.tokens
    record.write(folder)
    write_bytes(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(as_tree(config))).encode())
    eval_every = max(steps // 4, 1) if config.eval.every is None else config.eval.every
    with (
        StopSignals() as signals,
        MetricLog(folder, config.logger, record.config, state.extra.get("log")) as log,
        Progress(config.train.tokens, start_tokens=state.tokens) as progress,
    ):
        with clock.phase("model forward"):
            progress.phase("harvesting held-out rows")
            heldout = wired.heldout()
        if loaded is None:
            progress.phase("harvesting the first shard")
            with clock.phase("rows"):
                rows = wired.source.sample(config.source.shard_tokens)
            with clock.phase("initialisation"):
                for member in built:
                    member.initialise(rows)
        trainer = Trainer(
            stepper=AutogradStepper(config.train.accumulate, autocast),
            clock=clock,
            log=log,
            progress=progress,
            checkpointer=checkpointer,
            evaluate=lambda member: evaluate(member.trained(), member.hook, heldout, config.eval)[0],
            should_stop=signals.reason,
            batch_tokens=config.train.batch_tokens,
            log_every=config.logger.every,
            eval_every=eval_every,
            save_every=config.checkpoint.every,
            run_meta={"steps": steps, "versions": record.versions, "fingerprint": record.fingerprint},
            allow_short=config.corpus.allow_short,
        )
        progress.phase("training")
        status = "stopped"
        try:
            trainer.fit(state, steps)
            status = "done"
        finally:
            record.status = status
            record.step, record.tokens = state.step, state.tokens
            if status != "done":
                record.write(folder)
        wired.source.close()  # what is harvested ahead is not needed any more
        progress.phase("evaluating")
        finish(config, folder, record, wired, state, heldout, clock, log)
    record.write(folder)
    return 0


def check(config: Config) -> None:
    """What can be known to be wrong before anything is loaded."""
    if config.train.batch_tokens % config.source.lanes:
        raise InputError(
            "train.batch_tokens",
            config.train.batch_tokens,
            f"a multiple of source.lanes={config.source.lanes}",
        )
    build_metrics(config.eval.metrics, 1, 1)


def make_folder(folder: Path) -> None:
    """Create the run folder and see that it can be written, before anything costs time.

    Raises:
        InputError: it cannot be written, or it holds something that is not a run.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".tmp-writable"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise InputError("run.dir", str(folder), f"a folder that can be written ({error.strerror})") from None
