"""Members: the SAEs that one run trains side by side on the same rows, each with its own recipe."""

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sae_train.batch import Batch, RowBatch
from sae_train.checkpoint import Slice
from sae_train.errors import InputError
from sae_train.places import Places, Widths
from sae_train.sae.base import SAE, SAES, SAEConfig
from sae_train.sae.io import load_sae
from sae_train.sae.start import take_over
from sae_train.split import WHOLE, Split
from sae_train.stats import FeatureStats
from sae_train.train.optim import (
    LIKE_PARAMETER,
    OptimConfig,
    averages_weights,
    build_optimizer,
    build_schedule,
    load_optimizer,
    published_weights,
)
from sae_train.train.spikes import SpikeGuard

DEAD_REFRESH_STEPS = 16
"""Steps between looks at which latents are dead. Listing them needs one host synchronisation; a latent
that wakes up in between gets a few more steps of the auxiliary loss, which does no harm."""


BY_ROWS = ("adam", "schedule_free")
"""Optimizers that treat every latent by itself, so that it does not matter which process has it."""


@dataclass
class MemberConfig:
    """What one member of the run is; unset parts come from the run's own keys of the same names."""

    name: str
    hook: str
    seed: int
    sae: SAEConfig
    optim: OptimConfig
    target: str | None = None
    start: str | None = None

    @property
    def places(self) -> Places:
        return Places.parse(self.hook, self.target)


@dataclass(frozen=True)
class WholeMember:
    """What there is to judge and to publish of a member, in one process.

    Attributes:
        sae: with all its latents. stats: of all, in training.
    """

    name: str
    places: Places
    config: MemberConfig
    sae: SAE
    stats: FeatureStats
    dead_after_tokens: int

    def dead(self) -> float:
        """Share of the latents that are dead."""
        return float(self.stats.dead(self.dead_after_tokens).double().mean())


class Member:
    """One SAE of the run with its optimizer, schedule, statistics and average of weights."""

    def __init__(
        self,
        config: MemberConfig,
        widths: Widths | int,
        steps: int,
        tokens: int,
        ema: float,
        device: torch.device,
        spike_sds: float = 0.0,
        spike_window: int = 128,
        split: Split = WHOLE,
    ) -> None:
        self.config, self.widths = config, widths
        self.name, self.places = config.name, config.places
        self.steps = steps
        self.split = split
        self.sae: SAE = SAES.build(config.sae, widths)
        self.cut = self.sae.of_latents()
        """Names of those of its tensors that may be divided among processes."""
        if not split.whole:
            check_optimizer(config.optim, split)
            self.sae.split_(split)
        self.sae.to(device)
        self.optimizer = build_optimizer(config.optim, self.sae.parameters(), self.sae.d_sae, steps)
        self.schedule: LambdaLR = build_schedule(config.optim, self.optimizer, steps)
        self.stats = FeatureStats(self.sae.d_sae // split.latents.size, device)
        self.dead_after_tokens = max(1, min(config.sae.dead_after_tokens, tokens // 10))
        self.dead = torch.zeros(0, dtype=torch.int64, device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.skipped_in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        self.spikes = SpikeGuard(spike_sds, spike_window, device)
        self.ema_decay = ema
        self.average: AveragedModel | None = None

    def initialise(self, rows: Mapping[str, Tensor]) -> None:
        """Set the weights from real rows; called once, in a fresh run."""
        own = self.sae.state_dict()
        whole = self._initialised(rows) if self.split.lead else None
        if not self.split.whole:
            self.split.deal(whole.state_dict() if whole is not None else None, own, self.cut)
        self.start_average()

    def _initialised(self, rows: Mapping[str, Tensor]) -> SAE:
        """An SAE with all its latents, ready to train: this member's own, or one of which it gets a slice."""
        sae, device = self.sae, self.sae.input_scale.device
        if not self.split.whole:
            sae = SAES.build(self.config.sae, self.widths).to(device)
        generator = torch.Generator().manual_seed(self.config.seed)
        x, y = self.places.batch(rows)
        sae.initialise(x, generator, y if self.places.targets else None)
        if self.config.start is not None:
            take_over(sae, load_sae(self.config.start, x.device), self.config.start)
        return sae

    def start_average(self) -> None:
        if self.ema_decay > 0:
            self.average = AveragedModel(self.sae, multi_avg_fn=get_ema_multi_avg_fn(self.ema_decay))

    def batch(self, rows: RowBatch) -> Batch:
        """This process's part of the rows of a step."""
        whole = self.places.batch(rows.rows)
        return Batch(*(self.split.rows.part(x) for x in whole)) if self.split.rows.size > 1 else whole

    def begin_step(self, step: int) -> None:
        """What has to be known before step `step`: what follows a schedule, and which latents are dead."""
        self.sae.begin_step(step, self.steps)
        if step % DEAD_REFRESH_STEPS == 0:
            self.dead = self.stats.dead(self.dead_after_tokens).nonzero().flatten()  # host synchronisation

    @property
    def averages(self) -> bool:
        """Whether what is judged and published is an average of weights."""
        return self.average is not None or averages_weights(self.optimizer)

    def trained(self) -> SAE:
        """The SAE to judge and to publish: the average of weights where one is kept. Of a divided SAE, what
        this process has of it."""
        if not self.averages:
            return self.sae
        with published_weights(self.optimizer):
            sae = copy.deepcopy(self.sae if self.average is None else self.average.module)
        assert isinstance(sae, SAE)
        for mine, own in zip(sae.buffers(), self.sae.buffers(), strict=True):
            mine.copy_(own)
        sae.after_step()
        return sae

    def whole(self) -> "WholeMember | None":
        """What is judged and published. Where it is divided all its processes have to call this, and only the
        first of them, which needs the memory, gets it."""
        trained, stats = self.trained(), self.stats
        if not self.split.whole:
            state = self.split.collect(trained.state_dict(), self.cut)
            numbers = {k: v for k, v in stats.state_dict().items() if isinstance(v, Tensor)}
            counted = self.split.collect(numbers, set(numbers))
            if state is None or counted is None:
                return None
            device = self.sae.input_scale.device
            stats = FeatureStats(self.sae.d_sae, device)
            with torch.device("meta"):
                trained = SAES.build(self.config.sae, self.widths)
            trained.load_state_dict(state, assign=True)  # the tensors themselves: there is no room for two
            stats.load_state_dict({"tokens": self.stats.tokens, **counted})
        return WholeMember(self.name, self.places, self.config, trained, stats, self.dead_after_tokens)

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {
            "sae": self.sae.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "stats": self.stats.state_dict(),
            "dead": self.dead,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "spikes": self.spikes.state_dict(),
        }
        if self.average is not None:
            state["average"] = self.average.state_dict()
        if self.split.latents.size > 1:
            axis = self.split.latents
            state["dead"] = self.dead + self.split.first(len(self.stats.counts))
            state = self._of_latents(state, lambda x: Slice(x, axis.index, axis.size))
            state["dead"] = Slice(state["dead"], axis.index, axis.size)
        return state

    def _of_latents(self, state: dict[str, Any], change: Callable[[Tensor], Any]) -> dict[str, Any]:
        """A state in which what has a row for each latent is changed; but `dead`, which lists some."""

        def some(named: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
            return {name: change(x) if name in names else x for name, x in named.items()}

        optimizer = state["optimizer"]
        names = [name for name, _ in self.sae.named_parameters()]
        of_parameters = {
            number: some(kept, LIKE_PARAMETER if names[number] in self.cut else ())
            for number, kept in optimizer["state"].items()
        }
        out = state | {
            "sae": some(state["sae"], self.cut),
            "optimizer": optimizer | {"state": of_parameters},
            "stats": some(state["stats"], [k for k, x in state["stats"].items() if isinstance(x, Tensor)]),
        }
        if "average" in state:
            out["average"] = some(state["average"], {f"module.{name}" for name in self.cut})
        return out

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.split.latents.size > 1:
            own = len(self.stats.counts)
            state = self._of_latents(state, self.split.cut)
            state["dead"] = state["dead"] - self.split.first(own)
            state["dead"] = state["dead"][(state["dead"] >= 0) & (state["dead"] < own)]
        self.sae.load_state_dict(state["sae"])
        load_optimizer(self.optimizer, state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.stats.load_state_dict(state["stats"])
        device = self.sae.input_scale.device
        self.dead = state["dead"].to(device)
        self.skipped = state["skipped"].to(device)
        self.skipped_in_a_row = state["skipped_in_a_row"].to(device)
        if "spikes" in state:  # older checkpoints have none
            self.spikes.load_state_dict(state["spikes"])
        self.start_average()
        if self.average is not None:
            self.average.load_state_dict(state["average"])


def check_optimizer(config: OptimConfig, split: Split) -> None:
    """Raises InputError if an optimizer looks at all latents together and they are divided."""
    if split.latents.size > 1 and config.name not in BY_ROWS:
        wanted = f"{' or '.join(BY_ROWS)} with mesh.feature={split.latents.size}: it looks at all latents"
        raise InputError("optim.name", config.name, wanted)


def judged_together(members: Sequence[Member]) -> Iterator[list[WholeMember]]:
    """What this process judges of these, in parts that share the language model's passes: first the SAEs that
    it trains as they are judged, then one by one those that are made for it, from parts or as an average,
    for which there is room once. All processes have to go through this."""

    def made(member: Member) -> bool:
        return member.averages or not member.split.whole

    parts = [[member for member in members if not made(member)]]
    parts += [[member] for member in members if made(member)]
    for part in parts:
        wholes = [whole for whole in (member.whole() for member in part) if whole is not None]
        if wholes:
            yield wholes
        wholes.clear()  # whoever was given it has the list still, while the next one is made
