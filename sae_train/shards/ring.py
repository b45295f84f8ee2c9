"""Shards made ahead: a thread harvests the next shard while the current one is trained on.

The model's forward and the SAE's step both spend their time in kernels that release Python's
lock, so one thread is enough. At most `depth` shards exist that the consumer has not taken,
finished or being made, so memory is bounded by (depth + 1) shards plus the one in permutation.
"""

import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch

from sae_train import stop
from sae_train.shards.shard import Shard, ShardStream

POLL_S = 0.2
STUCK_S = 5.0
"""A thread asked to end is given this long: it may be in a read from a network that does not answer."""


@dataclasses.dataclass(frozen=True)
class _Made:
    """What the thread hands over: a shard or the end of the data, or what went wrong."""

    shard: Shard | None = None
    ready: torch.cuda.Event | None = None
    error: BaseException | None = None


class Prefetch:
    """A shard stream whose next shards are made in a background thread.

    Args:
        stream: only this object may use it from now on.
        depth: shards made ahead; 0 makes each when it is asked for, without a thread.
        device: where the rows live. On CUDA the thread works on a stream of its own.
        cancel: makes the shard under way end soon, with an exception; called from another thread when what
            is being made is no longer wanted.
    """

    def __init__(
        self,
        stream: ShardStream,
        depth: int = 1,
        device: str | torch.device = "cpu",
        cancel: Callable[[], None] = lambda: None,
    ) -> None:
        assert depth >= 0, depth
        self._cancel = cancel
        self.stream, self.depth, self.device = stream, depth, torch.device(device)
        self._thread: threading.Thread | None = None
        self._ended = False
        self._error: BaseException | None = None
        self._stop = threading.Event()

    @property
    def dims(self) -> Mapping[str, int]:
        return self.stream.dims

    @property
    def fingerprint(self) -> Mapping[str, str]:
        return self.stream.fingerprint

    @property
    def lanes(self) -> int:
        return self.stream.lanes

    def next_shard(self) -> Shard | None:
        """The next shard, with the wall time of making it as `seconds["produce"]`.

        Raises what the stream raised while making it, again at every call until a seek.
        """
        if self._error is not None:
            raise self._error  # "no more shards" would pass for the end of the data
        if self._ended:
            return None
        if self.depth == 0:
            made = self._make(None)
        else:
            if self._thread is None:
                self._start()
            made = self._wait()
            self._permits.release()
        if made.error is not None:
            self._error = made.error  # the thread is gone; seek starts a new one
            raise made.error
        self._ended = made.shard is None
        if made.shard is not None and made.ready is not None:
            # The rows were allocated on the thread's CUDA stream: without record_stream the allocator
            # could hand their memory to the next shard while this one's last batch is still being read.
            current = torch.cuda.current_stream(self.device)
            current.wait_event(made.ready)
            for x in [*made.shard.rows.values(), made.shard.ids]:
                if x.is_cuda:
                    x.record_stream(current)
        return made.shard

    def seek(self, cursor: dict[str, Any]) -> None:
        """Throw away what was made ahead (cancelling the shard under way) and continue from the cursor."""
        self._halt(timeout_s=None)
        self.stream.seek(cursor)
        self._ended, self._error = False, None

    def close(self, timeout_s: float | None = STUCK_S) -> None:
        """Stop making shards; one that takes longer than the timeout is abandoned to its daemon thread."""
        if self._halt(timeout_s):
            self.stream.close()
        self._ended = True

    def _wait(self) -> _Made:
        """What the thread made. Asked to stop, it says so soon; one that is stuck is left behind."""
        patience_s = STUCK_S
        while True:
            try:
                return self._queue.get(timeout=POLL_S)
            except queue.Empty:
                patience_s -= POLL_S if stop.reason() is not None else 0
                if patience_s <= 0:
                    stop.check()

    def _start(self) -> None:
        self._stop = threading.Event()
        self._queue: queue.SimpleQueue[_Made] = queue.SimpleQueue()
        self._permits = threading.Semaphore(self.depth)
        side = None
        if self.device.type == "cuda":
            side = torch.cuda.Stream(self.device)
            side.wait_stream(torch.cuda.current_stream(self.device))  # the weights may still be on their way
        thread = threading.Thread(
            target=self._run, args=(self._stop, self._queue, self._permits, side), name="harvest", daemon=True
        )
        thread.start()
        self._thread = thread  # not before: a signal in between would leave one that cannot be joined

    def _run(
        self,
        stop: threading.Event,
        out: "queue.SimpleQueue[_Made]",
        permits: threading.Semaphore,
        side: torch.cuda.Stream | None,
    ) -> None:
        more = True
        while more:
            permits.acquire()
            if stop.is_set():
                return
            made = self._make(side)
            more = made.shard is not None
            out.put(made)

    def _make(self, side: torch.cuda.Stream | None) -> _Made:
        start = time.perf_counter()
        try:
            with torch.cuda.stream(side) if side is not None else nullcontext():
                shard = self.stream.next_shard()
        except BaseException as error:  # all of them: raised again where the shard is asked for
            return _Made(error=error)
        ready = None
        if side is not None:
            ready = torch.cuda.Event()
            ready.record(side)
        if shard is not None:
            seconds = shard.seconds | {"produce": time.perf_counter() - start}
            shard = dataclasses.replace(shard, seconds=seconds)
        return _Made(shard, ready)

    def _halt(self, timeout_s: float | None) -> bool:
        """Stop the thread; whether it has ended."""
        if self._thread is None:
            return True
        self._stop.set()
        self._cancel()
        self._permits.release()
        self._thread.join(timeout_s)
        ended = not self._thread.is_alive()
        if ended:
            self._thread = None
        return ended
