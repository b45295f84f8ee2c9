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
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sae_train.errors import InputError, StoppedEarly

logger = logging.getLogger("sae_train.train")

LOCK = ".lock"
BEAT_S = 2.0
"""Seconds between beats."""
DEAD_AFTER_BEATS = 5
"""A record of another host whose beat stands still for so many beats belongs to a process that is gone."""
MAX_RECORD_BYTES = 4096


class Ownership:
    """This process's hold on a folder, kept alive by a thread."""

    def __init__(self, folder: Path, handle: int) -> None:
        self.folder, self._handle = folder, handle
        self._token = uuid.uuid4().hex
        self._beat = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="heartbeat", daemon=True)

    def start(self) -> None:
        self._write()
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
        if owner is not None and owner.get("token") != self._token:
            raise StoppedEarly(
                f"{self.folder} was taken over by {_who(owner)} while this process stood still"
            )

    def stop(self) -> None:
        """Stop beating and leave an empty record: the next owner need not ask."""
        self._done.set()
        self._thread.join()
        try:
            owner = _read(self._handle)
            if owner is None or owner.get("token") == self._token:
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
        owner = _read(self._handle) if self._beat else None
        if owner is not None and owner.get("token") != self._token:
            return  # taken over: `check` says so before the next save
        self._beat += 1
        record = {"host": socket.gethostname(), "pid": os.getpid(), "token": self._token, "beat": self._beat}
        data = json.dumps(record).encode()
        # In place and in one write: the lock is on this very file, so it cannot be replaced by a rename.
        os.pwrite(self._handle, data.ljust(256), 0)


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
        _take(key, folder, handle)
        ownership = Ownership(folder, handle)
        try:
            ownership.start()
        except OSError as error:
            raise InputError(key, str(folder), f"a folder that can be written ({error.strerror})") from None
        try:
            yield ownership
        finally:
            ownership.stop()
    finally:
        os.close(handle)


def last_beat_s(folder: Path) -> float | None:
    """Seconds since the owner of a folder last gave a sign of life; None when nobody owns it."""
    path = folder / LOCK
    try:
        if not path.read_bytes()[:MAX_RECORD_BYTES].strip():
            return None
        return max(0.0, time.time() - path.stat().st_mtime)
    except OSError:
        return None


def _take(key: str, folder: Path, handle: int) -> None:
    """Get the kernel's lock, and see that no other host's process is at work in spite of it."""
    locked = True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise _in_use(key, folder, _read(handle)) from None
        logger.warning("%s: its file system has no locks (%s); heartbeats alone guard it", folder, error)
        locked = False
    owner = _read(handle)
    if owner is None:
        return
    if not locked or owner.get("host") != socket.gethostname():
        logger.warning("%s: watching whether %s is alive", folder, _who(owner))
        for _ in range(DEAD_AFTER_BEATS):
            time.sleep(BEAT_S)
            if _read(handle) != owner:
                raise _in_use(key, folder, owner)
    logger.warning("%s: taken over from %s, which is gone", folder, _who(owner))


def _in_use(key: str, folder: Path, owner: dict[str, Any] | None) -> InputError:
    return InputError(key, str(folder), f"a folder not in use; {_who(owner)} writes to it")


def _who(owner: dict[str, Any] | None) -> str:
    if owner is None:
        return "another process"
    return f"process {owner.get('pid')} on {owner.get('host')}"


def _read(handle: int) -> dict[str, Any] | None:
    """The owner's record; None where there is none or half of one."""
    try:
        owner = json.loads(os.pread(handle, MAX_RECORD_BYTES, 0))
    except ValueError:
        return None
    return owner if isinstance(owner, dict) else None
