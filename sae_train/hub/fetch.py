"""SAEs from the Hugging Face hub: `hf://user/repo/folder@revision` becomes a local folder of plain files.

    HF_HOME/sae-train/USER--REPO/COMMIT/FOLDER-HASH/   the files and MANIFEST.json, whole or not there
    HF_HOME/sae-train/USER--REPO/refs/HASH             the commit that a branch or tag was last

A repository is a stranger's. Only files whose names some SAE format uses are taken, straight from the named
folder, within limits of size that are checked before the first byte; a revision becomes a commit before
anything is read, so that all files are of one state; what arrives is compared with the digests that the hub
lists, and lies in regular files. What is in them is for `load_sae` to distrust.
"""

import hashlib
import logging
import os
import re
import shutil
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from filelock import FileLock

from sae_train.errors import InputError, StoppedEarly
from sae_train.files import CorruptFolder, committed_folder, remove_folder, verify, write_bytes
from sae_train.hub.outcome import asking
from sae_train.redact import printable

logger = logging.getLogger(__name__)

SCHEME = "hf://"
SPELLING = "hf://USER/REPO, hf://USER/REPO/FOLDER or either with @REVISION at its end"
WEIGHT_FILES = frozenset(
    {"sae.safetensors", "sae_weights.safetensors", "params.safetensors", "params.npz", "ae.pt"}
    | {"features.safetensors", "sparsity.safetensors"}
)
TEXT_FILES = frozenset({"config.json", "cfg.json", "runner_cfg.json", "metrics.json", "eval.json"})
MAX_TEXT_BYTES = 4 << 20
MAX_WEIGHT_BYTES = 64 << 30
MAX_ENTRIES = 10_000
"""Entries of a folder that are looked at."""
COMMIT = re.compile(r"[0-9a-f]{40}")
KIND = "hub-folder"


@dataclass(frozen=True)
class HubFolder:
    """A folder of a repository, as a user spells it.

    Attributes:
        repo: USER/REPO.
        folder: path inside it, "" for its root.
        revision: branch, tag or commit.
    """

    repo: str
    folder: str
    revision: str

    @classmethod
    def parse(cls, url: str) -> "HubFolder":
        """Raises InputError for anything but SPELLING."""
        path, _, revision = url.removeprefix(SCHEME).partition("@")
        parts = path.split("/")
        names = all(re.fullmatch(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?", p) for p in parts[:2])
        strange = any(part in ("", ".", "..") or not part.isprintable() or "\\" in part for part in parts)
        right = url.startswith(SCHEME) and len(parts) >= 2 and names and not strange
        right = (
            right and not any(pair in part for part in parts[:2] for pair in ("--", "..")) and len(url) < 1000
        )
        if "@" in url:
            right = right and bool(re.fullmatch(r"[A-Za-z0-9._/-]+", revision)) and ".." not in revision
        if not right:
            raise InputError("path", url[:200], SPELLING)
        return cls("/".join(parts[:2]), "/".join(parts[2:]), revision or "main")


def is_url(path: object) -> bool:
    """Whether this is for `fetch`."""
    return isinstance(path, str) and path.startswith(SCHEME)


def fetch(url: str) -> Path:
    """Download the SAE files of a folder on the hub, once; returns a local folder of regular files.

    A branch or tag is looked up each time; without a connection the commit that it was last time is taken,
    and said so. A folder of a commit that is there already costs no request.

    Args:
        url: `hf://user/repo/folder@revision`; folder and revision may be left out (the root, main).

    Raises:
        InputError: another spelling; no such repository, revision or folder, or not for this user; no file
            of an SAE in it; a file that is too large; offline, and not here yet.
        StoppedEarly: the hub cannot be reached or sends damaged files, and nothing is here yet.
    """
    from huggingface_hub.constants import HF_HOME

    place = HubFolder.parse(url)
    cache = Path(HF_HOME).expanduser() / "sae-train" / place.repo.replace("/", "--")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        commit = _commit(url, place, cache)
        target = cache / commit / _folder_name(place.folder)
        target.parent.mkdir(exist_ok=True)
        with FileLock(cache / ".lock"):
            if not _is_whole(target):
                _download(url, place, commit, target)
    except OSError as error:
        if error.errno is None:
            raise
        raise InputError("HF_HOME", HF_HOME, f"a folder that can be written to ({error.strerror})") from None
    return target


def _folder_name(folder: str) -> str:
    readable = re.sub(r"[^A-Za-z0-9._-]", "-", folder)[:80] or "root"
    return f"{readable}-{hashlib.sha256(folder.encode()).hexdigest()[:8]}"


def _is_whole(target: Path) -> bool:
    if not os.path.lexists(target):
        return False
    try:
        verify(target, KIND)
    except CorruptFolder as error:
        logger.warning("%s; fetching it again", error)
        remove_folder(target)
        return False
    return True


def _commit(url: str, place: HubFolder, cache: Path) -> str:
    """The commit that the revision is now, or was when the hub could last be asked."""
    from huggingface_hub import HfApi
    from huggingface_hub.constants import is_offline_mode
    from huggingface_hub.errors import OfflineModeIsEnabled

    if COMMIT.fullmatch(place.revision):
        return place.revision
    ref = cache / "refs" / hashlib.sha256(place.revision.encode()).hexdigest()[:32]
    known = ref.read_text().strip() if ref.is_file() else ""
    known = known if COMMIT.fullmatch(known) else ""
    if is_offline_mode():
        if not known:
            raise InputError("path", url, "a repository that was fetched before, as HF_HUB_OFFLINE is set")
        return known
    try:
        info = asking(
            "path", url, "asking the hub", lambda: HfApi().model_info(place.repo, revision=place.revision)
        )
    except OfflineModeIsEnabled:
        raise InputError("path", url, "HF_HUB_OFFLINE not to be set") from None
    except StoppedEarly as error:
        if not known:
            raise
        logger.warning("%s; taking commit %s of %s, fetched before", error, known, place.repo)
        return known
    commit = str(info.sha)
    if not COMMIT.fullmatch(commit):
        raise InputError("path", url, f"a hub that answers with a commit, not {commit[:80]!r}")
    if commit != known:
        ref.parent.mkdir(exist_ok=True)
        write_bytes(ref, commit.encode())
    return commit


@dataclass(frozen=True)
class Listed:
    """A file as the hub lists it.

    Attributes:
        path: inside the repository.
        size_bytes: its length.
        sha256: of its bytes, for a large file.
        blob: git's SHA-1 of it, for a small one.
    """

    path: str
    size_bytes: int
    sha256: str | None
    blob: str

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    def matches(self, file: Path) -> bool:
        """Whether a local file has these bytes."""
        if file.stat().st_size != self.size_bytes:
            return False
        if self.sha256 is not None:
            with open(file, "rb") as handle:
                return hashlib.file_digest(handle, "sha256").hexdigest() == self.sha256
        data = file.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() == self.blob


def _listing(url: str, place: HubFolder, commit: str) -> list[Listed]:
    """The files to take.

    Raises:
        InputError: there are none, or one is too large.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    def look() -> list[Any]:
        tree = HfApi().list_repo_tree(place.repo, place.folder or None, revision=commit, recursive=False)
        return list(islice(tree, MAX_ENTRIES))

    entries = asking("path", url, "listing the folder", look)
    prefix = f"{place.folder}/" if place.folder else ""
    found = [
        Listed(entry.path, entry.size, entry.lfs.sha256 if entry.lfs is not None else None, entry.blob_id)
        for entry in entries
        if isinstance(entry, RepoFile) and entry.path in {prefix + name for name in WEIGHT_FILES | TEXT_FILES}
    ]
    if not any(file.name in WEIGHT_FILES for file in found):
        folders = [printable(e.path)[:80] for e in entries if not isinstance(e, RepoFile)]
        inside = f" (it holds the folders {', '.join(folders[:8])})" if folders else ""
        raise InputError("path", url, f"a folder with the weights of an SAE{inside}")
    for file in found:
        limit = MAX_WEIGHT_BYTES if file.name in WEIGHT_FILES else MAX_TEXT_BYTES
        if type(file.size_bytes) is not int or not 0 <= file.size_bytes <= limit:
            raise InputError("path", url, f"at most {limit} bytes of {file.name}, not {file.size_bytes}")
    return found


def _download(url: str, place: HubFolder, commit: str, target: Path) -> None:
    from huggingface_hub.constants import is_offline_mode

    if is_offline_mode():
        raise InputError("path", url, "a folder that was fetched before, as HF_HUB_OFFLINE is set")
    files = _listing(url, place, commit)
    needed, free = sum(file.size_bytes for file in files), shutil.disk_usage(target.parent).free
    if needed > free:
        raise InputError("path", url, f"a folder that fits in {free} free bytes of disk, not {needed}")
    # Files that arrived whole before an interruption are not fetched again; the digests judge them, too.
    staging = target.parent / f".download-{target.name}"
    for file in files:
        _download_one(url, place, commit, file, staging)
    with committed_folder(target, KIND, {"url": url, "commit": commit}) as temp:
        for file in files:
            os.replace(staging / file.path, temp / file.name)
    shutil.rmtree(staging)


def _download_one(url: str, place: HubFolder, commit: str, file: Listed, staging: Path) -> None:
    from huggingface_hub import hf_hub_download

    def get() -> None:
        hf_hub_download(place.repo, file.path, revision=commit, local_dir=staging)

    asking("path", url, f"fetching {file.name}", get)
    got = staging / file.path
    if got.is_symlink() or not got.is_file() or not file.matches(got):
        shutil.rmtree(staging)
        raise StoppedEarly(
            f"fetching {file.name}: what arrived is not what the hub lists (size or digest); "
            "run the same command again"
        )
