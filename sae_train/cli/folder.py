"""A folder that one process at a time writes to."""

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sae_train.errors import InputError

LOCK = ".lock"


@contextmanager
def owned(key: str, folder: Path) -> Iterator[None]:
    """Create a folder, see that it can be written, and hold it against other processes.

    The kernel releases the lock when the process ends, however it ends, so a killed run leaves none
    behind. On network file systems without flock the lock holds on one host only.

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
    with os.fdopen(handle, "r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = file.read(200) or "another process"
            raise InputError(key, str(folder), f"a folder not in use; {owner} writes to it") from None
        file.truncate()
        file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        file.flush()
        yield
