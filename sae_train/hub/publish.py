"""Publishing: one commit with everything in it, then all of it downloaded again and compared.

    repository made (private unless asked otherwise) -> large files uploaded -> one commit -> read back

Large files lie at the hub under their digest before the commit names them, so an upload that was interrupted
at any moment leaves a repository without a trace of it, and the same command sends only what is not there
yet. A commit whose answer was lost is found again: files that are what they should be are not committed a
second time.
"""

import hashlib
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_train import stop
from sae_train.errors import InputError, StoppedEarly
from sae_train.hub.outcome import LOGIN, asking
from sae_train.hub.stage import Upload

logger = logging.getLogger(__name__)

KEPT = (".gitattributes",)
"""Files that the hub makes itself."""


@dataclass(frozen=True)
class Published:
    """Where it is now.

    Attributes:
        url: of the repository.
        commit: that holds exactly what was sent.
        changed: whether there was anything to commit.
    """

    url: str
    commit: str
    changed: bool


def check_repo(repo: str) -> None:
    """Raises InputError unless this can be the name of a repository."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    wanted = "USER/NAME, of letters, digits, dots, dashes and underscores"
    try:
        validate_repo_id(repo)
    except HFValidationError:
        raise InputError("repo", repo[:200], wanted) from None
    if repo.count("/") != 1:
        raise InputError("repo", repo[:200], wanted)


def publish(repo: str, uploads: Sequence[Upload], private: bool, replace: bool, message: str) -> Published:
    """Send files to a repository as one commit and see that they arrived.

    Args:
        repo: USER/NAME; made if it is not there.
        uploads: what it is to consist of.
        private: whom it is for, if it is made; one that is there has to be so already.
        replace: delete what is there and not among the uploads, instead of refusing.
        message: the commit's first line.

    Raises:
        InputError: no login, or one that may not; a repository of the other kind, or with other files in it.
        StoppedEarly: the hub failed or sent back other bytes; the same command continues.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.constants import is_offline_mode

    if is_offline_mode():
        raise InputError("HF_HUB_OFFLINE", "1", "0, to publish")
    if get_token() is None:
        raise InputError("HF_TOKEN", None, LOGIN)
    api = HfApi()
    url = asking(
        "repo", repo, "making the repository", lambda: api.create_repo(repo, private=private, exist_ok=True)
    )
    sent = asking("repo", repo, "uploading", lambda: _commit(api, repo, uploads, private, replace, message))
    commit, changed = sent
    for upload in uploads:
        stop.check()
        _compare(api, repo, commit, upload)
    return Published(str(url), commit, changed)


def _commit(
    api: Any, repo: str, uploads: Sequence[Upload], private: bool, replace: bool, message: str
) -> tuple[str, bool]:
    """The commit that holds the files, and whether it is new."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    info = api.model_info(repo)
    if bool(info.private) != private:
        kind = "private" if info.private else "public"
        raise InputError(
            "private", private, f"{not private}: {repo} is {kind} (its settings page changes that)"
        )
    there = {sibling.rfilename for sibling in info.siblings or []} - set(KEPT)
    foreign = sorted(there - {upload.path for upload in uploads})
    if foreign and not replace:
        few = ", ".join(foreign[:3]) + (f" and {len(foreign) - 3} more" if len(foreign) > 3 else "")
        wanted = f"a repository that is new or holds these SAEs only, not {few}; replace=true deletes them"
        raise InputError("repo", repo, wanted)
    operations: list[Any] = [CommitOperationDelete(path) for path in foreign]
    operations += [CommitOperationAdd(upload.path, str(upload.file)) for upload in uploads]
    done = api.create_commit(
        repo,
        operations,
        commit_message=message,
        # Somebody else's commit in between is not overwritten.
        parent_commit=info.sha,
    )
    return str(done.oid), done.oid != info.sha


def _compare(api: Any, repo: str, commit: str, upload: Upload) -> None:
    """Download one file of the commit and compare it with what was sent."""
    with tempfile.TemporaryDirectory(prefix="sae-train-compare-") as folder:

        def get() -> None:
            # With a cache of its own, or the client would take a copy that is on this disk already.
            where = {"local_dir": folder, "cache_dir": Path(folder) / ".cache"}
            api.hf_hub_download(repo, upload.path, revision=commit, **where)

        asking("repo", repo, f"reading {upload.path} back", get)
        if _sha256(Path(folder) / upload.path) != _sha256(upload.file):
            raise StoppedEarly(
                f"{upload.path} came back from the hub with other bytes than were sent (commit {commit}); "
                "run the same command again"
            )


def _sha256(file: Path) -> str:
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
