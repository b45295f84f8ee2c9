"""Fraction of variance unexplained over the whole held-out set, with and without outlier tokens.

    fvu = sum |y - y_hat|^2 / sum |y - mean of the whole set|^2

One attention sink in four thousand tokens carries more variance than all the others together, and a
number that includes it says nothing about them; so `fvu` leaves outliers out and `fvu_all` keeps
them. Sums are float64 over the whole set: averaging per-batch ratios gives another number.

Rows without variance give 0 when reconstructed exactly, else a huge finite number, as `losses.fvu` does.
"""

from typing import Self

import torch

from sae_train.metrics.base import METRICS, EvalBatch, Metric, MetricConfig

NO_VARIANCE = 1e-12
"""Share of the sum of squares that is rounding of float64 sums over tens of thousands of rows."""


@METRICS.register("fvu", MetricConfig)
class FVU(Metric):
    """`fvu` over ordinary tokens, `fvu_all` over all; `nmse_median` is the median |y - y_hat|^2 / |y|^2."""

    def __init__(self, config: MetricConfig, d_in: int, d_sae: int) -> None:
        super().__init__(config, d_in, d_sae)
        self.error = torch.zeros(2, dtype=torch.float64)
        self.squares = torch.zeros(2, dtype=torch.float64)
        self.total = torch.zeros(2, d_in, dtype=torch.float64)
        self.rows = torch.zeros(2, dtype=torch.float64)
        self.per_token: list[torch.Tensor] = []

    def update(self, batch: EvalBatch) -> None:
        y, ordinary = batch.y.double(), batch.ordinary.double()
        error = (y - batch.y_hat.double()).square().sum(dim=-1)
        for i, weight in enumerate((ordinary, torch.ones_like(ordinary))):
            self.error[i] += (error * weight).sum().cpu()
            self.squares[i] += (y.square().sum(dim=-1) * weight).sum().cpu()
            self.total[i] += (weight @ y).cpu()
            self.rows[i] += weight.sum().cpu()
        self.per_token.append(
            torch.stack([error, y.square().sum(dim=-1)], dim=-1)[batch.ordinary].float().cpu()
        )

    def merge(self, other: Self) -> None:
        self.error += other.error
        self.squares += other.squares
        self.total += other.total
        self.rows += other.rows
        self.per_token += other.per_token

    def compute(self) -> dict[str, float]:
        variance = self.squares - self.total.square().sum(dim=-1) / self.rows.clamp_min(1)
        # The difference of two equal sums is rounding, of either sign, and no variance.
        variance = torch.where(variance > NO_VARIANCE * self.squares, variance, 0)
        limits = torch.finfo(torch.float32)
        ratio = (self.error / variance.clamp_min(limits.tiny)).clamp_max(limits.max)
        tokens = torch.cat(self.per_token) if self.per_token else torch.zeros(0, 2)
        share = (tokens[:, 0] / tokens[:, 1].clamp_min(limits.tiny)).clamp_max(limits.max)
        out = {"fvu": float(ratio[0]), "fvu_all": float(ratio[1])}
        if len(share):
            out["nmse_median"] = float(share.median())
        return out
