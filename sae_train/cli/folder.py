"""A folder that one process at a time writes to.

Two guards, because neither is enough alone. The kernel's lock (flock) ends with the process that
holds it, however it ends, but some network file systems keep it to one host or do not know it. So the
owner also writes who it is and a beat that counts up; a second process that gets the lock, yet finds
a record of another host, watches it: a beat that moves means a live owner, one that stands still a dead
one. No clock of one host is ever compared with that of another.
"""

import errno
import fcntl
import json
import logging
import os
import socket
import stat
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from sae_train.errors import InputError, StoppedEarly

logger = logging.getLogger("sae_train.train")

LOCK = ".lock"
BEAT_S = 2.0
"""Seconds between beats."""
DEAD_AFTER_BEATS = 5
"""A record of another host whose beat stands still for so many beats belongs to a process that is gone."""
RECORD_BYTES = 256
MAX_RECORD_BYTES = 4096
SEEN_WITHIN_S = 60.0
"""Others see a file that one host made within so long: network file systems remember what was not there."""
TORN_S = 0.05
"""Much longer than a record takes to be written."""


class Ownership:
    """This process's hold on a folder, kept alive by a thread."""

    def __init__(self, folder: Path, handle: int) -> None:
        self.folder, self._handle = folder, handle
        self.token = uuid.uuid4().hex
        """In the lock's record: whoever reads it there sees this very folder."""
        self._beat = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="heartbeat", daemon=True)

    def start(self) -> None:
        self._write()
        os.ftruncate(self._handle, RECORD_BYTES)  # nothing may follow it
        self._thread.start()

    def check(self) -> None:
        """See that the folder is still there and still ours; asked before anything is committed to it.

        Raises:
            StoppedEarly: it was moved, removed, or taken over by another process.
        """
        try:
            same = os.path.samestat(os.stat(self.folder / LOCK), os.fstat(self._handle))
        except OSError as error:
            raise StoppedEarly(f"{self.folder} is gone ({error.strerror}): nothing can be saved") from None
        if not same:
            raise StoppedEarly(f"{self.folder} was replaced by another folder: nothing can be saved")
        owner = _read(self._handle)
        if owner is None:  # or half written by our own thread just now
            time.sleep(TORN_S)
            owner = _read(self._handle)
        if not self.is_ours(owner):
            raise StoppedEarly(
                f"{self.folder} was taken over by {_who(owner)} while this process stood still"
            )

    def is_ours(self, owner: dict[str, Any] | None) -> bool:
        """An empty record is not: who took over has left again since."""
        return owner is not None and owner.get("token") == self.token

    def stop(self) -> None:
        """Stop beating and leave an empty record: the next owner need not ask."""
        self._done.set()
        self._thread.join()
        try:
            if self.is_ours(_read(self._handle)):
                os.ftruncate(self._handle, 0)
        except OSError as error:
            logger.warning("%s: the lock's record could not be cleared (%s)", self.folder, error)

    def _keep(self) -> None:
        refused = False
        while not self._done.wait(BEAT_S):
            try:
                self._write()
                refused = False
            except OSError as error:
                if not refused:
                    logger.warning("%s: the heartbeat could not be written (%s)", self.folder, error)
                refused = True

    def _write(self) -> None:
        if self._beat and not self.is_ours(_read(self._handle)):
            return  # taken over: `check` says so before the next save
        self._beat += 1
        record = {"host": socket.gethostname(), "pid": os.getpid(), "token": self.token, "beat": self._beat}
        data = json.dumps(record).encode()
        # In place and in one write: the lock is on this very file, so it cannot be replaced by a rename.
        os.pwrite(self._handle, data.ljust(RECORD_BYTES), 0)
        os.close(os.dup(self._handle))  # network file systems send what was written when a descriptor closes


@contextmanager
def owned(key: str, folder: Path) -> Iterator[Ownership]:
    """Create a folder, see that it can be written, and hold it against other processes.

    Args:
        key: configuration key that named the folder, for messages.
        folder: made with its parents if it does not exist.

    Raises:
        InputError: it cannot be written, or another process holds it; the message names that process.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise InputError(key, str(folder), f"a folder that can be written ({error.strerror})") from None
    try:
        locked = _take(key, folder, handle)
        ownership = Ownership(folder, handle)
        try:
            ownership.start()
        except OSError as error:
            raise InputError(key, str(folder), f"a folder that can be written ({error.strerror})") from None
        try:
            if not locked:
                time.sleep(
                    BEAT_S
                )  # another process may have found it free just now: the last to write has it
                if not ownership.is_ours(owner := _read_anew(folder / LOCK)):
                    raise _in_use(key, folder, owner)
            yield ownership
        finally:
            ownership.stop()
    finally:
        os.close(handle)


def wait_to_see(key: str, folder: Path, token: str, within_s: float = SEEN_WITHIN_S) -> None:
    """See that a folder which another process of this run owns is the same one here.

    Args:
        key: configuration key that named the folder, for messages.
        folder: as this process calls it.
        token: the owner's.
        within_s: how long it may take to be seen.

    Raises:
        InputError: it is another folder, or none.
    """
    deadline = time.monotonic() + within_s
    while True:
        try:
            if (_read_anew(folder / LOCK) or {}).get("token") == token:
                return
        except FileNotFoundError:
            pass
        if time.monotonic() > deadline:
            here = f"{socket.gethostname()}:{folder.absolute()}"
            raise InputError(key, str(folder), f"a folder that all processes see; {here} is not the lead's")
        time.sleep(TORN_S)


def last_beat_s(folder: Path) -> float | None:
    """Seconds since the owner of a folder last gave a sign of life; None when nobody owns it."""
    path = folder / LOCK
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):  # in a folder from somebody else it may be anything
            return None
        with open(path, "rb") as file:
            if not file.read(MAX_RECORD_BYTES).strip():
                return None
        return max(0.0, time.time() - status.st_mtime)
    except OSError:
        return None


def _take(key: str, folder: Path, handle: int) -> bool:
    """Get the kernel's lock, and see that no other host's process is at work in spite of it; False where the
    file system has no locks."""
    locked = True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise _in_use(key, folder, _holder(handle)) from None
        logger.warning("%s: its file system has no locks (%s); heartbeats alone guard it", folder, error)
        locked = False
    owner = _read(handle)
    if owner is None:
        return locked
    if not locked or owner.get("host") != socket.gethostname():
        logger.warning("%s: watching whether %s is alive", folder, _who(owner))
        for _ in range(DEAD_AFTER_BEATS):
            time.sleep(BEAT_S)
            if _read_anew(folder / LOCK) != owner:
                raise _in_use(key, folder, owner)
    logger.warning("%s: taken over from %s, which is gone", folder, _who(owner))
    return locked


def _holder(handle: int) -> dict[str, Any] | None:
    """The record of who holds the lock. Just after it was taken, it is still that of the one before."""
    deadline = time.monotonic() + BEAT_S
    while (owner := _read(handle)) is None or _is_gone(owner):
        if time.monotonic() > deadline:
            break
        time.sleep(TORN_S)
    return owner


def _is_gone(owner: dict[str, Any]) -> bool:
    """Whether a record is that of a process of this host that has ended."""
    pid = owner.get("pid")
    return owner.get("host") == socket.gethostname() and not (isinstance(pid, int) and psutil.pid_exists(pid))


def _in_use(key: str, folder: Path, owner: dict[str, Any] | None) -> InputError:
    return InputError(key, str(folder), f"a folder not in use; {_who(owner)} writes to it")


def _who(owner: dict[str, Any] | None) -> str:
    if owner is None:
        return "another process"
    return f"process {owner.get('pid')} on {owner.get('host')}"


def _read_anew(path: Path) -> dict[str, Any] | None:
    """As another host wrote it: network file systems look for news when a file is opened."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        return _read(handle)
    finally:
        os.close(handle)


def _read(handle: int) -> dict[str, Any] | None:
    """The owner's record; None where there is none or half of one."""
    try:
        owner = json.loads(os.pread(handle, MAX_RECORD_BYTES, 0))
    except ValueError:
        return None
    return owner if isinstance(owner, dict) else None
