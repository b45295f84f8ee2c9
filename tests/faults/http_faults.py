"""A web server for the tests that fails on purpose: real sockets, real broken responses.

    with FaultServer({"x.jsonl": data}) as server:
        server.plan += ["503", "cut:100"]      # the next two GETs of data fail so, the ones after are well
        server.always = "503"                  # or every request does, until it is None again
        read(server.url("x.jsonl"))
        server.requests                        # [(method, path, fault)], in order

Faults of a request: `404` and other numbers (that status), `refuse` (the connection closes without an
answer), `cut:K` (closes after K bytes of the body), `stall` (sends half of the body, then nothing for as long
as the client waits), `long` (says more bytes than it has, sends what it has, closes), `short` (says fewer
bytes than were asked for, and sends those), `swap` (from now on the
file holds what `swapped` says).
"""

import re
import threading
import time
from http.server import BaseHTTPRequestHandler

import xxhash
from loopback import Loopback


class FaultServer(Loopback):
    """Serves `files` (name -> bytes) on 127.0.0.1, from the start of the `with` block to its end.

    Attributes:
        plan: faults of the GETs to come, oldest first; a GET takes one away.
        always: fault of every request, HEAD too, as long as it is set.
        ranges: whether parts of a file can be asked for.
        tells: which of ETag, Last-Modified and Content-Length it says.
        swapped: files that `swap` puts in place.
    """

    def __init__(self, files: dict[str, bytes], ranges: bool = True) -> None:
        super().__init__(_Handler)
        self.files, self.ranges = dict(files), ranges
        self.plan: list[str] = []
        self.always: str | None = None
        self.tells = {"ETag", "Last-Modified", "Content-Length"}
        self.modified = "Mon, 05 Jan 2026 10:00:00 GMT"
        self.swapped: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self._lock = threading.Lock()

    def url(self, name: str) -> str:
        return f"{self.address}/{name}"

    def faults(self) -> list[str]:
        """The faults that clients have met, in order."""
        with self._lock:
            return [fault for _, _, fault in self.requests if fault is not None]

    def gets(self) -> int:
        """How many GETs came."""
        with self._lock:
            return sum(method == "GET" for method, _, _ in self.requests)

    def next_fault(self, method: str, path: str) -> str | None:
        with self._lock:
            fault = self.always
            if fault is None and method == "GET" and self.plan:
                fault = self.plan.pop(0)
            fault = None if fault == "well" else fault
            self.requests.append((method, path, fault))
            if fault == "swap":
                self.files |= self.swapped
            return fault


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: FaultServer

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        server, name = self.owner, self.path.removeprefix("/")
        fault = server.next_fault(self.command, name)
        if fault == "refuse":
            self.close_connection = True
            return
        if fault is not None and fault.isdigit():
            self._status(int(fault))
            return
        if name not in server.files:
            self._status(404)
            return
        whole = server.files[name]
        first, last, partial = 0, len(whole) - 1, False
        if server.ranges and (match := re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))):
            first, last, partial = int(match[1]), min(int(match[2] or last), last), True
            if first > last:
                self._status(416)
                return
        body = whole[first : last + 1]
        if fault == "short":
            body = body[: len(body) // 2]
        self.send_response(206 if partial else 200)
        if partial:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(whole)}")
        self.send_header("Accept-Ranges", "bytes" if server.ranges else "none")
        if "ETag" in server.tells:
            self.send_header("ETag", f'"{xxhash.xxh3_64_hexdigest(whole)}"')
        if "Last-Modified" in server.tells:
            self.send_header("Last-Modified", server.modified)
        if "Content-Length" in server.tells:
            self.send_header("Content-Length", str(len(body) + (1000 if fault == "long" else 0)))
        else:  # then only the end of the connection tells the end of the body
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        if self.command == "HEAD":
            return
        try:
            self._body(body, fault)
        except OSError:  # the client has gone
            self.close_connection = True

    def _body(self, body: bytes, fault: str | None) -> None:
        if fault is not None and fault.startswith("cut:"):
            self.wfile.write(body[: int(fault.removeprefix("cut:"))])
            self.close_connection = True
        elif fault == "stall":
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            deadline = time.monotonic() + 60
            while not self.owner.closing.wait(0.05) and time.monotonic() < deadline:
                pass
            self.close_connection = True
        else:
            self.wfile.write(body)
            if fault == "long":
                self.close_connection = True

    def _status(self, code: int) -> None:
        self.send_response(code)
        self.send_header("Content-Length", "0")
        self.end_headers()
