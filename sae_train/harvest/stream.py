"""From the live model: windows, forward pass and filters make the rows of one shard after the other.

A shard is the next `shard_windows` windows. They are dealt to lanes round robin, window j to lane j % lanes,
and each lane is harvested for itself, in micro-batches that never mix lanes. So the rows of a lane are the
same bits whether one process harvests all lanes or several share them and pass them on: a shard is the same
in every process.

Memory is one shard (the rows are filtered in place) and one micro-batch.
"""

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor

from sae_train.batch import Cancelled, RawRows
from sae_train.errors import InputError
from sae_train.harvest.filters import FilterConfig, compact, decide, measure
from sae_train.harvest.harvester import Harvester
from sae_train.harvest.windows import Windows
from sae_train.ranks import ALONE, Ranks


class Stream(Protocol):
    """What is needed of a `WindowStream`."""

    def take(self, n: int) -> Windows | None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class StreamRows:
    """A `RowProducer` over a live model.

    Args:
        windows: the window stream; a shard takes `shard_windows` of them, the last one what is left.
        harvester: the model and its hooks.
        config: which rows are dropped.
        special_ids: [S] int64 token ids that the special-token rule drops.
        shard_windows: a multiple of `lanes`.
        fingerprint: of model, tokenizer and corpus; what is decided here is added to it.
        ranks: the processes that get the rows, with messages of their own.
        harvesters: those of them that share the lanes, in turn; unset, all.
    """

    def __init__(
        self,
        windows: Stream,
        harvester: Harvester,
        config: FilterConfig,
        special_ids: Tensor,
        shard_windows: int,
        lanes: int,
        fingerprint: Mapping[str, str],
        ranks: Ranks = ALONE,
        harvesters: Sequence[int] | None = None,
    ) -> None:
        if lanes < 1 or shard_windows < lanes or shard_windows % lanes:
            raise InputError(
                "source.shard_tokens", f"{shard_windows} windows", f"a multiple of {lanes} windows (lanes)"
            )
        self.windows, self.harvester, self.config = windows, harvester, config
        self.special_ids, self.shard_windows, self.lanes = special_ids, shard_windows, lanes
        self.dims = harvester.dims
        self.fingerprint = dict(fingerprint) | {
            "hooks": " ".join(sorted(harvester.dims)),
            "filter": " ".join(f"{key}={value}" for key, value in asdict(config).items()),
            "micro_batch": str(harvester.micro_batch),
            "shard_windows": str(shard_windows),
            "lanes": str(lanes),
        }
        self.shard = 0
        self.ranks = ranks
        self.harvesters = list(range(ranks.size) if harvesters is None else harvesters)
        self._cancelled = threading.Event()

    def next_rows(self) -> RawRows | None:
        """The next shard; None when the corpus is used up. A shard may be empty if every row of it was
        dropped.

        The rows are finished when this returns, on whichever CUDA stream it was called.

        Raises:
            NumericsError: too many rows are not finite.
            InputError: a forward ran out of memory.
        """
        began = time.perf_counter()
        cursor = {"windows": self.windows.state_dict(), "shard": self.shard}
        windows = self.ranks.all_do(lambda: self.windows.take(self.shard_windows))
        if windows is None:
            return None
        windows, lane_windows = by_lane(windows, self.lanes)
        tokenised = time.perf_counter()
        rows = self._forward(windows, lane_windows)
        forwarded = time.perf_counter()
        measured = {hook: measure(x) for hook, x in rows.items()}
        mask, counts, _ = decide(measured, windows.tokens, windows.valid, self.special_ids, self.config)
        kept = mask.flatten()
        length = windows.tokens.shape[1]
        ids = (windows.index[:, None] * length + torch.arange(length)).to(mask.device).flatten()[kept]
        lane_rows = [int(lane.sum()) for lane in mask.split(lane_windows)]
        raw = RawRows(
            index=self.shard,
            rows={hook: compact(x.flatten(0, 1), kept) for hook, x in rows.items()},
            ids=ids,
            lane_rows=lane_rows,
            counts=counts,
            cursor=cursor,
            seconds={"tokens": tokenised - began, "forward": forwarded - tokenised},
        )
        self._wait()
        raw.seconds["filter"] = time.perf_counter() - forwarded
        self.shard += 1
        return raw

    def seek(self, cursor: dict[str, Any]) -> None:
        """Continue with the shard whose cursor this is. Bounded by what the window stream re-reads."""
        self.windows.load_state_dict(cursor["windows"])
        self.shard = cursor["shard"]
        self._cancelled.clear()

    def cancel(self) -> None:
        """Make `next_rows` on another thread give up at its next lane with `Cancelled`, until a `seek`.

        Not where other processes wait for the lanes of this one: then it ends with the shard.
        """
        if self.ranks.size == 1:
            self._cancelled.set()

    def _forward(self, windows: Windows, lane_windows: list[int]) -> dict[str, Tensor]:
        """hook -> [B, T, D], lane by lane into tensors made once per shard."""
        ends = list(accumulate(lane_windows))
        parts = [slice(end - count, end) for end, count in zip(ends, lane_windows, strict=True) if count]
        owners = [self.harvesters[i % len(self.harvesters)] for i in range(len(parts))]
        own = [part for part, owner in zip(parts, owners, strict=True) if owner == self.ranks.rank]
        rows = self.ranks.all_do(lambda: self._lanes(windows, own))
        if self.ranks.size == 1:
            return rows
        like = {hook: [*x.shape, str(x.dtype).removeprefix("torch.")] for hook, x in rows.items()}
        for hook, (*shape, dtype) in self.ranks.gather(like)[owners[0]].items():
            if hook not in rows:  # nothing of this shard was harvested here
                rows[hook] = torch.empty(shape, dtype=getattr(torch, dtype), device=self.harvester.device)
        for part, owner in zip(parts, owners, strict=True):
            for hook in sorted(rows):
                self.ranks.spread(rows[hook][part], owner)
        return rows

    def _lanes(self, windows: Windows, parts: list[slice]) -> dict[str, Tensor]:
        """hook -> [B, T, D], of which these parts are filled."""
        rows: dict[str, Tensor] = {}
        for part in parts:
            lane = Windows(
                windows.tokens[part], windows.valid[part], windows.starts[part], windows.index[part]
            )
            if self._cancelled.is_set():
                raise Cancelled("the shard under way is no longer wanted")
            self._harvest(lane, part, len(windows.tokens), rows)
        self._wait()
        return rows

    def _harvest(self, lane: Windows, part: slice, num_windows: int, rows: dict[str, Tensor]) -> None:
        if rows:
            self.harvester.rows(lane, {hook: x[part] for hook, x in rows.items()})
            return
        for hook, x in self.harvester.rows(lane).items():  # the first lane tells the dtypes
            rows[hook] = torch.empty((num_windows, *x.shape[1:]), dtype=x.dtype, device=x.device)
            rows[hook][part] = x

    def _wait(self) -> None:
        """Once per shard, and only for this thread's own stream, so training on another goes on."""
        if self.harvester.device.type == "cuda":
            torch.cuda.current_stream(self.harvester.device).synchronize()


def by_lane(windows: Windows, lanes: int) -> tuple[Windows, list[int]]:
    """The windows of a shard in lane order, and how many each lane has: window j is of lane j % lanes."""
    order = torch.arange(len(windows.tokens))
    order = torch.cat([order[lane::lanes] for lane in range(lanes)])
    counts = [len(range(lane, len(windows.tokens), lanes)) for lane in range(lanes)]
    return Windows(
        *(x[order] for x in (windows.tokens, windows.valid, windows.starts, windows.index))
    ), counts
