"""Trying again: how often, how long between, and what is said meanwhile."""

import logging
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sae_train import stop

if TYPE_CHECKING:
    from tenacity import RetryCallState

log = logging.getLogger("sae_train.harvest")

_dice = random.Random()
"""Of its own: the state of Python's common generator is part of a checkpoint."""


@dataclass(frozen=True)
class Retry:
    """How often a read that failed for an outside reason is tried, and how long it waits in between: the
    first wait is `initial_s`, each later one twice the one before up to `max_s`, and up to `initial_s` more
    at random, so that many runs do not all come back at once."""

    attempts: int = 5
    initial_s: float = 1.0
    max_s: float = 30.0

    def __call__(
        self,
        action: Callable[[], Any],
        what: str,
        is_outage: Callable[[BaseException], bool],
        before_next: Callable[[], None] | None = None,
    ) -> Any:
        """The result of an action, tried again while it fails with what `is_outage` says may pass.

        Every failed attempt is logged. The error of the last one comes out as it is.

        Raises:
            Interrupted: the process is asked to stop while this waits.
        """
        # Not above: trainers import this file, and kernels are benchmarked where little more than torch is.
        from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential

        def note(state: "RetryCallState") -> None:
            error = state.outcome.exception() if state.outcome else None
            log.warning(
                "%s failed (attempt %d of %d): %s", what, state.attempt_number, self.attempts, one_line(error)
            )
            if before_next is not None:
                before_next()

        doubling = wait_exponential(self.initial_s, self.max_s)
        return Retrying(
            stop=stop_after_attempt(self.attempts),
            wait=lambda state: doubling(state) + _dice.uniform(0, self.initial_s),
            retry=retry_if_exception(is_outage),
            before_sleep=note,
            sleep=stop.sleep,
            reraise=True,
        )(action)


def one_line(error: BaseException | None) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
