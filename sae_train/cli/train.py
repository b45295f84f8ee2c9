"""sae-train train: compose, check, wire, train, evaluate, publish into the run folder, report."""

import logging
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from sae_kernels import use_backend

from sae_train import stop
from sae_train.checkpoint import Checkpointer
from sae_train.cli.check import check, check_rows, check_starts, check_widths, hooks_of, load_starts
from sae_train.cli.compose import run_composed
from sae_train.cli.finish import finish, timed
from sae_train.cli.fit import refuse_unfit
from sae_train.cli.folder import SEEN_WITHIN_S, Ownership, owned, wait_to_see
from sae_train.cli.launch import goes_elsewhere, submit
from sae_train.cli.signals import StopSignals
from sae_train.cli.wire import Wired, wire
from sae_train.config import Config, as_tree, run_folder, to_config
from sae_train.devices import native_bfloat16, pick_device
from sae_train.errors import InputError
from sae_train.evaluate import evaluate
from sae_train.files import write_bytes
from sae_train.log import METRICS_FILE, MetricLog, new_wandb_id, setup_logging
from sae_train.member_set import members
from sae_train.ranks import Ranks, joined
from sae_train.split import Split, divided
from sae_train.train.clock import Clock
from sae_train.train.kernels import choose_stepper
from sae_train.train.members import Member, MemberConfig
from sae_train.train.progress import Progress
from sae_train.train.record import RunRecord, versions
from sae_train.train.resume import check_fingerprint, check_resume, flatten
from sae_train.train.saver import Saver
from sae_train.train.side_by_side import SideBySide
from sae_train.train.state import TrainState, seed_rng
from sae_train.train.stepper import AutogradStepper
from sae_train.train.trainer import Trainer

INIT_ROWS = 32_768
"""Rows that the weights start from (as many as Gao et al. 2024); a permuted shard's first are a sample."""

logger = logging.getLogger("sae_train.train")


def run(args: list[str]) -> int:
    return run_composed("train", args, lambda composed: train(composed, ["train", *args]))


def train(composed: DictConfig, args: list[str]) -> int:
    """Run (or continue) one training run, or have a cluster do it; returns 0."""
    config: Config = to_config(composed)
    wanted = members(config, composed)
    check(config)
    folder = run_folder(config)
    if goes_elsewhere(config.launch):
        return submit(config.launch, args, "run.dir", folder)
    with StopSignals() as signals, joined(config.mesh, config.model.device) as ranks:
        check_alike(ranks, folder, as_tree(config))
        split = divided(ranks, config.mesh)
        with ExitStack() as held:
            owner = Owner(folder)
            ranks.lead_does(lambda: owner.hold(held))
            owner.show(ranks, min(SEEN_WITHIN_S, config.mesh.timeout_s / 2))
            command = "sae-train " + shlex.join(args)
            return _run(config, wanted, folder, command, signals, owner.check, ranks, split)


class Owner:
    """The hold on the run folder, which the lead has for all processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ownership: Ownership | None = None

    def hold(self, held: ExitStack) -> None:
        self.ownership = held.enter_context(owned("run.dir", self.folder))

    def show(self, ranks: Ranks, within_s: float) -> None:
        """Raises InputError, in all, if a process does not see the folder that the lead holds."""
        token = ranks.gather(self.ownership and self.ownership.token)[0]
        ranks.all_do(lambda: wait_to_see("run.dir", self.folder, token, within_s))

    def check(self) -> None:
        """As `Ownership.check`; processes that do not own the folder leave that to the one that does."""
        if self.ownership is not None:
            self.ownership.check()


def check_alike(ranks: Ranks, folder: Path, tree: dict[str, Any]) -> None:
    """Raises InputError if processes of one run were told different things, or run different releases."""
    told = flatten(tree) | {"run.dir": str(folder)} | versions()
    for other, theirs in enumerate(ranks.gather(told)):
        for key in sorted(told.keys() | theirs.keys()):
            if (mine := told.get(key)) != theirs.get(key):
                wanted = f"the same in every process; process {other} has {theirs.get(key)!r}"
                raise InputError(key, mine, wanted)


def _run(
    config: Config,
    wanted: list[MemberConfig],
    folder: Path,
    command: str,
    signals: StopSignals,
    check_owner: Callable[[], None],
    ranks: Ranks,
    split: Split,
) -> int:
    record = RunRecord.read(folder)
    tree = as_tree(config) | {"members": {m.name: as_tree(m) for m in wanted}}
    defaults = as_tree(Config())
    checkpointer = Checkpointer(folder / "checkpoints", config.checkpoint.keep, check_owner, ranks.apart())
    if record is not None:
        check_resume(record.config, tree, defaults)
        if record.status == "done":
            if ranks.lead:
                print(f"{folder} is finished ({record.step} steps); its report is {folder / 'report.html'}")
            return 0
    loaded = checkpointer.load()
    if loaded is not None:
        check_resume(loaded[2]["config"], tree, defaults)
    elif record is not None and (record.step > 0 or was_trained(folder, checkpointer.folder)):
        raise InputError(
            "checkpoints",
            str(checkpointer.folder),
            f"the checkpoints of the run that was started here; they are gone "
            f"(remove {folder / 'run.json'} to start anew)",
        )
    starts = load_starts(wanted) if loaded is None else {}  # what cannot be read says so before any harvest
    setup_logging(folder if ranks.lead else None)
    device = pick_device(config.model.device)
    before = (
        record.chosen if record is not None else loaded[2].get("chosen", {}) if loaded is not None else {}
    )
    chosen = ranks.gather(choose(config, before, device))[0]  # by the lead: hosts may differ
    torch.set_num_threads(chosen["threads"])
    clock = Clock()
    with clock.phase("loading"):

        def check_members(dims: Mapping[str, int]) -> None:
            # All wait for all: one that leaves early would break the connections that others still make.
            ranks.all_do(lambda: check_widths(wanted, dims, split))
            ranks.all_do(lambda: check_starts(wanted, dims, starts))
            ranks.all_do(lambda: refuse_unfit(config, wanted, dims, device, ranks.size))

        wired = wire(config, hooks_of(wanted), device, chosen, check_members, ranks)
    try:
        ranks.all_do(lambda: check_rows(config, wired.most_rows))
        for member in wanted:
            member.hook = "+".join(map(wired.key, member.places.inputs))
            member.target = "+".join(map(wired.key, member.places.targets)) or None
        fingerprint = dict(wired.source.fingerprint)
        for known in filter(None, (record and record.fingerprint, loaded and loaded[2]["fingerprint"])):
            check_fingerprint(known, fingerprint)
        record = RunRecord(
            "running", tree, fingerprint, chosen, config.train.steps, command=command, versions=versions()
        )
        with use_backend(config.kernels.backend):
            meta = {
                "steps": record.steps,
                "versions": record.versions,
                "config": record.config,
                "fingerprint": record.fingerprint,
                "chosen": record.chosen,
            }
            saver = Saver(checkpointer, meta, check_owner)
            return _train(
                config,
                folder,
                record,
                wired,
                wanted,
                clock,
                device,
                saver,
                loaded,
                signals,
                check_owner,
                ranks,
                split,
            )
    finally:
        wired.source.close()


def choose(config: Config, before: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """What is chosen automatically, once per run: an earlier leg's choices stand."""
    chosen = dict(before)
    chosen["threads"] = config.run.threads or chosen.get("threads") or torch.get_num_threads()
    if config.logger.wandb and "wandb_id" not in chosen:
        chosen["wandb_id"] = new_wandb_id()  # here, so that a leg without a checkpoint is the same run there
    if chosen.setdefault("autocast", config.train.autocast) == "auto":
        chosen["autocast"] = "bfloat16" if native_bfloat16(device) else "float32"
    if chosen["autocast"] == "bfloat16" and not native_bfloat16(device):
        logger.warning("train.autocast=bfloat16: %s only emulates it; float32 is not slower there", device)
    return chosen


def _train(
    config: Config,
    folder: Path,
    record: RunRecord,
    wired: Wired,
    wanted: list[MemberConfig],
    clock: Clock,
    device: torch.device,
    saver: Saver,
    loaded: tuple[int, dict[str, Any], dict[str, Any]] | None,
    signals: StopSignals,
    check: Callable[[], None],
    ranks: Ranks,
    split: Split,
) -> int:
    steps = record.steps
    seed_rng(config.run.seed)
    built = [
        Member(
            m,
            m.places.widths(wired.source.dims),
            steps,
            config.train.tokens,
            config.train.ema,
            device,
            config.train.spike_sds,
            config.train.spike_window,
            split,
        )
        for m in split.mine(wanted)
    ]
    autocast = torch.bfloat16 if record.chosen["autocast"] == "bfloat16" else None
    if not built:
        logger.info("this process harvests only%s", "" if split.group is None else ": there are fewer SAEs")
    loss = (autocast, wired.through, config.train.loss_weight)
    stepper = ranks.all_do(
        lambda: (
            choose_stepper(config.kernels, built, config.train.accumulate, *loss, config.train.batch_tokens)
            if built
            else AutogradStepper()
        )
    )
    state = TrainState(built, wired.source)
    if loaded is not None:
        with clock.phase("loading"):
            state.load_state_dict(loaded[1])
        clock.load_state_dict(state.extra["clock"])
        for name, seconds in state.extra["producer"].items():
            wired.source.seconds[name] = wired.source.seconds.get(name, 0.0) + seconds
        logger.info("continuing from step %d of %d", state.step, steps)
        if ranks.lead:
            print(f"continuing {folder} from step {state.step} of {steps}", file=sys.stderr)
    record.step, record.tokens = state.step, state.tokens
    ranks.lead_does(lambda: begin_folder(config, folder, record))
    eval_every = max(steps // 4, 1) if config.eval.every is None else config.eval.every
    with (
        nullcontext()
        if not ranks.lead
        else MetricLog(
            folder, config.logger, record.config, state.extra.get("log"), check, record.chosen.get("wandb_id")
        ) as log,
        Progress(config.train.tokens, quiet=not ranks.lead, start_tokens=state.tokens) as progress,
    ):
        with clock.phase("model forward"):
            progress.phase("harvesting held-out rows")
            heldout = wired.heldout()
        if loaded is None:
            progress.phase("harvesting the first shard")
            with clock.phase("rows"):
                rows = wired.source.sample(INIT_ROWS)
            with clock.phase("initialisation"):
                for member in built:
                    member.initialise(rows)
                del rows  # views of a whole shard
        trainer = Trainer(
            stepper=stepper,
            clock=clock,
            log=log,
            progress=progress,
            saver=saver,
            evaluate=partial(
                evaluate,
                heldout=heldout.first(config.eval.interval_tokens),
                config=config.eval,
                splice=timed(wired.splice, clock),
                ce_tokens=config.eval.interval_ce_tokens,
            ),
            batch_tokens=config.train.batch_tokens,
            log_every=config.logger.every,
            eval_every=eval_every,
            save_every=config.checkpoint.every,
            side_by_side=steps_side_by_side(config, device, len(built), wanted),
            resample_every=config.train.resample_every,
            allow_short=config.corpus.allow_short,
            ranks=ranks,
        )
        progress.phase("training")
        status = "stopped"
        signals.defer()
        stop.together(ranks.size > 1)
        try:
            trainer.fit(state, steps)
            status = "done"
        finally:
            record.status = status
            record.step, record.tokens = state.step, state.tokens
            if status != "done" and ranks.lead:
                record.write_last(folder, check)
        stop.together(False)
        del trainer, stepper  # it has copies of weights for its products
        if ranks.size == 1:
            wired.source.close()  # what is harvested ahead is not needed any more
        progress.phase("evaluating")
        try:
            finish(config, folder, record, wired, state, heldout, clock, log, ranks)
        except stop.Interrupted as error:
            record.status = "stopped"
            if ranks.lead:
                record.write_last(folder, check)
            raise stop.Interrupted(
                f"{error}: trained and saved; the same command evaluates and writes the report"
            ) from None
    ranks.lead_does(lambda: record.write(folder))
    return 0


def steps_side_by_side(
    config: Config, device: torch.device, own: int, wanted: Sequence[MemberConfig]
) -> SideBySide:
    """Whether SAEs step at a time: not where they share a device's queue, a language model, messages, or what
    torch.compile is told (8-bit Adam)."""
    apart = device.type == "cpu" and config.mesh.data * config.mesh.feature == 1
    apart = apart and config.train.loss == "rows" and all(m.optim.name != "adam8bit" for m in wanted)
    return SideBySide.of(own, len(wanted), torch.get_num_threads()) if apart else SideBySide()


def begin_folder(config: Config, folder: Path, record: RunRecord) -> None:
    """Write down what this leg of the run is."""
    record.write(folder)
    (folder / "checkpoints").mkdir(exist_ok=True)  # before the first number is logged: see `was_trained`
    write_bytes(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(as_tree(config))).encode())


def was_trained(folder: Path, checkpoints: Path) -> bool:
    """Whether a run that was killed has got as far as logging, and somebody removed its checkpoints since."""
    metrics = folder / METRICS_FILE
    return not checkpoints.exists() and metrics.exists() and metrics.stat().st_size > 0
