"""The contracts between the side that makes activation rows and the side that trains on them.

A producer gives the rows of one shard in reading order (`RawRows`); a shard is those rows
permuted; a source cuts batches (`RowBatch`) out of shards in a fixed order; a member of the run
takes the hooks it reads out of a batch (`Batch`). Nothing downstream asks who made the rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from torch import Tensor


class Batch(NamedTuple):
    """What one SAE trains on: x [N, d_in] and the target y [N, d_out]; y is x for an autoencoder."""

    x: Tensor
    y: Tensor


class RowBatch(NamedTuple):
    """Rows of one training step for every hook in use: the same N tokens in each."""

    rows: dict[str, Tensor]
    """hook -> [N, D]"""
    ids: Tensor
    """[N] int64: which row of the stream each is (window * context_length + position)."""
    windows: Any = None
    """The token windows that the rows are of, for what trains through the model; there are no rows then."""

    def widened(self) -> "RowBatch":
        """The same rows in float32, in which SAEs compute: cast once, for all that read them."""
        return self._replace(rows={hook: x.float() for hook, x in self.rows.items()})


@dataclass(frozen=True)
class RawRows:
    """The rows of one shard in reading order, already filtered, grouped by lane.

    Rows of lane 0 come first, then lane 1 and so on; `lane_rows[l]` says how many each has.
    Windows are dealt to lanes round robin, so a process can harvest its own lanes alone.
    """

    index: int
    """Shard index: 0, 1, 2 ... over the whole run, epochs included."""
    rows: dict[str, Tensor]
    """hook -> [R, D] in the harvest dtype, on the device that trains."""
    ids: Tensor
    """[R] int64: window * context_length + position."""
    lane_rows: list[int]
    counts: dict[str, int]
    """Tokens "seen", "kept", and dropped per rule ("padding", "special", "nonfinite", "sink" ...)."""
    cursor: dict[str, Any]
    """JSON-able producer state with which this very shard is made again."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Where the producer's time went: "forward", "tokenise" ..."""


class Cancelled(Exception):
    """A producer gave up a shard because another thread asked it to."""


class RowProducer(Protocol):
    """Makes one shard's rows after the other: a model reading a corpus, tensors, a synthetic dictionary."""

    @property
    def dims(self) -> Mapping[str, int]:
        """hook -> D"""

    @property
    def fingerprint(self) -> Mapping[str, str]:
        """Everything the rows are a function of; a resume that finds another one is refused."""

    def next_rows(self) -> RawRows | None:
        """The next shard's rows, or None at the end of the data."""

    def seek(self, cursor: dict[str, Any]) -> None:
        """Continue from `RawRows.cursor` of the shard that should come next."""


class ActivationSource(Protocol):
    """Batches of rows in the run's order: from the live model, from disk, from tensors, synthetic."""

    dims: Mapping[str, int]
    fingerprint: Mapping[str, str]

    seconds: dict[str, float]
    """What the producer of the rows spent its time on, added up."""

    def next_batch(self) -> RowBatch | None:
        """The next N rows of every hook, or None at the end of the data."""

    def sample(self, rows: int) -> dict[str, Tensor]:
        """The first rows of the current shard, at most `rows`, without consuming them."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def close(self) -> None: ...
