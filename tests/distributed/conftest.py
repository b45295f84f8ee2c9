"""Several processes on this machine that make one run, and the tiny runs of tests/faults."""

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from faults.conftest import tiny  # noqa: F401
from faults.tools import SYNTHETIC, Process, Zygote

GRID = "grid={k: [2, 4], seed: [0, 1]}"
SHORT = [*SYNTHETIC, "source.lanes=4", GRID, "train.tokens=1280", "eval.every=20"]
"""40 steps of four SAEs on rows without a model."""


class Group:
    """Processes of one run, by rank."""

    def __init__(self, members: list[Process]) -> None:
        self.members = members

    def wait(self, *codes: int, timeout_s: float = 120) -> list[str]:
        """Wait for all, demand exit codes (one for all, or one each) and return what they printed."""
        expected = codes * len(self.members) if len(codes) == 1 else codes
        found = tuple(process.wait(timeout_s) for process in self.members)
        texts = [process.text() for process in self.members]
        assert found == tuple(expected), f"exits {found}, not {expected}: " + "\n---\n".join(texts)
        return texts


MOST = 4
"""Processes that a test starts, at most: each has a GPU of its own, and NCCL, or none has."""
NO_GPUS = {} if torch.cuda.device_count() >= MOST else {"CUDA_VISIBLE_DEVICES": ""}


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port


Launch = Callable[..., Group]


@pytest.fixture
def launch(zygote: Zygote, tmp_path: Path) -> Iterator[Launch]:
    """launch(size, *args) starts `sae-train args...` as torchrun would, in so many processes on CPUs."""
    started: list[Process] = []

    def go(
        size: int, *args: str, before: str | dict[int, str] | None = None, env: dict[str, str] | None = None
    ) -> Group:
        port = str(free_port())
        group = []
        for rank in range(size):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} | NO_GPUS | (env or {})
            own = before.get(rank) if isinstance(before, dict) else before
            rows = tmp_path / f"rows-{len(started)}"
            group.append(zygote.start(*args, env=place, before=own, plots=False, rows=rows))
            started.append(group[-1])
        return Group(group)

    yield go
    for process in started:
        process.send(9)


@pytest.fixture(scope="session")
def whole(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of SHORT that one process made and nobody disturbed; leave it as it is."""
    run = tmp_path_factory.mktemp("whole") / "run"
    zygote.run("train", *SHORT, f"run.dir={run}", plots=False)
    return run
