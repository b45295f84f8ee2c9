"""Stop requests: the first SIGTERM, SIGUSR1 or Ctrl-C asks the run to save and leave, the second ends it."""

import os
import signal
from types import FrameType


class StopSignals:
    """Context manager; `reason()` tells the training loop that a stop was asked for."""

    NAMES = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self) -> None:
        self._reason: str | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        for number in self.NAMES:
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def reason(self) -> str | None:
        return self._reason

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._reason is not None and number != signal.SIGUSR1:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._reason = f"received {signal.Signals(number).name}"
