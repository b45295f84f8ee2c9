"""How processes of one run find each other: started wrongly, they say how; started again, they meet anew."""

import re
import signal
import socket
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from distributed.conftest import SHORT, free_port
from faults.tools import Process, Zygote, at_step, call, differences, final_state, resumed_at, send

from sae_train.errors import InputError
from sae_train.meeting import own_gpu

ABSENT = r"WORLD_SIZE=\d: expected so many processes that meet in time; none came with RANK="
WRONG: dict[str, list[tuple[str, str, str | None]]] = {
    "two leads": [
        ("0", "2", f"{ABSENT}1$|address already in use"),
        ("0", "2", f"{ABSENT}1$|address already in use"),
    ],
    "one rank twice, another never": [
        ("0", "3", "RANK=1: expected another number in every process; process .* has it$"),
        ("1", "3", "RANK=1: expected another number in every process; process .* has it$"),
        ("1", "3", "RANK=1: expected another number in every process; process .* has it$"),
    ],
    "a smaller size": [
        ("0", "3", "WORLD_SIZE=3: expected the same in every process; process 1 has 2$"),
        ("1", "2", "WORLD_SIZE=3: expected the same in every process; process 1 has 2$"),
    ],
    "a larger size": [
        ("0", "2", "WORLD_SIZE=2: expected the same in every process; process 1 has 3$"),
        ("1", "3", "WORLD_SIZE=2: expected the same in every process; process 1 has 3$"),
    ],
    "one too many": [
        ("0", "2", None),
        ("1", "2", None),
        ("2", "3", "WORLD_SIZE=3: expected the same in every process; process 0 has 2$"),
    ],
    "a rank beyond the size": [
        ("0", "2", f"{ABSENT}1$"),
        ("2", "2", "RANK=2: expected a number from 0 to 1, for WORLD_SIZE=2$"),
    ],
    "no number": [
        ("x", "2", "RANK='x': expected a number, as torchrun sets it$"),
        ("0", "two", "WORLD_SIZE='two': expected a number, as torchrun sets it$"),
        ("0", "-1", "WORLD_SIZE=-1: expected the number of processes, at least 1$"),
    ],
}
"""RANK, WORLD_SIZE and the end of what each process says; None for those that train and end well."""


def start(
    zygote: Zygote, run: Path, port: int, rank: str, size: str, timeout_s: int = 60, **more: str
) -> Process:
    env = {"RANK": rank, "LOCAL_RANK": "0", "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1"}
    env |= {"MASTER_PORT": str(port)} | {k: v for k, v in more.items() if k != "before"}
    args = [*SHORT, f"mesh.timeout_s={timeout_s}", f"run.dir={run}"]
    return zygote.start("train", *args, env=env, plots=False, before=more.get("before"))


@pytest.mark.parametrize("what", WRONG)
def test_processes_that_were_started_wrongly_end_soon_with_a_line_that_says_how(what, zygote, tmp_path):
    port, waits = free_port(), any(ABSENT in (line or "") for _, _, line in WRONG[what])
    group = [
        start(zygote, tmp_path / "run", port, rank, size, timeout_s=6 if waits else 60)
        for rank, size, _ in reversed(WRONG[what])
    ]
    for process, (_, _, line) in zip(reversed(group), WRONG[what], strict=True):
        assert process.wait(60) == (0 if line is None else 2), process.text()
        if line is not None:
            assert re.search(line, process.text().strip().splitlines()[-1]), process.text()
            assert "Traceback" not in process.text()


def test_one_that_waits_for_the_others_leaves_at_once_when_it_is_asked_to(zygote, tmp_path):
    waits = call("sae_train.meeting:_verdict", "print('waits', flush=True)", nth=1)
    process = start(zygote, tmp_path / "run", free_port(), "0", "2", before=waits)
    while "waits" not in process.text():
        assert process.poll() is None, process.text()
        time.sleep(0.01)
    process.send(signal.SIGTERM)
    assert process.wait(5) == 75


@pytest.mark.parametrize("number", ["2", "-1", "x", ""])
def test_a_local_rank_beyond_the_gpus_that_a_process_sees_is_refused(number, monkeypatch):
    """As where every process is given one GPU, and a number for all of its host's."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert own_gpu() == 1
    monkeypatch.setenv("LOCAL_RANK", number)
    with pytest.raises(InputError, match=f"LOCAL_RANK='?{number}'?: expected a number"):
        own_gpu()


def test_processes_that_compute_on_the_cpu_need_no_gpu_each(launch, tmp_path):
    """On a machine with one GPU, so many that they could not have one each."""
    one_gpu = (
        "import torch; torch.cuda.is_available = lambda: True; torch.cuda.device_count = lambda: 1; "
        # Where torch is built for CUDA optimizers would ask its driver: 2.13, then 2.11.
        "torch.accelerator.current_accelerator = lambda check_available=False: None; "
        "torch.cuda.is_current_stream_capturing = lambda: False"
    )
    args = [*SHORT, "train.tokens=320", "model.device=cpu", f"run.dir={tmp_path / 'run'}"]
    launch(2, "train", *args, before=one_gpu).wait(0)


def store_of_an_agent() -> dist.TCPStore:
    timeout = timedelta(seconds=60)
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timeout)


def test_a_store_that_dies_in_the_middle_is_not_missed(zygote, whole, tmp_path):
    """As with a torchrun that is killed, and its processes are not: they need it to meet, and no more."""
    run, dead = tmp_path / "run", tmp_path / "dead"
    agents = store_of_an_agent()
    wait = at_step(13, f"while not os.path.exists({str(dead)!r}): time.sleep(0.02)")
    shared = {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    group = [
        start(zygote, run, agents.port, "0", "2", **shared),
        start(zygote, run, agents.port, "1", "2", **shared, before=wait),
    ]
    group[0].wait_for_step(run, 12)
    port = agents.port
    del agents
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
    dead.touch()
    assert [process.wait() for process in group] == [0, 0], [process.text() for process in group]
    assert differences(final_state(whole), final_state(run)) == []


def test_an_attempt_does_not_take_the_one_before_it_for_itself_where_their_store_lives_on(
    zygote, whole, tmp_path
):
    """As under torchrun on two hosts: each agent counts restarts for itself."""
    run = tmp_path / "run"
    agents = store_of_an_agent()
    shared = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    kill = at_step(23, send(signal.SIGKILL))
    first = [
        start(zygote, run, agents.port, "0", "2", **shared),
        start(zygote, run, agents.port, "1", "2", **shared, before=kill),
    ]
    assert [process.wait() for process in first] == [75, -9]
    late = "import time; time.sleep(2)"  # so the other one finds what the attempt before left
    again = [
        start(zygote, run, agents.port, "0", "2", **shared, before=late),
        start(zygote, run, agents.port, "1", "2", **shared | {"TORCHELASTIC_RESTART_COUNT": "1"}),
    ]
    assert [process.wait() for process in again] == [0, 0], [process.text() for process in again]
    assert resumed_at(again[0].text()) in (10, 15, 20)
    assert differences(final_state(whole), final_state(run)) == []
