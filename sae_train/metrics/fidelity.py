"""Direction and length of reconstructions: cosine, and how much they shrink.

cosine = mean of <y, y_hat> / |y||y_hat|          l2_ratio = mean of |y_hat| / |y|
relative_reconstruction_bias = E|y_hat|^2 / E<y, y_hat>   (1 is unbiased, below 1 is shrunk;
Rajamanoharan et al. 2024, arXiv:2404.16014)
"""

from typing import Self

import torch

from sae_train.metrics.base import METRICS, EvalBatch, Metric, MetricConfig


@METRICS.register("fidelity", MetricConfig)
class Fidelity(Metric):
    """Over ordinary tokens, float64 sums; rows of norm zero count as cosine 0 and have no l2_ratio."""

    def __init__(self, config: MetricConfig, d_in: int, d_sae: int) -> None:
        super().__init__(config, d_in, d_sae)
        self.sums = torch.zeros(6, dtype=torch.float64)

    def update(self, batch: EvalBatch) -> None:
        y, y_hat = batch.y[batch.ordinary].double(), batch.y_hat[batch.ordinary].double()
        dot = (y * y_hat).sum(dim=-1)
        norm, norm_hat = y.norm(dim=-1), y_hat.norm(dim=-1)
        tiny = torch.finfo(torch.float64).tiny
        cosine = dot / (norm * norm_hat).clamp_min(tiny)
        has_norm = norm > 0
        ratio = torch.where(has_norm, norm_hat / norm.clamp_min(tiny), 0)
        rows, rows_with_norm = dot.new_tensor(float(len(y))), has_norm.sum().double()
        sums = [cosine.sum(), ratio.sum(), norm_hat.square().sum(), dot.sum(), rows, rows_with_norm]
        self.sums += torch.stack(sums).cpu()

    def merge(self, other: Self) -> None:
        self.sums += other.sums

    def compute(self) -> dict[str, float]:
        cosine, ratio, squares, dots, rows, rows_with_norm = self.sums.tolist()
        bias = squares / dots if dots else float("inf")
        return {
            "cosine": cosine / max(rows, 1.0),
            "l2_ratio": ratio / max(rows_with_norm, 1.0),
            "relative_reconstruction_bias": bias,
        }
