"""Signals: the first SIGTERM, SIGUSR1, SIGUSR2 or Ctrl-C asks the run to save and leave, the second ends it.

SIGUSR1 and SIGUSR2 are a scheduler's warnings, which it may repeat; so is SIGTERM in a job of Slurm, which
sends it twice to what it preempts, and SIGKILL to what is not to have more time.
"""

import ctypes
import os
import signal
import threading
from types import FrameType

from sae_train import stop


class StopSignals:
    """Context manager that turns signals into stop requests (`sae_train.stop`).

    Until `defer()` nothing would be lost, so a signal also leaves at once, whatever is going on: loading a
    model has no point at which to ask. From then on it is only noted, and the work stops where it can
    be continued.

    After the first signal the kernel's own action is in place again for those that are final: the second one
    ends the process even where Python would not get to run a handler, in a long call of a library.

    Only a main thread may handle signals. In another one they do what they did before.
    """

    NAMES = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)

    def __init__(self) -> None:
        self._deferred = False
        self._final = {signal.SIGINT} if "SLURM_JOB_ID" in os.environ else {signal.SIGINT, signal.SIGTERM}
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        stop.clear()
        for number in self.NAMES if threading.current_thread() is threading.main_thread() else ():
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        stop.clear()

    def defer(self) -> None:
        """From here on there is something to lose: signals are noted and looked for.

        Raises:
            Interrupted: one came before.
        """
        self._deferred = True
        stop.check()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if stop.reason() is not None:
            if number in self._final:
                os.kill(os.getpid(), number)  # the second came before this handler was run for the first
            return
        stop.request(f"received {signal.Signals(number).name}")
        for again in self._final:
            # Not by Python's signal(), which forgets one that has come and waits for its handler.
            ctypes.CDLL(None).signal(int(again), None)
        if not self._deferred:
            raise stop.Interrupted(
                f"{stop.reason()}: stopped before the next step; the same command continues"
            )
