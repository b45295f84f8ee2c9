"""The corpus when files or a hub are away or stall: every document once, or a stop that can go on."""

import json
import re
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from text_rows import documents_of, write_rows

from sae_train.errors import StoppedEarly
from sae_train.harvest.corpus import CorpusConfig, Documents
from sae_train.harvest.texts import Retry


def test_a_file_that_is_away_for_a_moment_is_waited_for(tmp_path, caplog):
    for i in range(3):
        write_rows(tmp_path / f"{i}.jsonl", [f"{i} {j}" for j in range(5)])
    want = [document.text for document in documents_of(tmp_path)]
    documents = Documents(CorpusConfig(name=str(tmp_path), holdout=0.0), "train", Retry(5, 0.2, 0.5))
    got = [next(documents).text for _ in range(3)]
    away = tmp_path / f"{want[-1][0]}.jsonl"  # the file that is read last
    away.rename(tmp_path / "away")
    back = threading.Timer(0.3, lambda: (tmp_path / "away").rename(away))
    back.start()
    got += [document.text for document in documents]
    back.join()
    assert got == want
    assert re.search(r"reading .* failed \(attempt 1 of 5\)", caplog.text)


def test_a_file_that_stays_away_stops_the_run_after_the_retries_and_the_state_is_that_of_the_last_document(
    tmp_path, caplog
):
    for i in range(2):
        write_rows(tmp_path / f"{i}.jsonl", [f"{i} {j}" for j in range(5)])
    documents = documents_of(tmp_path)
    last = [next(documents) for _ in range(5)][-1]
    away = tmp_path / ("1.jsonl" if last.text[0] == "0" else "0.jsonl")
    content = away.read_text()
    away.unlink()
    with pytest.raises(StoppedEarly, match="could not be read in 3 attempts, at row 5"):
        next(documents)
    assert caplog.text.count("failed (attempt") == 2  # the third and last raises
    away.write_text(content)
    again = documents_of(tmp_path)
    again.load_state_dict(documents.state_dict())
    assert len(list(again)) == 5


SHA = "a" * 40
HUB_ROWS = [{"text": f"row {i} " + "x" * 9000} for i in range(2000)]
HUB_FILE = "".join(json.dumps(row) + "\n" for row in HUB_ROWS).encode()  # 18 MB: several requests


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as streaming one dataset takes; `plan` spoils the requests for its data."""

    protocol_version = "HTTP/1.1"
    plan: list[str] = []  # noqa: RUF012  one server, one plan
    spoilt: list[str] = []  # noqa: RUF012

    def log_message(self, *args):
        pass

    def answer(self, code, body=b"", **headers):
        self.send_response(code)
        for key, value in {
            "Content-Length": len(body),
            "X-Repo-Commit": SHA,
            "ETag": '"b"',
            **headers,
        }.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.answer(200, json.dumps([self.file()]).encode(), Content_Type="application/json")

    @staticmethod
    def file():
        return {"type": "file", "path": "data.jsonl", "size": len(HUB_FILE), "oid": "b" * 40}

    def do_GET(self):
        if self.path.startswith("/plan/"):
            Hub.plan[:] = self.path.removeprefix("/plan/").split(",")
            self.answer(200)
        elif self.path.startswith("/api/datasets/me/data/tree"):
            self.answer(200, json.dumps([self.file()]).encode(), Content_Type="application/json")
        elif self.path.startswith("/api/datasets/me/data"):
            info = {"id": "me/data", "sha": SHA, "siblings": [{"rfilename": "data.jsonl"}], "tags": []}
            self.answer(200, json.dumps(info).encode(), Content_Type="application/json")
        elif self.path.endswith("data.jsonl"):
            self.data()
        else:
            kind = "RepoNotFound" if "nothing" in self.path else "EntryNotFound"
            self.answer(404, X_Error_Code=kind)

    def data(self):
        spoil = Hub.plan.pop(0) if Hub.plan and self.command == "GET" else "well"
        if spoil != "well":
            Hub.spoilt.append(spoil)
        if spoil == "always403":
            Hub.plan.insert(0, spoil)
        first, last = 0, len(HUB_FILE) - 1
        if match := re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            first, last = int(match[1]), min(int(match[2]), last)
        body = HUB_FILE[first : last + 1]
        ranges = {"Accept_Ranges": "bytes", "Content_Range": f"bytes {first}-{last}/{len(HUB_FILE)}"}
        if spoil.endswith(("403", "503")):
            self.answer(int(spoil[-3:]))
        elif spoil in ("cut", "stall"):
            self.send_response(206)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            time.sleep(2 if spoil == "stall" else 0)  # four times the client's patience
            self.close_connection = True
        else:
            self.answer(206 if match else 200, body, **ranges)


CLIENT = """
import json, logging, os, sys, urllib.request
logging.basicConfig(level="WARNING", format="LOG %(message)s", stream=sys.stdout)
import huggingface_hub.constants
from huggingface_hub.utils import http_backoff, http_stream_backoff
from sae_train.errors import InputError, StoppedEarly
from sae_train.harvest.corpus import CorpusConfig, Documents
from sae_train.harvest.texts import Retry

# Its number of attempts stays; it waits less before each.
huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT = 0.5
for request in (http_backoff, http_stream_backoff):
    getattr(request, "__wrapped__", request).__kwdefaults__["base_wait_time"] = 0.02
retry = Retry(attempts=3, initial_s=0.01, max_s=0.02)
for change in ({"name": "me/nothing"}, {"split": "other"}, {"subset": "other"}, {"name": "me / x"}):
    try:
        Documents(CorpusConfig(**({"name": "me/data"} | change)), retry=retry)
    except InputError as error:
        print("REFUSED", error)
documents = Documents(CorpusConfig(name="me/data", holdout=0.0), retry=retry)
print("REVISION", documents.fingerprint()["corpus.0.revision"])
start = documents.state_dict()
for plan in ("well,403,cut,well,503,stall", "well,always403"):
    urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/plan/" + plan).close()
    documents.load_state_dict(start)
    rows = []
    try:
        for document in documents:
            rows.append(document.text.split()[1])
    except StoppedEarly as error:
        print("STOPPED", error)
    print("ROWS", json.dumps([int(row) for row in rows]))
"""


def test_a_hub_that_cuts_refuses_and_stalls_gives_every_document_once_and_one_that_stays_away_stops_the_run(
    tmp_path,
):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    root = Path(__file__).parents[2]
    environment = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": f"{root}:{root / 'kernels'}",
    }
    done = subprocess.run(
        [sys.executable, "-c", CLIENT],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    server.shutdown()
    server.server_close()
    assert done.returncode == 0, done.stderr[-2000:]
    said = {
        key: re.findall(rf"^{key} (.*)", done.stdout, re.M)
        for key in ("REFUSED", "REVISION", "STOPPED", "ROWS")
    }
    for line, field in zip(said["REFUSED"], ("name", "split", "subset", "name"), strict=True):
        assert line.startswith(f"corpus.{field}="), line
    assert said["REVISION"] == [SHA]
    rows = [json.loads(line) for line in said["ROWS"]]
    assert rows[0] == list(range(len(HUB_ROWS)))
    assert set(Hub.spoilt) >= {"403", "cut", "503", "stall"}
    assert len(said["STOPPED"]) == 1
    assert rows[1] == list(range(len(rows[1])))
    assert "could not be read in 3 attempts" in said["STOPPED"][0]
