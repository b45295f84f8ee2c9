"""Saving while training goes on: a copy of the state is written by a thread, one save at a time.

The loop stands still only while the state is copied. Every step looks how the save under way ended; a
failure is told at once and tried again before training goes on, and after three the run stops rather than
train on without a net. What must not be lost (the last step, a stop that was asked for) is written before
anything else happens.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sae_train import stop
from sae_train.checkpoint import Checkpointer, Slice
from sae_train.errors import StoppedEarly
from sae_train.ranks import Ranks

logger = logging.getLogger("sae_train.train")

RETRY_S = (1.0, 5.0)
"""Waits before the second and the third try. A device that is only busy recovers; the 30 s that a job manager
leaves a stopped process do not allow for more."""
MOST_FAILURES = 1 + len(RETRY_S)


class Saver:
    """Commits states through a `Checkpointer`, in the background or at once.

    Args:
        checkpointer: where to; used from one thread at a time.
        meta: JSON-able facts stored with every checkpoint.
        check: asked before each save; raises if the folder is not ours any more.
    """

    def __init__(
        self, checkpointer: Checkpointer, meta: Mapping[str, Any], check: Callable[[], None] = lambda: None
    ) -> None:
        self.checkpointer, self.meta, self._check = checkpointer, meta, check
        self.failures = 0
        """Saves in a row that failed."""
        self._thread: threading.Thread | None = None
        self._step = -1
        self._error: BaseException | None = None

    @property
    def idle(self) -> bool:
        """Whether no save is under way: none was started, or `poll` has seen it end."""
        return self._thread is None

    def poll(self, ranks: Ranks) -> bool:
        """How the last save in the background ended, if it has in all processes: False if it failed and is to
        be tried again.

        Raises:
            StoppedEarly: it was the third in a row to fail.
            NumericsError, InputError: what was to be saved, or where, cannot be.
        """
        if self._thread is None or ranks.any(self._thread.is_alive()):
            return True
        return self._ended()

    def start(self, step: int, state: Mapping[str, Any]) -> None:
        """Copy the state and have it written while training goes on. Only when `idle`."""
        assert self.idle, "one save at a time"
        self._check()
        copied = snapshot(state)
        self._step = step
        self._thread = threading.Thread(target=self._write, args=(step, copied), name="save", daemon=True)
        self._thread.start()

    def now(self, step: int, state: Mapping[str, Any]) -> None:
        """Write a state before going on, after the one under way; a failure is tried again, after a wait.

        Raises:
            StoppedEarly: three tries failed; the checkpoints before it are whole.
        """
        self.join()
        while True:
            if self.failures:
                time.sleep(RETRY_S[self.failures - 1])
            self._check()
            try:
                self.checkpointer.save(step, state, self.meta)
            except OSError as error:
                self._failed(step, error)
            else:
                self.failures = 0
                return

    def join(self) -> bool:
        """Wait for the save under way; False if it failed. Raises what `poll` raises."""
        if self._thread is None:
            return True
        self._thread.join()
        return self._ended()

    def _write(self, step: int, state: dict[str, Any]) -> None:
        try:
            self.checkpointer.save(step, state, self.meta)
        except BaseException as error:  # handed to the loop, which raises or tells it
            self._error = error

    def _ended(self) -> bool:
        self._thread, error, self._error = None, self._error, None
        if error is None:
            self.failures = 0
            return True
        if not isinstance(error, OSError):
            raise error
        self._failed(self._step, error)
        return False

    def _failed(self, step: int, error: OSError) -> None:
        self.failures += 1
        if self.failures == MOST_FAILURES:
            asked = f"{stop.reason()}; " if stop.reason() else ""
            raise StoppedEarly(
                f"{asked}step {step} could not be saved in {MOST_FAILURES} tries ({error}); the checkpoints "
                "before it are whole: make room, and the same command continues from the newest"
            ) from error
        logger.warning(
            "step %d could not be saved (%s), try %d of %d", step, error, self.failures, MOST_FAILURES
        )


def snapshot(value: Any) -> Any:
    """A state that shares nothing with the original; tensors are on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    if isinstance(value, Slice):
        return replace(value, tensor=snapshot(value.tensor))
    if isinstance(value, Mapping):
        return {key: snapshot(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [snapshot(item) for item in value]
    return value
