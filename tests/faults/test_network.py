"""Runs without any network, and processes of one run whose link is cut: in network namespaces."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults.disk_tools import WAIT, needs_strace
from faults.tools import SYNTHETIC, Process, at_step, differences, final_state, resumed_at

from sae_train.checkpoint import Checkpointer

SHORT = ["train.tokens=320", "eval.every=0", "checkpoint.every=5"]
GRID = "grid={k: [2, 4], seed: [0, 1]}"
SHARED = [*SYNTHETIC, "source.lanes=4", GRID, "train.tokens=1280", "eval.every=0"]
TIMEOUT_S = 5
NEWNET = 0x40000000
ADDRESSES = ("10.77.0.1", "10.77.0.2")


def needs_namespaces() -> None:
    if os.geteuid() != 0 or None in map(shutil.which, ("unshare", "nsenter", "ip")):
        pytest.skip("network namespaces need root, util-linux and iproute2")
    done = subprocess.run(["unshare", "-n", "true"], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"no network namespaces here: {done.stderr.strip()}")


def alone(folder: Path, *args: str) -> tuple[int, str, str]:
    """A command where no interface is up: exit code, output, and calls that could reach an address."""
    calls = folder / f"{args[0]}.calls"
    offline = {"HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"}
    known = {key: value for key, value in os.environ.items() if key not in offline}
    known |= {"HOME": str(folder), "HF_HOME": str(folder / "hf"), "OMP_NUM_THREADS": "1"}
    tracing = ["strace", "-f", "--seccomp-bpf", "-qq", "-e", "trace=connect,sendto", "-o", str(calls)]
    command = ["unshare", "-n", *tracing, sys.executable, "-m", "sae_train", *args]
    done = subprocess.run(command, env=known, capture_output=True, text=True, timeout=500)
    return done.returncode, done.stdout + done.stderr, calls.read_text()


def reached(calls: str) -> list[str]:
    return [line for line in calls.splitlines() if "AF_INET" in line]


@pytest.mark.timeout(900)  # three whole processes, traced
def test_without_an_address_in_the_command_nobody_is_asked_and_none_is_missed(tiny, tmp_path):
    needs_namespaces()
    needs_strace()
    run = tmp_path / "run"
    code, text, calls = alone(tmp_path, "train", *tiny, *SHORT, f"run.dir={run}")
    assert code == 0 and (run / "report.html").is_file(), text
    assert reached(calls) == []
    code, text, calls = alone(tmp_path, "publish", f"run={run}", "repo=me/saes", "dry_run=true")
    assert code == 0 and "nobody was asked" in text, text
    assert reached(calls) == []
    asked = [arg for arg in tiny if not arg.startswith("corpus.name=")]
    once = ["corpus.attempts=1", "corpus.name=http://127.0.0.1:9/x.jsonl", f"out={tmp_path / 'out'}"]
    code, text, calls = alone(tmp_path, "harvest", *asked, *SHORT, *once)
    assert code == 75 and "Traceback" not in text, text
    assert reached(calls), "an address that was asked for would be seen"


class Link:
    """Two network namespaces joined by one cable, each held open by a sleeping process."""

    def __init__(self) -> None:
        sleep = ["unshare", "-n", "sh", "-c", "echo ready; exec sleep 1000"]
        self.holders = [subprocess.Popen(sleep, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        for holder in self.holders:
            assert holder.stdout is not None and holder.stdout.readline() == "ready\n"
        one, two = (str(holder.pid) for holder in self.holders)
        try:
            # Both ends are made inside the namespaces: nothing of this machine's own network is touched.
            self.ip(0, "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", two)
        except subprocess.CalledProcessError as error:
            self.close()
            pytest.skip(f"no virtual cable between {one} and {two} here: {error.stderr.strip()}")
        for side, address in enumerate(ADDRESSES):
            self.ip(side, "address", "add", f"{address}/24", "dev", "cable")
            self.ip(side, "link", "set", "lo", "up")
        self.set("up")

    def ip(self, side: int, *args: str) -> None:
        command = ["nsenter", "-t", str(self.holders[side].pid), "-n", "ip", *args]
        subprocess.run(command, check=True, capture_output=True, text=True)

    def set(self, state: str) -> None:
        for side in range(2):
            self.ip(side, "link", "set", "cable", state)

    def before(self, side: int) -> str:
        """Code that puts a process at one end."""
        return (
            "import ctypes, os\n"
            f"ns = os.open('/proc/{self.holders[side].pid}/ns/net', os.O_RDONLY)\n"
            "libc = ctypes.CDLL(None, use_errno=True)\n"
            f"assert libc.setns(ns, {NEWNET}) == 0, os.strerror(ctypes.get_errno())\n"
            "os.close(ns)\n"
        )

    def close(self) -> None:
        for holder in self.holders:
            holder.kill()
            holder.wait()


@pytest.fixture
def link() -> Iterator[Link]:
    needs_namespaces()
    made = Link()
    yield made
    made.close()


@pytest.mark.timeout(400)
def test_a_cut_link_between_processes_ends_both_after_the_timeout_and_once_mended_they_go_on(
    zygote, link, tmp_path
):
    """Nothing tells a process that its peer is out of reach: its connection stays open and is silent."""
    zygote.run("train", *SHARED, f"run.dir={tmp_path / 'whole'}", plots=False)
    run, cut = tmp_path / "run", tmp_path / "cut"

    def start(port: int, before: str = "") -> list[Process]:
        place = {"WORLD_SIZE": "2", "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": str(port), "LOCAL_RANK": "0"}
        args = ["train", *SHARED, f"mesh.timeout_s={TIMEOUT_S}", f"run.dir={run}"]
        own = [place | {"RANK": str(rank), "GLOO_SOCKET_IFNAME": "cable"} for rank in range(2)]
        return [
            zygote.start(*args, env=own[rank], before=link.before(rank) + before, plots=False)
            for rank in range(2)
        ]

    wait = f"[time.sleep(0.01) for _ in iter(lambda: os.path.exists({str(cut)!r}), True)]"
    both = start(29511, WAIT + at_step(12, wait))
    try:
        both[0].wait_for_step(run, 10)
        link.set("down")
        cut.touch()
        began = time.monotonic()
        assert [process.wait(120) for process in both] == [75, 75], [process.text() for process in both]
        assert TIMEOUT_S / 2 < time.monotonic() - began < 10 * TIMEOUT_S
        assert all("Traceback" not in process.text() for process in both)
        assert all("the same command continues" in process.text() for process in both)
        assert Checkpointer.steps(run / "checkpoints")[-1] == 10
        link.set("up")
        both = start(29512)
        assert [process.wait(120) for process in both] == [0, 0], [process.text() for process in both]
        assert resumed_at(both[0].text()) == 10
    finally:
        for process in both:
            process.send(signal.SIGKILL)
    assert differences(final_state(tmp_path / "whole"), final_state(run)) == []
