"""Stop requests: a signal asks the process to stop, and long work looks here whether it was asked.

Signals belong to the process, and so does this flag. Whoever works for longer than a second in one call
(a forward pass per micro-batch, a batch of an evaluation, the wait before another try) calls `check()`
between two pieces. `Interrupted` derives from BaseException so that no `except Exception` of a library
on the way takes it for an error of its own.
"""

import time

_reason: str | None = None
_together = False
# A plain name and no threading.Event: a signal handler sets it, and may run inside the wait for the Event.

SLICE_S = 0.2
"""A wait looks so often whether a stop was asked for."""


class Interrupted(BaseException):
    """The user, or the cluster, asked the process to stop. The same command continues what it did."""

    exit_code = 75


def request(why: str) -> None:
    """Ask the process to stop; the first reason is the one that is told."""
    global _reason
    _reason = _reason or why


def reason() -> str | None:
    """Why the process was asked to stop, or None."""
    return _reason


def together(held: bool) -> None:
    """Whether this process works in step with others: then it leaves only where they agree to, and `check`
    lets it go on until there."""
    global _together
    _together = held


def check() -> None:
    """Raise `Interrupted` if the process was asked to stop."""
    if _reason is not None and not _together:
        raise Interrupted(_reason)


def sleep(seconds: float) -> None:
    """Wait, but not past a stop request.

    Raises:
        Interrupted: the process is asked to stop.
    """
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0 and _reason is None:
        time.sleep(min(left, SLICE_S))  # a signal does not end it: it goes on after the handler
    check()


def clear() -> None:
    """Forget the request: for the next run in the same process."""
    global _reason, _together
    _reason, _together = None, False
