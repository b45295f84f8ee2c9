"""Where the time of a run goes: a stopwatch over named, non-overlapping phases of the main thread."""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


class Clock:
    """Seconds per phase. Phases nest: time inside an inner phase is not counted in the outer one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._stack: list[str] = []
        self._since = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._switch()
        self._stack.append(name)
        try:
            yield
        finally:
            self._switch()
            self._stack.pop()

    def _switch(self) -> None:
        now = time.perf_counter()
        self.seconds[self._stack[-1] if self._stack else "other"] += now - self._since
        self._since = now

    def total(self) -> float:
        """Wall seconds, those of earlier legs of the run included."""
        self._switch()
        return sum(self.seconds.values())

    def state_dict(self) -> dict[str, float]:
        self._switch()
        return dict(self.seconds)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, seconds in state.items():
            self.seconds[name] += float(seconds)


PRODUCER = {"forward": "model forward", "tokens": "tokenising", "filter": "filtering", "permute": "shuffling"}
"""What a producer of rows spends time on -> how people are told."""


def time_shares(phases: Mapping[str, float], producer: Mapping[str, float]) -> dict[str, float]:
    """Seconds of wall time by what was really being done.

    While the main thread waits for rows the producer is at work, so the waiting is split in the
    producer's own proportions; what the producer does while the main thread trains costs no wall
    time and is not counted.

    Args:
        phases: `Clock.seconds`, with waiting under "rows".
        producer: seconds the producer spent on each of `PRODUCER`; other keys are passed over.

    Returns:
        Seconds by activity; they add up to the sum of `phases`.
    """
    out = {name: seconds for name, seconds in phases.items() if name != "rows"}
    waited = phases.get("rows", 0.0)
    busy = {told: producer[name] for name, told in PRODUCER.items() if producer.get(name)}
    if not busy:
        return out | {"waiting for rows": waited}
    for name, seconds in busy.items():
        out[name] = out.get(name, 0.0) + waited * seconds / sum(busy.values())
    return out
