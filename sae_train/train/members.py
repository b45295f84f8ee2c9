"""Members: the SAEs that one run trains side by side on the same rows, each with its own recipe."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sae_train.batch import Batch, RowBatch
from sae_train.places import Places, Widths
from sae_train.sae.base import SAE, SAES, SAEConfig
from sae_train.sae.io import load_sae
from sae_train.sae.start import take_over
from sae_train.stats import FeatureStats
from sae_train.train.optim import (
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
    ) -> None:
        self.config = config
        self.name, self.places = config.name, config.places
        self.steps = steps
        self.sae: SAE = SAES.build(config.sae, widths).to(device)
        self.optimizer = build_optimizer(config.optim, self.sae.parameters(), self.sae.d_sae, steps)
        self.schedule: LambdaLR = build_schedule(config.optim, self.optimizer, steps)
        self.stats = FeatureStats(self.sae.d_sae, device)
        self.dead_after_tokens = max(1, min(config.sae.dead_after_tokens, tokens // 10))
        self.dead = torch.zeros(0, dtype=torch.int64, device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.skipped_in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        self.spikes = SpikeGuard(spike_sds, spike_window, device)
        self.ema_decay = ema
        self.average: AveragedModel | None = None

    def initialise(self, rows: Mapping[str, Tensor]) -> None:
        """Set the weights from real rows; called once, in a fresh run."""
        generator = torch.Generator().manual_seed(self.config.seed)
        x, y = self.places.batch(rows)
        self.sae.initialise(x, generator, y if self.places.targets else None)
        if self.config.start is not None:
            take_over(self.sae, load_sae(self.config.start, x.device), self.config.start)
        self.start_average()

    def start_average(self) -> None:
        if self.ema_decay > 0:
            self.average = AveragedModel(self.sae, multi_avg_fn=get_ema_multi_avg_fn(self.ema_decay))

    def batch(self, rows: RowBatch) -> Batch:
        return self.places.batch(rows.rows)

    def begin_step(self, step: int) -> None:
        """What has to be known before step `step`: what follows a schedule, and which latents are dead."""
        self.sae.begin_step(step, self.steps)
        if step % DEAD_REFRESH_STEPS == 0:
            self.dead = self.stats.dead(self.dead_after_tokens).nonzero().flatten()  # host synchronisation

    def trained(self) -> SAE:
        """The SAE to judge and to publish: the average of weights where one is kept."""
        if self.average is None and not averages_weights(self.optimizer):
            return self.sae
        with published_weights(self.optimizer):
            sae = copy.deepcopy(self.sae if self.average is None else self.average.module)
        assert isinstance(sae, SAE)
        for mine, own in zip(sae.buffers(), self.sae.buffers(), strict=True):
            mine.copy_(own)
        sae.after_step()
        return sae

    def state_dict(self) -> dict[str, Any]:
        state = {
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
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
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
