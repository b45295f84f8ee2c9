"""Tools of the storage tests: file systems of any size, system calls that fail, and gates to wait at.

Nothing is simulated inside the program: a small disk is a tmpfs in a mount namespace of its own, a failing
or slow device is strace in the way of the real system call, a killed process gets a real SIGKILL.
"""

import functools
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from faults.tools import WITHOUT_MODEL, Process, call

from sae_train.checkpoint import Checkpointer
from sae_train.files import verify

SAVING = [
    "source=synthetic",
    *WITHOUT_MODEL,
    "hook=auto",
    "train.tokens=1280",
    "eval.every=0",
    "checkpoint.every=4",
    "checkpoint.keep=2",
]
"""40 steps of rows that no model has to make, a checkpoint every 4: these tests are about what is saved."""

WAIT = call("sae_train.train.saver:Saver.poll", "if args[0]._thread: args[0]._thread.join()")
"""For `before=`: training waits for each save. What is saved then does not depend on how busy the machine is;
the saves are made by their thread all the same."""

HARVEST = [
    *(arg for arg in SAVING if arg.startswith(("source", "hook", "train.", "run.", "eval.tokens"))),
    "train.tokens=1400",
]
"""Six shards of the same rows, onto disk."""


def wait_until(
    true: Callable[[], Any], what: str, process: Process | None = None, timeout_s: float = 90
) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert process is None or process.poll() is None, f"ended before {what}: {process.text()}"
        assert time.monotonic() < deadline, f"not in {timeout_s} s: {what}"
        time.sleep(0.005)


GATE = """
import functools, importlib, os, threading, time
from pathlib import Path
def install(spec):
    target, numbers, folder = spec.split("|")
    module, _, name = target.partition(":")
    owner = importlib.import_module(module)
    *outer, name = name.split(".")
    for part in outer:
        owner = getattr(owner, part)
    function, calls = getattr(owner, name), [0]
    @functools.wraps(function)
    def gated(*args, **kwargs):
        calls[0] += 1
        if str(calls[0]) in numbers.split(","):
            at = Path(folder, str(calls[0]))
            (half := at.with_suffix(".half")).write_text(str(threading.get_native_id()))
            half.rename(at)
            while not at.with_suffix(".go").exists():
                if os.getppid() == 1:  # the tests are over: one of them failed and left this one waiting
                    os._exit(99)
                time.sleep(0.002)
        return function(*args, **kwargs)
    setattr(owner, name, gated)
"""


class Gate:
    """Calls of a function at which a command waits until the test lets it go on.

    gate = Gate(tmp_path / "gate", "sae_train.checkpoint:committed_folder", 2, 5)   # the 2nd and 5th call
    process = zygote.start("train", ..., before=gate.before)
    thread = gate.reached(2, process)
    ...                                   # fill the disk, move the folder, attach strace to the thread
    gate.open(2)
    """

    def __init__(self, folder: Path, target: str, *calls: int) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        numbers = ",".join(map(str, calls))
        self.before = f"{GATE}\ninstall({f'{target}|{numbers}|{folder}'!r})\n"

    def reached(self, call: int, process: Process) -> int:
        """Wait for a call; the id of the thread that makes it."""
        wait_until((self.folder / str(call)).exists, f"call {call} of the gate", process)
        return int((self.folder / str(call)).read_text())

    def open(self, call: int) -> None:
        (self.folder / f"{call}.go").touch()


@functools.cache
def _traceable() -> str:
    if shutil.which("strace") is None:
        return "strace is not installed"
    child = subprocess.Popen(["sleep", "20"])
    try:
        command = ["timeout", "5", "strace", "-p", str(child.pid), "-e", "trace=fsync"]
        tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert tracer.stderr is not None
        line = tracer.stderr.readline()
        child.kill()
        tracer.wait()
        return "" if "attached" in line else f"strace may not attach to a process here ({line.strip()})"
    finally:
        child.kill()
        child.wait()


def needs_strace() -> None:
    if reason := _traceable():
        pytest.skip(reason)


@contextmanager
def strace(thread: int, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """strace attached to one thread, and to no other; detached at the end.

    Counts of `when=` begin here, so with a gate they are those of one save.
    """
    tracer = subprocess.Popen(["strace", "-q", "-p", str(thread), *options], stderr=subprocess.DEVNULL)
    status = Path(f"/proc/{thread}/status")
    try:
        wait_until(lambda: "TracerPid:\t0\n" not in status.read_text(), "strace is attached")
        yield tracer
    finally:
        if tracer.poll() is None:
            tracer.send_signal(signal.SIGINT)  # detaches
        tracer.wait(30)


class Space:
    """A mount namespace with file systems of its own, held open by a sleeping process.

        with Space(f"mount -t tmpfs -o size=4m tmpfs {folder}") as space:
            zygote.start("train", f"run.dir={folder}/run", before=space.before)
            space.path(folder / "run")        # the same folder, seen from outside

    Everything ends with the holder: there is nothing to unmount.
    """

    def __init__(self, *commands: str) -> None:
        if os.geteuid() != 0 or shutil.which("unshare") is None:
            pytest.skip("mounting needs root and util-linux")
        script = " && ".join(["mount --make-rprivate /", *commands, "echo ready", "exec sleep 1000"])
        self.holder = subprocess.Popen(
            ["unshare", "-m", "sh", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self.holder.stdout is not None and self.holder.stderr is not None
        if self.holder.stdout.readline() != "ready\n":
            self.holder.wait()
            pytest.skip(f"no mounts in a namespace here: {self.holder.stderr.read().strip()}")
        self.before = (
            "import ctypes, os\n"
            f"ns = os.open('/proc/{self.holder.pid}/ns/mnt', os.O_RDONLY)\n"
            "libc = ctypes.CDLL(None, use_errno=True)\n"
            "assert libc.setns(ns, 0x20000) == 0, os.strerror(ctypes.get_errno())\n"
            "os.close(ns)\n"
        )

    def path(self, path: Path) -> Path:
        return Path(f"/proc/{self.holder.pid}/root") / str(path).lstrip("/")

    def __enter__(self) -> "Space":
        return self

    def __exit__(self, *exc: object) -> None:
        self.holder.kill()
        self.holder.wait()


def fill(path: Path, leave_bytes: int = 0) -> Path:
    """Take all the room of a file system but so much; returns the file that holds it."""
    filler = path / "filler"
    with open(filler, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 16))
        except OSError:
            pass
        size = file.tell()
        file.truncate(max(0, size - leave_bytes))
    return filler


def whole_steps(run: Path) -> list[int]:
    """The steps under their names; every one of them has to be whole, whatever happened before."""
    folder = run / "checkpoints"
    steps = Checkpointer.steps(folder)
    for step in steps:
        verify(folder / f"step-{step:08d}", "checkpoint")
    return steps


def leftovers(run: Path) -> list[str]:
    return sorted(str(path.relative_to(run)) for path in run.rglob(".tmp-*"))


def one_line(text: str) -> str:
    """What a refused command said on the last line; there must be no traceback."""
    assert "Traceback" not in text, text
    return text.strip().splitlines()[-1]
