"""Activation shards: rows of a fixed range of the stream, permuted whole.

Rows arrive in reading order: neighbouring tokens of one document are strongly correlated. A
shard is permuted whole, by a seed derived from (run seed, shard index, lane), so row order is a
pure function of the configuration: a resumed run needs a cursor and a row number, and a run from
disk sees the rows that a run from the live model would see.

Lanes make that order independent of how many processes share the work. The producer deals token
windows to `lanes` logical lanes; each lane is permuted by itself and the lanes are interleaved, so
row i of every shard belongs to lane i mod lanes. A world size that divides `lanes` gives each
process whole lanes: it harvests and holds only those, and still every process sees, at every step,
exactly the rows that one process alone would have seen.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from sae_train.batch import RawRows, RowProducer
from sae_train.seeds import permutation


@dataclass(frozen=True)
class Shard:
    """Permuted rows; row i belongs to lane i mod lanes, and R is a multiple of lanes."""

    index: int
    """0, 1, 2 ... over the whole run, epochs included."""
    rows: dict[str, Tensor]
    """hook -> [R, D]"""
    ids: Tensor
    """[R] int64: which row of the stream each is."""
    counts: dict[str, int]
    """Tokens seen, kept by the filters, and dropped per rule, "unaligned" (see `permute`) among them."""
    cursor: dict[str, Any]
    """JSON-able: where the stream that gave this shard has to seek to give it again."""
    seconds: dict[str, float]
    """Where the time to make it went."""

    def __len__(self) -> int:
        return len(self.ids)


class ShardStream(Protocol):
    """Shards in the run's order: from a producer, from disk, made ahead by a thread."""

    @property
    def dims(self) -> Mapping[str, int]:
        """hook -> D"""

    @property
    def fingerprint(self) -> Mapping[str, str]:
        """Everything rows and their order are a function of."""

    @property
    def lanes(self) -> int: ...

    def next_shard(self) -> Shard | None:
        """The next shard, or None at the end of the data."""

    def seek(self, cursor: dict[str, Any]) -> None:
        """Make the shard with this cursor the next one."""

    def close(self) -> None: ...


def even_lanes(rows: int, lanes: int) -> list[int]:
    """Rows per lane when any row may go to any lane: equal but for one row."""
    return [rows // lanes + (lane < rows % lanes) for lane in range(lanes)]


def permute(raw: RawRows, seed: int, lanes: int) -> Shard:
    """Permute each lane and interleave them.

    Filters leave lanes of unequal length; the shortest one's length q decides, and rows beyond q in
    the others are dropped and counted as "unaligned" (about one row in a thousand for 65,536-token
    shards and 8 lanes). The raw rows and the permuted ones are held together: 2 x the shard.

    Returns:
        A shard of q * lanes rows: none if a lane is empty (the last shard of a corpus may be so short).
    """
    assert len(raw.lane_rows) == lanes, (raw.lane_rows, lanes)
    assert sum(raw.lane_rows) == len(raw.ids), (raw.lane_rows, len(raw.ids))
    start = time.perf_counter()
    shortest = min(raw.lane_rows)
    order = torch.empty(shortest, lanes, dtype=torch.int64)
    first = 0
    for lane, count in enumerate(raw.lane_rows):
        order[:, lane] = first + permutation(count, seed, raw.index, lane)[:shortest]
        first += count
    order = order.flatten()
    rows = {hook: x.index_select(0, order.to(x.device)) for hook, x in raw.rows.items()}
    ids = raw.ids.index_select(0, order.to(raw.ids.device))
    counts = raw.counts | {"unaligned": raw.counts.get("unaligned", 0) + len(raw.ids) - len(ids)}
    return Shard(
        raw.index, rows, ids, counts, raw.cursor, raw.seconds | {"permute": time.perf_counter() - start}
    )


class PermutedShards:
    """Shards of a producer, permuted.

    Args:
        producer: makes raw rows dealt to `lanes` lanes.
        seed: of the row order.
        lanes: logical lanes.
    """

    def __init__(self, producer: RowProducer, seed: int, lanes: int) -> None:
        self.producer, self.seed, self.lanes = producer, seed, lanes
        self.dims: Mapping[str, int] = producer.dims
        self.fingerprint: Mapping[str, str] = {**producer.fingerprint, "order": f"seed {seed}, {lanes} lanes"}

    def next_shard(self) -> Shard | None:
        raw = self.producer.next_rows()
        return None if raw is None else permute(raw, self.seed, self.lanes)

    def seek(self, cursor: dict[str, Any]) -> None:
        self.producer.seek(cursor)

    def close(self) -> None:
        """Nothing is held open."""
