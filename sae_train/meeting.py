"""How the processes of one run find each other, or find out that they are not the ones they should be.

They leave their addresses in a store, where those of an earlier attempt must not be found. A store of
torchrun's agent outlives a restart of its workers (pytorch issue 135712), and nothing that the agents of
several hosts tell their workers names the attempt: TORCHELASTIC_RESTART_COUNT is each agent's own count. So
rank 0 makes up a name, the others answer under that name, each with a word of its own, and rank 0 repeats
the words. A process whose word is repeated is of the same attempt as that name, and addresses go under it.

All this is many short looks at the store and no long wait of torch's, which no signal would end.
"""

import json
import os
import socket
import time
import uuid
from datetime import timedelta
from typing import Any, TypeAlias

import torch
import torch.distributed as dist

from sae_train.errors import InputError

LOOK_S = 0.05
LINGER_S = 1.0
"""Where the others are refused, rank 0 stays so long: the store goes with it, and they are to read why."""


def started() -> int:
    """WORLD_SIZE: how many processes torchrun, or whoever speaks its language, started; else 1."""
    size = _number("WORLD_SIZE", "1")
    if size < 1:
        raise InputError("WORLD_SIZE", size, "the number of processes, at least 1")
    return size


def place() -> tuple[int, int]:
    """(RANK, WORLD_SIZE), and (0, 1) where nobody set them.

    Raises:
        InputError: they are not those of a process of a run.
    """
    size = started()
    rank = _number("RANK", "0" if size == 1 else None)
    if not 0 <= rank < size:
        raise InputError("RANK", rank, f"a number from 0 to {size - 1}, for WORLD_SIZE={size}")
    return rank, size


def own_gpu() -> int:
    """LOCAL_RANK: which of the GPUs that this process sees is its own.

    Raises:
        InputError: there is none of that number.
    """
    index, seen = _number("LOCAL_RANK", "0"), torch.cuda.device_count()
    if not 0 <= index < seen:
        wanted = f"a number below {seen}, the GPUs that this process sees; one process for each"
        raise InputError("LOCAL_RANK", index, wanted)
    return index


def meet(rank: int, size: int, timeout_s: int) -> dist.Store:
    """A store that the processes of this attempt have to themselves.

    Raises:
        InputError: not all of them came, two have one rank, or they were told different sizes.
    """
    of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    deadline = time.monotonic() + timeout_s
    own = {
        "size": size,
        "word": uuid.uuid4().hex,
        "who": f"process {os.getpid()} on {socket.gethostname()}",
    }
    try:
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            _number("MASTER_PORT", None),
            is_master=not of_agent and rank == 0,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s),
        )
        ours = dist.PrefixStore("sae-train", store)  # torchrun keeps things of its own there
        if rank == 0:
            return _lead(ours, own, deadline)
        return _follow(ours, rank, own, of_agent, deadline + LINGER_S)  # rank 0 knows who did not come
    except (RuntimeError, KeyError, OSError) as error:
        raise missed(size, error) from error


def missed(size: int, error: Exception) -> InputError:
    """That they do not meet, with torch's words."""
    where = ":".join(os.environ.get(f"MASTER_{part}", "?") for part in ("ADDR", "PORT"))
    told = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    wanted = (
        f"an address where all {size} processes meet, one of them with RANK=0, as torchrun sets it ({told})"
    )
    return InputError("MASTER_ADDR:MASTER_PORT", where, wanted)


def _lead(store: dist.Store, own: dict[str, Any], deadline: float) -> dist.Store:
    name, size = own["word"], own["size"]
    store.set("lead", name)
    words = {0: name}
    refused: list[Any] | None = None
    while len(words) < size and refused is None:
        for rank in range(1, size):
            if rank not in words and store.check([f"{name}/{rank}"]):
                said = json.loads(store.get(f"{name}/{rank}"))
                words[rank] = said["word"]
                if said["size"] != size:
                    wanted = f"the same in every process; process {rank} has {said['size']}"
                    refused = ["WORLD_SIZE", size, wanted]
        if refused is None and time.monotonic() > deadline:
            absent = ", ".join(str(rank) for rank in range(size) if rank not in words)
            wanted = f"so many processes that meet in time; none came with RANK={absent}"
            refused = ["WORLD_SIZE", size, wanted]
        if (verdict := _verdict(store, name)) is not None:
            refused = verdict[1]
        time.sleep(LOOK_S)
    _, refused = _decide(store, name, [words[rank] for rank in sorted(words)], refused)
    if refused is not None:
        time.sleep(LINGER_S)
        raise InputError(*refused)
    return dist.PrefixStore(name, store)


def _follow(store: dist.Store, rank: int, own: dict[str, Any], of_agent: bool, deadline: float) -> dist.Store:
    name = ""
    while time.monotonic() < deadline:
        if store.check(["lead"]) and (found := store.get("lead").decode()) != name:
            name = found
            first = json.loads(store.compare_set(f"{name}/{rank}", "", json.dumps(own)))
            if first["word"] != own["word"] and not of_agent:
                wanted = f"another number in every process; {first['who']} has it"
                _decide(store, name, [], ["RANK", rank, wanted])
                raise InputError("RANK", rank, wanted)
        if name and (verdict := _verdict(store, name)) is not None:
            words, refused = verdict
            # A store of an agent may hold the name and the verdict of an attempt before this one.
            if refused is not None and (own["word"] in words or not of_agent):
                raise InputError(*refused)
            if refused is None and own["word"] in words:
                return dist.PrefixStore(name, store)
            if refused is None and not of_agent:
                wanted = f"the same in every process; process 0 has {len(words)}"
                raise InputError("WORLD_SIZE", own["size"], wanted)
        time.sleep(LOOK_S)
    raise TimeoutError("they did not all come in time")


Verdict: TypeAlias = tuple[list[str], list[Any] | None]
"""The words of those it is about, and an InputError's parts if they are refused."""


def _decide(store: dist.Store, name: str, words: list[str], refused: list[Any] | None) -> Verdict:
    """The verdict on a name: this one, unless somebody was first."""
    first = json.loads(store.compare_set(f"{name}/verdict", "", json.dumps([words, refused])))
    return first[0], first[1]


def _verdict(store: dist.Store, name: str) -> Verdict | None:
    key = f"{name}/verdict"
    if not store.check([key]):
        return None
    words, refused = json.loads(store.get(key))
    return words, refused


def _number(name: str, default: str | None) -> int:
    found = os.environ.get(name, default)
    try:
        return int(found or "")
    except ValueError:
        raise InputError(name, found, "a number, as torchrun sets it") from None
