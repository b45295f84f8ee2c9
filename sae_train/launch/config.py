"""The keys of `launch`: where a command runs, and what it asks the cluster for."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sae_train.errors import InputError
from sae_train.files import is_name

TIME = re.compile(r"(?:(\d+)-)?(\d{1,3}):(\d{2}):(\d{2})")
OWN_OPTIONS = {"array", "account", "chdir", "cpus-per-task", "dependency", "error", "export", "gpus-per-node"}
OWN_OPTIONS |= {"job-name", "kill-on-invalid-dep", "mem", "nodes", "no-requeue", "ntasks", "ntasks-per-node"}
OWN_OPTIONS |= {"open-mode", "output", "parsable", "partition", "qos", "requeue", "signal", "time", "wait"}
OWN_OPTIONS |= {"wrap", "container-image", "container-mounts"}
"""Options of sbatch that have keys of their own, or that a job cannot do without."""


@dataclass
class LaunchConfig:
    """Where a command runs; everything but `name` and `parallel` is for a cluster."""

    name: str = "local"
    """local (this machine) or slurm."""
    parallel: int | None = None
    """Most jobs at a time. Unset: 1 on this machine, as many as the cluster lets run."""
    partition: str | None = None
    """Unset: the cluster's default; the same of account and qos."""
    account: str | None = None
    qos: str | None = None
    nodes: int = 1
    gpus_per_node: int = 0
    """0: none are asked for."""
    processes_per_node: int | None = None
    """Unset: one for each GPU, or one."""
    cpus_per_task: int | None = None
    """CPU cores of a process. Unset: the cluster's default. So is mem_gb, of a node."""
    mem_gb: int | None = None
    time: str | None = None
    """Time limit, as H:MM:SS or D-HH:MM:SS (quoted in a YAML file). Unset: the partition's own."""
    signal_s: int = 120
    """Seconds before the time limit at which the run is told to save; a save has to fit. 0: it is not."""
    requeue: int = 100
    """How often a job may go back into the queue: preempted, out of time, its node failed."""
    container_image: str | None = None
    """Image that the processes run in (srun --container-image, of pyxis); it has `sae-train` on its PATH."""
    container_mounts: list[str] = field(default_factory=list)
    """HOST:CONTAINER, as pyxis takes them. The working directory is mounted anyway."""
    setup: list[str] = field(default_factory=list)
    """Lines of shell that a job runs first, such as "module load cuda"."""
    extra: Any = None
    """Further options of sbatch: {constraint: a100, exclusive: true}."""

    def __post_init__(self) -> None:
        self._check_numbers()
        for key in ("partition", "account", "qos"):
            value = getattr(self, key)
            if value is not None and not re.fullmatch(r"[A-Za-z0-9_.,+@-]{1,200}", value):
                raise InputError(f"launch.{key}", value, "a name of the cluster, as sbatch takes it")
        if self.time is not None:
            self._check_time(self.time)
        for key in ("container_image", "container_mounts", "setup"):
            for text in _texts(getattr(self, key)):
                if not text.strip() or "\n" in text or "\0" in text:
                    raise InputError(f"launch.{key}", text, "one line of text, not empty")
        for mount in self.container_mounts:
            if "," in mount or not mount.startswith("/"):
                raise InputError("launch.container_mounts", mount, "HOST:CONTAINER, absolute, without commas")
        if self.container_mounts and self.container_image is None:
            raise InputError("launch.container_image", None, "an image, as there are launch.container_mounts")
        self._check_extra()

    def _check_numbers(self) -> None:
        least = {"nodes": 1, "gpus_per_node": 0, "signal_s": 0, "requeue": 0}
        least |= {"parallel": 1, "processes_per_node": 1, "cpus_per_task": 1, "mem_gb": 1}
        for key, smallest in least.items():
            value = getattr(self, key)
            if value is not None and not smallest <= value <= 65535:  # the most that --signal takes
                raise InputError(f"launch.{key}", value, f"a whole number from {smallest} to 65535")

    def _check_time(self, time: str) -> None:
        if (found := TIME.fullmatch(time)) is None:
            wanted = "H:MM:SS or D-HH:MM:SS (in a YAML file in quotes: YAML takes 4:00:00 for a number)"
            raise InputError("launch.time", time, wanted)
        days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
        limit = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
        if self.signal_s >= limit:
            raise InputError("launch.signal_s", self.signal_s, f"fewer seconds than launch.time={time} has")

    def _check_extra(self) -> None:
        if not isinstance(self.extra or {}, Mapping):
            raise InputError("launch.extra", self.extra, "options and their values: {constraint: a100}")
        for name, value in self.options.items():
            key = f"launch.extra.{name}"
            if name in OWN_OPTIONS:
                raise InputError(key, value, "an option of sbatch that launch has no key for")
            if not re.fullmatch(r"[a-z][a-z0-9-]*", name):
                raise InputError(key, value, "the long name of an option of sbatch, without dashes before it")
            if isinstance(value, Mapping | list) or value is None or "\n" in str(value):
                raise InputError(key, value, "a value on one line, or true for an option that takes none")

    @property
    def options(self) -> dict[str, Any]:
        """`extra`, or nothing."""
        return {str(name): value for name, value in (self.extra or {}).items()}

    @property
    def tasks_per_node(self) -> int:
        """Processes on each node."""
        return self.processes_per_node or self.gpus_per_node or 1


def _texts(value: str | list[str] | None) -> list[str]:
    return value if isinstance(value, list) else [] if value is None else [value]


def check_name(name: str) -> None:
    """Raises InputError unless a job can have this name, and files after it."""
    if not is_name(name) or name.startswith((".", "-")):
        raise InputError("job", name, "a name of letters, digits, dots, dashes and underscores")
