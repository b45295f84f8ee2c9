"""The processes of one run: which this one is, what it alone does, and what they tell each other.

`torchrun --no-python sae-train train ...` starts one process per device. Each of them reads, trains and
judges its share; rank 0, the lead, alone writes what belongs to the run (metrics, checkpoints' names, the
report). A process that runs alone is the lead of itself and talks to nobody.

Two threads must not mix their messages, so the thread that harvests and the one that saves have groups of
their own. Whatever may fail in one process only (a disk, a number) is done through `lead_does` or `all_do`:
then it fails in all of them, with the same words, and none waits for one that has left.

What is said is JSON in tensors of bytes: object collectives of torch would unpickle it.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sae_train.devices import pick_device
from sae_train.errors import InputError, LostProcess, NumericsError, StoppedEarly
from sae_train.meeting import meet, missed, own_gpu, place
from sae_train.meeting import started as started

T = TypeVar("T")


@dataclass
class MeshConfig:
    """How the processes of one run (torchrun starts them) share its work."""

    data: int = 1
    """Parts into which the rows of a step are divided, one for each of so many processes."""
    feature: int = 1
    """Slices into which the latents of an SAE are divided; data x feature processes train one SAE."""
    harvest: int = 0
    """Processes, the last ones, that harvest for the others and train nothing; 0 has all of them do both."""
    timeout_s: int = 600
    """A process that does not answer for so long is given up, and the run with it."""

    def __post_init__(self) -> None:
        for key in ("data", "feature"):
            if getattr(self, key) < 1:
                raise InputError(f"mesh.{key}", getattr(self, key), "a number of processes, at least 1")
        if self.harvest < 0:
            raise InputError("mesh.harvest", self.harvest, "a number of processes, or 0")
        if self.timeout_s < 1:
            raise InputError("mesh.timeout_s", self.timeout_s, "a number of seconds, at least 1")

    def harvesters(self, size: int) -> range:
        """Those of `size` processes that harvest."""
        return range(size - (self.harvest or size), size)


@dataclass(frozen=True)
class Ranks:
    """This process among those of its run."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    """None: the default group, that of the main thread."""
    timeout_s: int = 600

    @property
    def lead(self) -> bool:
        return self.rank == 0

    def mine(self, things: Sequence[T]) -> list[T]:
        """This process's share; every thing is in the share of one."""
        return list(things[self.rank :: self.size])

    def apart(self) -> "Ranks":
        """The same processes with messages of their own, for another thread. All have to call it, in turn."""
        if self.size == 1:
            return self
        with answered():
            return replace(self, group=dist.new_group(timeout=timedelta(seconds=self.timeout_s)))

    def any(self, flag: bool) -> bool:
        """Whether any process says yes; all of them must ask."""
        if self.size == 1:
            return flag
        said = torch.tensor(int(flag))  # on the CPU: asking at every step must not wait for a GPU
        with answered():
            dist.all_reduce(said, op=dist.ReduceOp.MAX, group=self.group)
        return bool(said)

    def gather(self, value: Any) -> list[Any]:
        """What every process says, in order of ranks, on all of them. JSON-able values."""
        if self.size == 1:
            return [value]
        own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        with answered():
            dist.all_gather(sizes, torch.tensor([len(own)]), group=self.group)
            longest = int(max(sizes))
            parts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
            padded = torch.zeros(longest, dtype=torch.uint8)
            padded[: len(own)] = own
            dist.all_gather(parts, padded, group=self.group)
        texts = (bytes(part[: int(size)].numpy()) for part, size in zip(parts, sizes, strict=True))
        return [json.loads(text) for text in texts]

    def spread(self, tensor: Tensor, owner: int) -> None:
        """Overwrite a tensor with that of the rank `owner`; all have the same shape and dtype."""
        if self.size > 1:
            with answered():
                dist.broadcast(tensor, src=owner, group=self.group)

    def lead_does(self, work: Callable[[], T]) -> T:
        """What rank 0 makes of `work`, on all of them; if it raises, all raise. JSON-able results."""
        if self.size == 1:
            return work()
        made, told = None, None
        error: Exception | None = None
        if self.lead:
            try:
                made = work()
            except Exception as raised:
                error, told = raised, _words(raised)
        result, told = self.gather([made, told] if self.lead else None)[0]
        if told is not None:
            raise error or _error(told)
        answer: T = result
        return answer

    def all_do(self, work: Callable[[], T]) -> T:
        """Every process does its own; if one raises, all raise what the first of them did."""
        if self.size == 1:
            return work()
        made, told = None, None
        error: Exception | None = None
        try:
            made = work()
        except Exception as raised:
            error, told = raised, _words(raised)
        first = next((words for words in self.gather(told) if words is not None), None)
        if first is not None:
            raise error if error is not None and told == first else _error(first)
        return made  # type: ignore[return-value]


ALONE = Ranks()


@contextmanager
def joined(config: MeshConfig, device_name: str = "auto") -> Iterator[Ranks]:
    """Meet the other processes; alone if there are none.

    Args:
        device_name: what the run computes on. On GPUs each process has its own, and they speak over NCCL too.

    Raises:
        InputError: they do not meet.
    """
    rank, size = place()
    if size == 1:
        yield Ranks()
        return
    device = torch.device("cuda", own_gpu()) if pick_device(device_name).type == "cuda" else None
    if device is not None:
        torch.cuda.set_device(device)
    store = meet(rank, size, config.timeout_s)
    try:
        dist.init_process_group(
            "gloo" if device is None else "cpu:gloo,cuda:nccl",
            store=store,
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=config.timeout_s),
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise missed(size, error) from error
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), timeout_s=config.timeout_s)
    finally:
        dist.destroy_process_group()


@contextmanager
def answered() -> Iterator[None]:
    """Around a collective; one that fails has lost a process, or waited for it in vain."""
    try:
        yield
    except RuntimeError as error:
        raise LostProcess(
            f"another process of this run is gone or does not answer ({_first(error)}); what was saved is "
            "whole, and the same command continues"
        ) from error


def _first(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _words(error: Exception) -> list[Any]:
    """An error for another process; one of a kind that nobody expects is only described."""
    if isinstance(error, InputError):
        return ["input", error.field, str(error.value), error.accepted]
    if isinstance(error, NumericsError | StoppedEarly):
        return [type(error).__name__, str(error)]
    if isinstance(error, OSError) and error.errno is not None:
        return ["os", error.errno, error.strerror or "", str(error.filename or "")]
    return ["other", f"{type(error).__name__}: {error}"]


def _error(words: list[Any]) -> Exception:
    kind, *rest = words
    if kind == "input":
        return InputError(*rest)
    if kind == "os":
        return OSError(*rest)
    if kind == NumericsError.__name__:
        return NumericsError(*rest)
    if kind == StoppedEarly.__name__:
        return StoppedEarly(*rest)
    return RuntimeError(f"in another process: {rest[0]}")
