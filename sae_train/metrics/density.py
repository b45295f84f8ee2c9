"""Which latents fire on held-out tokens: the share that never does, and the share that does all the time."""

from typing import Self

from sae_train.metrics.base import METRICS, EvalBatch, Metric, MetricConfig
from sae_train.stats import DENSE, FeatureStats


@METRICS.register("density", MetricConfig)
class Density(Metric):
    """`silent` is the share of latents that never fire on the held-out rows, `dense` of those above a tenth.

    Silence on a small held-out set is not death: `dead` is judged over training, by tokens.
    """

    def __init__(self, config: MetricConfig, d_in: int, d_sae: int) -> None:
        super().__init__(config, d_in, d_sae)
        self.stats = FeatureStats(d_sae)

    def update(self, batch: EvalBatch) -> None:
        codes = batch.codes
        indices = None if codes.indices is None else codes.indices.cpu()
        self.stats.update(type(codes)(codes.values.cpu(), indices, codes.d_sae))

    def merge(self, other: Self) -> None:
        self.stats.merge(other.stats)

    def compute(self) -> dict[str, float]:
        silent = (self.stats.counts == 0).double().mean()
        dense = (self.stats.density() > DENSE).double().mean()
        return {"silent": float(silent), "dense": float(dense)}
