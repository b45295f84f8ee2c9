"""Standard error that never ends a run.

Progress and warnings often go to a file beside the run, or to a terminal that somebody closes. When it cannot
take any more, what it refuses is dropped; what a run does about a full disk is decided where it saves.
Standard output stays strict: whoever asked for numbers shall not get half of them with exit code 0.
"""

import io
import os
import select
import sys
from typing import Any


class _Dropping(io.FileIO):
    """A file whose writes always succeed."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data) or 0
        except OSError:
            return len(data)


def tolerate_lost_messages() -> None:
    """Put such a stream in the place of sys.stderr, unless somebody else has replaced it already."""
    old = sys.stderr
    if old is None or old is not sys.__stderr__ or not isinstance(old, io.TextIOWrapper):
        return
    raw = io.BufferedWriter(_Dropping(old.fileno(), "wb", closefd=False))
    sys.stderr = io.TextIOWrapper(raw, encoding=old.encoding, errors=old.errors, line_buffering=True)


def nobody_reads() -> bool:
    """Whether standard output was closed by its reader (`| head`). What is still in it then goes nowhere."""
    out, poll = sys.stdout.fileno(), select.poll()
    poll.register(out, select.POLLERR)
    if not poll.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), out)
    return True
