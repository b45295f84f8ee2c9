"""What a run asks of its machine: memory, how busy processor and GPU are, tokens per second.

Read from counters that the operating system, the driver and torch's allocator keep anyway: nothing waits
for the device. With several processes each number is the worst of them, the one that will be felt
first: the fullest memory, the idlest GPU. What cannot be read is left out, and said once.
"""

import logging
import time
from collections.abc import Callable, Sequence

import psutil
import torch

try:
    from pynvml import NVMLError
except ModuleNotFoundError:  # GPUs of another make, or none

    class NVMLError(Exception):  # type: ignore[no-redef]
        """Nobody raises it."""


logger = logging.getLogger("sae_train.train")

WORST: dict[str, Callable[[list[float]], float]] = {
    "rss_bytes": max,
    "cpu_cores": max,
    "host_cpu": max,
    "host_free_bytes": min,
    "gpu_bytes": max,
    "gpu_peak_bytes": max,
    "gpu_busy": min,
    "tokens_per_s": min,
}
"""Every reading, and which of several processes' is the worst.

`rss_bytes` is this process's resident memory, `cpu_cores` how many cores it kept busy since the last
reading, `host_cpu` the share of all cores that anybody did, `host_free_bytes` what the host could still
give; `gpu_bytes` and `gpu_peak_bytes` are tensors' memory, now and at most, `gpu_busy` the share of the
last second in which a kernel ran; `tokens_per_s` is the rate since the last reading."""


READ_S = 1.0
"""Readings are at most so old: one took 0.6 ms (2 busy cores), which is much beside ten steps of a GPU."""


class SystemMeter:
    """Reads this process and its host; one per process."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._process.cpu_percent(None)  # the first call of each only starts to count
        psutil.cpu_percent(None)
        self._last: tuple[float, int] | None = None
        self._found: dict[str, float] = {}
        self._busy_known = torch.cuda.is_available()

    def read(self, tokens: int) -> dict[str, float]:
        """What can be read now, by the names of `WORST`; within a second, what was read before.

        Args:
            tokens: trained on so far; the first reading has no rate.
        """
        now, before = time.monotonic(), self._last
        if before is not None and now - before[0] < READ_S:
            return self._found
        found = {
            "rss_bytes": float(self._process.memory_info().rss),
            "cpu_cores": self._process.cpu_percent(None) / 100,
            "host_cpu": psutil.cpu_percent(None) / 100,
            "host_free_bytes": float(psutil.virtual_memory().available),
        }
        if torch.cuda.is_available():
            found["gpu_bytes"] = float(torch.cuda.memory_allocated())
            found["gpu_peak_bytes"] = float(torch.cuda.max_memory_allocated())
            if (busy := self._gpu_busy()) is not None:
                found["gpu_busy"] = busy
        if before is not None:
            found["tokens_per_s"] = (tokens - before[1]) / (now - before[0])
        self._last, self._found = (now, tokens), found
        return found

    def _gpu_busy(self) -> float | None:
        """Share of the time in which a kernel ran; None once the driver has not said it."""
        if self._busy_known:
            try:
                return torch.cuda.utilization() / 100
            except (ModuleNotFoundError, RuntimeError, NVMLError) as error:
                logger.info("system/gpu_busy is left out: %s", error)
                self._busy_known = False
        return None


def worst(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    """The worst of several processes' readings, as it is logged; what nobody read is left out."""
    return {
        f"system/{name}": pick(found)
        for name, pick in WORST.items()
        if (found := [part[name] for part in parts if name in part])
    }
