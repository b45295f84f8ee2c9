"""Batches cut from shards: the run's rows, N at a time, in an order that any resume continues.

Batches are contiguous slices of the concatenation of the shards' rows; they cross shard edges.
The whole position is two things: the cursor of a shard and a row in it.
"""

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sae_train.batch import RowBatch
from sae_train.errors import InputError
from sae_train.registry import nearest
from sae_train.shards.shard import Shard, ShardStream
from sae_train.shards.synthetic import SyntheticConfig

SOURCES = ["shards", "stream", "synthetic", "tensors"]


@dataclass
class SourceConfig:
    """Where activations come from, and the unit in which they are harvested and shuffled."""

    name: str = "stream"
    """stream (a language model over a corpus), shards (a folder written by harvest), tensors (safetensors
    files of rows), synthetic (a known dictionary, for recovery scores)."""
    path: str | None = None
    """source=shards: folder written by harvest."""
    paths: list[str] = field(default_factory=list)
    """source=tensors: safetensors files."""
    key: str = "activations"
    """source=tensors: name of the [n, d] tensor in each file; also the hook's name."""
    shard_tokens: int = 65536
    """Tokens per shard before filtering: the range over which rows are shuffled."""
    lanes: int = 8
    """Logical lanes of a shard: the most processes that can share a harvest. Part of the row order."""
    prefetch: int = 1
    """Shards harvested ahead in the background. 0: none, harvest and training take turns."""
    epochs: int = 1
    """source=shards, tensors and synthetic: times the rows are gone through."""
    holdout: float = 0.02
    """source=tensors and synthetic: share of rows kept for evaluation."""
    seed: int = 0
    """Of the row order."""
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)

    def __post_init__(self) -> None:
        if self.name not in SOURCES:
            raise InputError("source.name", self.name, nearest(self.name, SOURCES))
        if self.name == "shards" and not self.path:
            raise InputError("source.path", self.path, "the folder written by sae-train harvest")
        if self.name == "tensors" and not self.paths:
            raise InputError("source.paths", self.paths, "at least one safetensors file")
        if self.lanes < 1:
            raise InputError("source.lanes", self.lanes, "at least 1")
        if self.shard_tokens < self.lanes:
            raise InputError("source.shard_tokens", self.shard_tokens, f"at least source.lanes={self.lanes}")
        if self.prefetch < 0:
            raise InputError("source.prefetch", self.prefetch, "0 or more shards")
        if self.epochs < 1:
            raise InputError("source.epochs", self.epochs, "at least 1")
        if self.epochs > 1 and self.name == "stream":
            raise InputError(
                "source.epochs", self.epochs, "1 with source.name=stream; set corpus.epochs instead"
            )
        if not 0 <= self.holdout < 1:
            raise InputError("source.holdout", self.holdout, "a share, at least 0 and below 1")


class ShardSource:
    """An `ActivationSource` over a shard stream.

    Args:
        stream: gives the shards; closed with this source.
        batch_rows: N, rows per batch; a multiple of the stream's lanes.

    Attributes:
        counts: tokens seen, kept and dropped per rule over the shards begun so far; "tail" is the rows
            at the end of the data that did not fill a batch.
        seconds: the shards' own seconds added up since this process began, and "wait": time that
            `next_batch` and `sample` stood waiting for rows.
        batches: batches given, over all resumes.
    """

    def __init__(self, stream: ShardStream, batch_rows: int) -> None:
        if batch_rows < 1 or batch_rows % stream.lanes:
            raise InputError(
                "train.batch_tokens", batch_rows, f"a positive multiple of source.lanes={stream.lanes}"
            )
        self.stream, self.batch_rows = stream, batch_rows
        self.dims: Mapping[str, int] = stream.dims
        self.fingerprint: Mapping[str, str] = stream.fingerprint
        self.counts: Counter[str] = Counter()
        self.seconds: dict[str, float] = {"wait": 0.0}
        self.batches = 0
        self._shard: Shard | None = None
        self._row = 0  # first row of the current shard not given yet
        self._start: dict[str, Any] | None = None  # cursor of the run's first shard
        self._state = self._position()

    def next_batch(self) -> RowBatch | None:
        """The next N rows; views of a shard, or copies where a batch crosses an edge. Do not write to them.

        If making a shard fails, the position stays before this batch: `load_state_dict(state_dict())`
        tries again.

        Raises:
            InputError: the data ends before the first batch.
        """
        parts: list[tuple[Shard, int, int]] = []
        missing = self.batch_rows
        while missing:
            if self._shard is None or self._row == len(self._shard):
                if not self._fetch():
                    self._end(left=self.batch_rows - missing)
                    return None
                continue
            stop = min(self._row + missing, len(self._shard))
            parts.append((self._shard, self._row, stop))
            missing -= stop - self._row
            self._row = stop
        self.batches += 1
        self._state = self._position()
        rows = {hook: _join([shard.rows[hook][a:b] for shard, a, b in parts]) for hook in self.dims}
        return RowBatch(rows, _join([shard.ids[a:b] for shard, a, b in parts]))

    def sample(self, rows: int) -> dict[str, Tensor]:
        """The first rows of the current shard, at most `rows`; they are trained on all the same.

        Raises:
            InputError: the data has no row.
        """
        while self._shard is None or len(self._shard) == 0:
            if not self._fetch():
                self._end(left=0)
                return {}
        if self.batches == 0:
            self._state = self._position()
        return {hook: self._shard.rows[hook][:rows] for hook in self.dims}

    def state_dict(self) -> dict[str, Any]:
        """JSON-able: the position after the last batch given, and the counts so far."""
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position. The shard it lies in is made again, now."""
        self._start = state["start"] or self._start
        self._shard, self._row = None, 0
        if (cursor := state["cursor"] or self._start) is not None:
            self.stream.seek(cursor)
        if state["cursor"] is not None:
            self._fetch()
            assert self._shard is not None, "the stream no longer has the saved shard"
            assert state["row"] <= len(self._shard), "the stream gives another shard than the saved one"
            self._row = state["row"]
        self.counts = Counter(state["counts"])  # not added to: the shard was counted when it was begun
        self.batches = state["batches"]
        self._state = self._position()

    def close(self) -> None:
        """Stop the stream and free the rows."""
        self._shard = None
        self.stream.close()

    def _position(self) -> dict[str, Any]:
        return {
            "start": self._start,
            "cursor": self._shard.cursor if self._shard is not None else None,
            "row": self._row,
            "counts": dict(self.counts),
            "batches": self.batches,
        }

    def _fetch(self) -> bool:
        """Make the next shard the current one; False at the end of the data."""
        start = time.perf_counter()
        shard = self.stream.next_shard()
        self.seconds["wait"] += time.perf_counter() - start
        if shard is None:
            return False
        self._shard, self._row = shard, 0
        self._start = self._start or shard.cursor
        self.counts.update(shard.counts)
        for name, seconds in shard.seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        return True

    def _end(self, left: int) -> None:
        self.counts["tail"] += left
        if self.batches == 0:
            seen = ", ".join(f"{rule} {count}" for rule, count in sorted(self.counts.items()))
            raise InputError(
                "train.batch_tokens",
                self.batch_rows,
                f"no more rows than the source gives, but it ended after {left} usable ones ({seen})",
            )
        # The saved position stays before these rows: with more data, they are the first of the next batch.


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
