"""What a metric is: sums over held-out rows that can be merged, and named numbers at the end."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from sae_train.codes import Codes
from sae_train.registry import Registry


@dataclass(frozen=True, slots=True)
class EvalBatch:
    """One batch of held-out rows and what the SAE made of them.

    Attributes:
        y: [N, D] targets, float32, raw units.
        y_hat: [N, D] reconstructions.
        codes: codes of the rows.
        ordinary: [N] bool, False for outlier tokens (attention sinks).
    """

    y: Tensor
    y_hat: Tensor
    codes: Codes
    ordinary: Tensor


@dataclass
class MetricConfig:
    """Metrics have no options of their own; the name is all."""

    name: str = "???"


class Metric(ABC):
    """update over batches, merge over parts, compute once: update(all) equals merge(update(a), update(b))."""

    def __init__(self, config: MetricConfig, d_in: int, d_sae: int) -> None:
        self.config = config

    @abstractmethod
    def update(self, batch: EvalBatch) -> None: ...

    @abstractmethod
    def merge(self, other: Self) -> None: ...

    @abstractmethod
    def compute(self) -> dict[str, float]: ...


METRICS: Registry[Metric] = Registry("eval.metrics")
