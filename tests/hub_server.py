"""A small hub for the tests: what the installed `huggingface_hub` client asks for, over real sockets.

    with HubServer() as hub:
        hub.connect(monkeypatch, tmp_path)      # this process's client; hub.environment(home) for another's
        hub.failures += [("POST", "/commit/", 500, 2)]    # the next two such requests are answered with 500
        hub.repos["me/saes"].files()            # {path: bytes} of main, as committed

It speaks: who am I, create a repository, validate a card, what kind of upload each file is (preupload),
git-LFS `basic` batch, upload and verification, commits as NDJSON with a parent, repository information,
trees, and files by revision with their ETag and commit. A private repository answers 404 without the token,
as the hub does.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from loopback import Loopback

TOKEN = "hf_" + "t" * 34
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".npz", ".png")
FIRST = "0" * 40


def git_blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def is_large(path: str, size_bytes: int) -> bool:
    """Whether the hub keeps a file as a large one."""
    return path.endswith(LFS_SUFFIXES) or size_bytes > 10_000_000


@dataclass
class Repo:
    """A repository: its commits by name, the newest last, each a whole tree; and tags, name -> commit."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {FIRST: {".gitattributes": b""}})
    messages: list[str] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)

    def head(self) -> str:
        return list(self.commits)[-1]

    def commit_of(self, revision: str) -> str:
        return self.head() if revision == "main" else self.tags.get(revision, revision)

    def files(self, revision: str = "main") -> dict[str, bytes] | None:
        return self.commits.get(self.commit_of(revision))

    def add(self, files: dict[str, bytes | None], message: str = "by hand") -> str:
        """A commit on top of main; None deletes."""
        tree = {**self.commits[self.head()], **files}
        kept = {path: data for path, data in sorted(tree.items()) if data is not None}
        text = repr((self.head(), message, [(path, git_blob(data)) for path, data in kept.items()]))
        commit = hashlib.sha1(text.encode()).hexdigest()
        self.commits[commit] = kept
        self.messages.append(message)
        return commit


class HubServer(Loopback):
    """Serves on 127.0.0.1 from the start of the `with` block to its end.

    Attributes:
        repos: USER/NAME -> repository.
        large: sha256 -> bytes of every large file that arrived whole.
        announced: sha256 of every large file that a client said it would send.
        failures: [method, part of the path, status, how often]: answered so, oldest first. With COMMITTED as
            the method and USER/NAME as the path, a commit is made and then answered so.
        served: path -> bytes that are sent instead of the file's, under its name and size.
        others: commits that somebody else makes just before the next ones arrive.
        hold: part of a path whose uploads are read half and then never answered; `held` is set when one is.
        requests: (method, path, bytes of body), in order.
    """

    def __init__(self) -> None:
        super().__init__(_Handler)
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.announced: set[str] = set()
        self.failures: list[tuple[str, str, int, int]] = []
        self.served: dict[str, bytes] = {}
        self.hold: str | None = None
        self.others: list[dict[str, bytes | None]] = []
        self.held = threading.Event()
        self.requests: list[tuple[str, str, int]] = []
        self.lock = threading.RLock()

    @property
    def url(self) -> str:
        return self.address

    def environment(self, home: Path, token: str | None = TOKEN) -> dict[str, str]:
        """Variables that make a client talk to this hub, keep its files in `home`, and use no xet."""
        known = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        known |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        return known | ({"HF_TOKEN": token} if token is not None else {})

    def connect(self, monkeypatch: Any, home: Path, token: str | None = TOKEN) -> None:
        """The same for this process, whose client has read its variables already."""
        from huggingface_hub import constants

        for name, value in {
            "ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
        }.items():
            monkeypatch.setattr(constants, name, value)
        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        for name in ("HF_TOKEN_PATH", "HF_STORED_TOKENS_PATH"):
            monkeypatch.setattr(constants, name, str(home / name.lower()))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        if token is None:
            monkeypatch.delenv("HF_TOKEN", raising=False)
        else:
            monkeypatch.setenv("HF_TOKEN", token)

    def count(self, method: str, part: str) -> int:
        """How many requests of a method had this in their path."""
        with self.lock:
            return sum(m == method and part in path for m, path, _ in self.requests)

    def failure(self, method: str, path: str) -> int | None:
        with self.lock:
            for i, (m, part, code, times) in enumerate(self.failures):
                if m == method and part in path:
                    self.failures[i : i + 1] = [(m, part, code, times - 1)] if times > 1 else []
                    return code
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every small answer waits 40 ms
    owner: HubServer

    def log_message(self, *args: object) -> None:
        pass

    def answer(
        self, code: int, value: Any = None, headers: dict[str, str] | None = None, body: bytes | None = None
    ) -> None:
        data = body if body is not None else json.dumps({} if value is None else value).encode()
        self.send_response(code)
        kind = "application/json" if body is None else "application/octet-stream"
        lengths = {"Content-Type": kind, "Content-Length": str(len(data))}
        for name, text in (lengths | (headers or {})).items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            try:
                self.wfile.write(data)
            except OSError:  # the client has gone
                self.close_connection = True

    def refuse(self, code: int, kind: str, message: str) -> None:
        self.answer(code, {"error": message}, {"X-Error-Code": kind, "X-Error-Message": message})

    def body(self, path: str) -> bytes | None:
        """The request's body, or None if it is held back half way."""
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline().strip(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        length = int(self.headers.get("Content-Length") or 0)
        if self.command == "PUT" and self.owner.hold is not None and self.owner.hold in path:
            self.rfile.read(length // 2)
            self.owner.held.set()
            self.owner.closing.wait(120)
            self.close_connection = True
            return None
        return self.rfile.read(length)

    def do_any(self) -> None:
        url = urlsplit(self.path)
        path, query = unquote(url.path), parse_qs(url.query)
        data = self.body(path)
        if data is None:
            return
        with self.owner.lock:
            self.owner.requests.append((self.command, path, len(data)))
        if (code := self.owner.failure(self.command, path)) is not None:
            self.refuse(code, "", "planned by the test")
            return
        given = self.headers.get("Authorization")
        if given is not None and given != f"Bearer {TOKEN}":
            self.refuse(401, "", "Invalid credentials in Authorization header")
            return
        self.known = given is not None
        routes = {
            "/api/whoami-v2": lambda: self.answer(200, {"type": "user", "name": "me", "orgs": []}),
            "/api/validate-yaml": lambda: self.answer(200, {"errors": [], "warnings": []}),
            "/api/repos/create": lambda: self.create(json.loads(data)),
        }
        if path in routes:
            routes[path]()
        elif match := re.fullmatch(r"/_lfs/([0-9a-f]{64})", path):
            self.store(match[1], data)
        elif match := re.fullmatch(r"/_verify/([0-9a-f]{64})", path):
            self.answer(200 if match[1] in self.owner.large else 404)
        elif match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self.batch(json.loads(data))
        elif match := re.fullmatch(
            r"/api/models/([^/]+/[^/]+)(?:/(preupload|commit|revision|tree)/([^/]+)(?:/(.*))?)?", path
        ):
            self.api(match[1], match[2], match[3] or "main", match[4] or "", data, query)
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.resolve(match[1], match[2], match[3])
        else:
            self.refuse(404, "", f"no such address: {path}")

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = do_any

    def create(self, asked: dict[str, Any]) -> None:
        if not self.known:
            self.refuse(401, "", "Invalid credentials in Authorization header")
            return
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if asked.get("organization") not in (None, "me"):
            self.refuse(403, "", f"You don't have the rights to create a model under {asked['organization']}")
            return
        with self.owner.lock:
            there = name in self.owner.repos
            if not there:
                self.owner.repos[name] = Repo(
                    private=asked.get("visibility") == "private" or asked.get("private", False)
                )
        self.answer(409 if there else 200, {"url": f"{self.owner.url}/{name}", "name": name, "id": name})

    def store(self, oid: str, data: bytes) -> None:
        if hashlib.sha256(data).hexdigest() != oid:
            self.refuse(400, "", "the digest is another")
            return
        with self.owner.lock:
            self.owner.large[oid] = data
        self.answer(200)

    def batch(self, asked: dict[str, Any]) -> None:
        objects = []
        for item in asked["objects"]:
            actions = {
                "upload": {"href": f"{self.owner.url}/_lfs/{item['oid']}"},
                "verify": {"href": f"{self.owner.url}/_verify/{item['oid']}"},
            }
            there = item["oid"] in self.owner.large
            self.owner.announced.add(item["oid"])
            objects.append(
                {"oid": item["oid"], "size": item["size"], **({} if there else {"actions": actions})}
            )
        self.answer(200, {"transfer": "basic", "objects": objects})

    def api(
        self, name: str, verb: str | None, revision: str, rest: str, data: bytes, query: dict[str, list[str]]
    ) -> None:
        found = self.found(name, revision)
        if found is None:
            return
        repo, files = found
        if verb == "preupload":
            self.answer(200, {"files": [self.mode(item, files) for item in json.loads(data)["files"]]})
        elif verb == "commit":
            self.commit(name, repo, data)
        elif verb == "tree":
            self.tree(files, rest, query.get("recursive", ["false"])[0].lower() == "true")
        else:
            commit = repo.commit_of(revision)
            about = {"_id": name, "id": name, "modelId": name, "sha": commit, "private": repo.private}
            about |= {"gated": False, "disabled": False, "tags": [], "downloads": 0, "likes": 0}
            self.answer(200, about | {"siblings": [{"rfilename": path} for path in files]})

    def mode(self, item: dict[str, Any], files: dict[str, bytes]) -> dict[str, Any]:
        large, old = is_large(item["path"], item["size"]), files.get(item["path"])
        digest = None
        if old is not None:
            digest = hashlib.sha256(old).hexdigest() if large else git_blob(old)
        mode = "lfs" if large else "regular"
        return {"path": item["path"], "uploadMode": mode, "shouldIgnore": False, "oid": digest}

    def commit(self, name: str, repo: Repo, data: bytes) -> None:
        if not self.known:
            self.refuse(401, "", "Invalid credentials in Authorization header")
            return
        lines = [json.loads(line) for line in data.splitlines()]
        changes: dict[str, bytes | None] = {}
        head: dict[str, Any] = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                head = value
            elif line["key"] == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.owner.large:
                    self.refuse(400, "", f"{value['path']} points to a large file that is not here")
                    return
                changes[value["path"]] = self.owner.large[value["oid"]]
            elif line["key"] == "deletedFile":
                changes[value["path"]] = None
        with self.owner.lock:
            if self.owner.others:
                repo.add(self.owner.others.pop(0), "somebody else's")
            if head.get("parentCommit") not in (None, repo.head()):
                self.refuse(412, "", "the branch has moved")
                return
            commit = repo.add(changes, head["summary"])
        if (code := self.owner.failure("COMMITTED", name)) is not None:  # done, and the answer is lost
            self.refuse(code, "", "planned by the test")
            return
        self.answer(
            200,
            {"success": True, "commitUrl": f"{self.owner.url}/{name}/commit/{commit}", "commitOid": commit},
        )

    def tree(self, files: dict[str, bytes], folder: str, recursive: bool) -> None:
        prefix = f"{folder}/" if folder else ""
        inside = {path: data for path, data in files.items() if path.startswith(prefix)}
        if not inside:
            self.refuse(404, "EntryNotFound", f"{folder} does not exist")
            return
        listed: dict[str, dict[str, Any]] = {}
        for path, data in inside.items():
            first, _, deeper = path.removeprefix(prefix).partition("/")
            if deeper and not recursive:
                listed[prefix + first] = {
                    "type": "directory",
                    "path": prefix + first,
                    "oid": FIRST,
                    "size": 0,
                }
                continue
            entry = {"type": "file", "path": path, "size": len(data), "oid": git_blob(data)}
            if is_large(path, len(data)):
                digest = hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"oid": digest, "size": len(data), "pointerSize": 134}
            listed[path] = entry
        self.answer(200, list(listed.values()))

    def found(self, name: str, revision: str) -> tuple[Repo, dict[str, bytes]] | None:
        """A repository and its files at a revision; None if the request has been refused."""
        repo = self.owner.repos.get(name)
        if repo is None or (repo.private and not self.known):
            self.refuse(404, "RepoNotFound", "Repository not found")
            return None
        files = repo.files(revision)
        if files is None:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return repo, files

    def resolve(self, name: str, revision: str, path: str) -> None:
        found = self.found(name, revision)
        if found is None:
            return
        repo, files = found
        commit = repo.commit_of(revision)
        if path not in files:
            told = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}
            self.answer(404, {"error": "Entry not found"}, told)
            return
        data = files[path]
        tag = hashlib.sha256(data).hexdigest() if is_large(path, len(data)) else git_blob(data)
        headers = {"ETag": f'"{tag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        data = self.owner.served.get(path, data)
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(match[1]), int(match[2] or len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            self.answer(206, headers=headers, body=data[first : last + 1])
            return
        self.answer(200, headers=headers, body=data)
