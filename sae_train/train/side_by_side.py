"""Several SAEs step at a time, on a CPU: each in a thread of its own, with its share of the cores.

A step is hundreds of ops, most of them of some ten microseconds: cores that work on one op together wait for
each other at the end of each. Two SAEs on a core each take two thirds of the time of one after the other on
both (docs/benchmarks.md). A GPU has one queue, and there SAEs take turns.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from threading import Barrier
from types import TracebackType
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


class SideBySide:
    """Threads that work for as long as a `with` block lasts.

    Args:
        at_once: how many SAEs step at a time.
        threads: that each of them computes with. None: they take turns in the caller's thread.
    """

    def __init__(self, at_once: int = 1, threads: int | None = None) -> None:
        self.at_once, self.threads = at_once, threads
        self._pool: ThreadPoolExecutor | None = None

    @classmethod
    def of(cls, own: int, all_of_run: int, threads: int) -> "SideBySide":
        """For the SAEs of this process. What each computes with follows from the run alone, not from how many
        processes there are: a sum's last bits may depend on it.

        Args:
            own: SAEs of this process. all_of_run: of all processes.
            threads: of this process.
        """
        if all_of_run < 2:
            return cls()
        return cls(max(1, min(own, threads)), max(1, threads // all_of_run))

    def __enter__(self) -> "SideBySide":
        if self.threads is None:
            return self
        own, all_there = torch.get_num_threads(), Barrier(self.at_once, timeout=60)
        self._pool = ThreadPoolExecutor(self.at_once, "step", _compute_with, (self.threads,))
        try:
            for future in [self._pool.submit(all_there.wait) for _ in range(self.at_once)]:
                future.result()
        except BaseException:  # no room for a thread: those that are there must not wait for it
            all_there.abort()
            self._pool.shutdown()
            raise
        finally:
            torch.set_num_threads(own)  # for threads that are yet to come
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def each(self, work: Callable[[T], R], of: Sequence[T]) -> list[R]:
        """What `work` makes of each, in order. All are through before the first error, in order, is raised:
        nobody may save what somebody still changes."""
        if self._pool is None:
            return [work(one) for one in of]
        futures: list[Future[R]] = [self._pool.submit(work, one) for one in of]
        wait(futures)
        return [future.result() for future in futures]


def _compute_with(threads: int) -> None:
    """torch's number of threads, of the calling one alone."""
    torch.get_num_threads()  # a thread takes the last number that anybody set when it is first asked
    torch.set_num_threads(threads)
