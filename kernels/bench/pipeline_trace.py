"""When each side of a pipeline was at work, from the trace of torch's profiler."""

import gzip
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile

MARK = "training step"
"""Whatever runs in a `record_function` of this name is the training's; all else is the harvest's."""

ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
Span: TypeAlias = tuple[float, float]


def record(run: Callable[[], object], file: Path, device: torch.device) -> dict[str, float]:
    """Profiles `run`, writes its trace and returns `shares` of it: a GPU's by streams, a CPU's by threads."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    every_thread = _ExperimentalConfig(profile_all_threads=not cuda)
    with profile(activities=activities, experimental_config=every_thread) as profiler:
        run()
        if cuda:
            torch.cuda.synchronize(device)
    file.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(file))
    opened = gzip.open if file.suffix == ".gz" else open
    with opened(file, "rt") as stream:
        return shares(json.load(stream)["traceEvents"])


def shares(events: list[dict[str, Any]]) -> dict[str, float]:
    """Of the time from the first to the last work of either side: `training`, `harvest`, `both`, `neither`.

    Raises:
        ValueError: the trace has no work, or none that is marked.
    """
    timed = [event for event in events if event.get("ph") == "X"]
    on_device = any(event.get("cat") in ON_DEVICE for event in timed)
    work, marks = (ON_DEVICE, "gpu_user_annotation") if on_device else (("cpu_op",), "user_annotation")
    lanes: dict[Any, list[Span]] = defaultdict(list)
    marked = set()
    for event in timed:
        if event.get("cat") in work:
            lanes[_lane(event)].append((event["ts"], event["ts"] + event["dur"]))
        elif event.get("cat") == marks and event["name"] == MARK:
            marked.add(_lane(event))
    if not marked & lanes.keys():
        raise ValueError(f"the trace has no work in {MARK!r}: {len(timed)} events, {len(lanes)} lanes")
    training = _merged([span for lane, spans in lanes.items() if lane in marked for span in spans])
    harvest = _merged([span for lane, spans in lanes.items() if lane not in marked for span in spans])
    either = _merged(training + harvest)
    total = either[-1][1] - either[0][0]
    busy = {"training": _length(training), "harvest": _length(harvest)}
    busy["both"] = busy["training"] + busy["harvest"] - _length(either)
    busy["neither"] = total - _length(either)
    return {"seconds": total / 1e6} | {name: length / total for name, length in busy.items()}


def _lane(event: dict[str, Any]) -> tuple[Any, Any]:
    """A stream of a GPU, or a thread of a process."""
    return event["pid"], event["tid"]


def _merged(spans: list[Span]) -> list[Span]:
    """The same time in spans that neither touch nor overlap."""
    out: list[Span] = []
    for start, end in sorted(spans):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], end))
        else:
            out.append((start, end))
    return out


def _length(spans: list[Span]) -> float:
    return sum(end - start for start, end in spans)
