"""L0: how many latents are active on a token, as a mean and as a distribution."""

from typing import Self

import torch

from sae_train.metrics.base import METRICS, EvalBatch, Metric, MetricConfig


@METRICS.register("l0", MetricConfig)
class L0(Metric):
    """`l0` is the mean over ordinary tokens; `histogram[n]` counts tokens with n active latents."""

    def __init__(self, config: MetricConfig, d_in: int, d_sae: int) -> None:
        super().__init__(config, d_in, d_sae)
        self.histogram = torch.zeros(d_sae + 1, dtype=torch.int64)

    def update(self, batch: EvalBatch) -> None:
        l0 = batch.codes.l0()[batch.ordinary].cpu()
        self.histogram += torch.bincount(l0, minlength=len(self.histogram))

    def merge(self, other: Self) -> None:
        self.histogram += other.histogram

    def compute(self) -> dict[str, float]:
        n = torch.arange(len(self.histogram), dtype=torch.float64)
        rows = self.histogram.sum().clamp_min(1)
        return {"l0": float((n * self.histogram).sum() / rows)}
