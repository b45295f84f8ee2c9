"""One file on a web server, read in parts by HTTP ranges, always the same file.

When it is opened, the server says how long the file is and, by ETag or Last-Modified, which version. Each
part that is read later is checked against both and against the number of bytes asked for, so a connection
that closes early or a file that is replaced meanwhile cannot pass for the end of the text. A part that fails
is asked for again by itself, and what was read before it is kept.

What nobody can tell: a file that is replaced by one of the same length on a server that sends neither ETag
nor Last-Modified, or that keeps them.
"""

import http.client
import re
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

from fsspec.spec import AbstractBufferedFile

from sae_train.errors import InputError, StoppedEarly
from sae_train.harvest.retries import Retry, one_line
from sae_train.harvest.text_files import TextSpec

TIMEOUT_S = 30.0
BUSY = {408, 425, 429}
"""Answers below 500 that mean later rather than no."""


class WebError(OSError):
    """The server did not answer, or not with what was asked for; it may next time."""


@dataclass(frozen=True)
class RemoteFile:
    """A file as the server described it on opening.

    Attributes:
        spec: the source it is read for; names it in messages.
        size_bytes: of the whole file.
        version: its ETag, else its Last-Modified, else "".
        timeout_s: how long the server may be silent.
    """

    spec: TextSpec
    size_bytes: int
    version: str
    timeout_s: float

    @property
    def identity(self) -> str:
        """What a resumed run has to find again."""
        return f"{self.size_bytes} bytes, {self.version or 'no ETag or Last-Modified'}"

    @staticmethod
    def look(spec: TextSpec, timeout_s: float) -> "RemoteFile":
        """Ask the server what it has.

        Raises:
            InputError: it has no such file, does not give it to us, or cannot give parts of files.
            WebError: it does not answer now.
        """
        try:
            status, headers, _ = _get(spec.name, 0, 1, timeout_s)
        except urllib.error.HTTPError as error:
            if error.code == 416:  # no first byte
                raise InputError(spec.key, spec.name, "a file that holds text, this one is empty") from None
            if error.code < 500 and error.code not in BUSY:
                answer = f"{error.code} {error.reason}"
                raise InputError(
                    spec.key, spec.name, f"a file that can be read; the server answers {answer}"
                ) from None
            raise WebError(f"the server answers {error.code} {error.reason}") from error
        found = re.fullmatch(r"bytes 0-0/(\d+)", headers.get("Content-Range", ""))
        if status != 206 or not found:
            accepted = "a server that gives parts of files (HTTP ranges); download it and name the local file"
            raise InputError(spec.key, spec.name, accepted)
        return RemoteFile(spec, int(found[1]), _version(headers), timeout_s)

    def read(self, start: int, stop: int) -> bytes:
        """Bytes start to stop of the file.

        Raises:
            InputError: it is no longer the file that was opened.
            WebError: they did not come, or not all.
        """
        try:
            status, headers, body = _get(self.spec.name, start, stop, self.timeout_s)
        except urllib.error.HTTPError as error:
            if error.code == 416:
                raise self._changed("shorter") from None
            raise WebError(f"the server answers {error.code} {error.reason}") from error
        if status != 206:
            raise WebError(f"the server answers {status}, not with the part asked for")
        version = _version(headers)
        if version != self.version:
            raise self._changed(version or "without ETag and Last-Modified")
        if headers.get("Content-Range") != f"bytes {start}-{stop - 1}/{self.size_bytes}":
            raise self._changed(f"another part, {headers.get('Content-Range')}")
        if len(body) != stop - start:
            raise WebError(f"the connection closed after {len(body)} of {stop - start} bytes")
        return body

    def _changed(self, now: str) -> InputError:
        was = f"the file that was opened ({self.identity}); it is now {now}"
        return InputError(self.spec.key, self.spec.name, was)


class WebFile(AbstractBufferedFile):
    """A readable, seekable file object over a `RemoteFile`; fsspec cuts it into blocks and reads ahead.

    Raises when read:
        StoppedEarly: a part did not come in any attempt.
        InputError: the file was replaced.
    """

    def __init__(self, file: RemoteFile, retry: Retry) -> None:
        super().__init__(None, file.spec.name, "rb", size=file.size_bytes)
        self.file, self.retry = file, retry

    def _fetch_range(self, start: int, end: int) -> bytes:
        spec = self.file.spec
        try:
            body: bytes = self.retry(
                lambda: self.file.read(start, end), f"reading {spec.name}", lambda e: isinstance(e, OSError)
            )
        except OSError as error:
            raise StoppedEarly(
                f"{spec.key}={spec.name!r} could not be read in {self.retry.attempts} attempts, "
                f"at byte {start} of {self.file.size_bytes} ({one_line(error)})"
            ) from error
        return body


def _get(url: str, start: int, stop: int, timeout_s: float) -> tuple[int, Any, bytes]:
    """Status, headers and at most stop - start bytes of the body of one request for a range."""
    # "identity": a server that compresses on the way would make byte positions mean something else.
    headers = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity", "User-Agent": "sae-train"}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout_s) as reply:
            return reply.status, reply.headers, reply.read(stop - start)
    except urllib.error.HTTPError as error:
        error.close()
        raise
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise WebError(one_line(reason if isinstance(reason, BaseException) else error)) from error


def _version(headers: Any) -> str:
    return headers.get("ETag") or headers.get("Last-Modified") or ""
