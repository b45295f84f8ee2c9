"""Which commit of this project is running, if it runs out of a git checkout."""

import re
from pathlib import Path

COMMIT = re.compile(r"[0-9a-f]{40}")


def project_commit(root: Path | None = None) -> str | None:
    """The commit that is checked out where this package lies, or None if it is installed otherwise.

    git itself is not asked: it may be missing, and would refuse a checkout of another user's.
    """
    git = (root or Path(__file__).resolve().parents[2]) / ".git"
    try:
        if git.is_file():  # a worktree: "gitdir: PATH"
            git = git.parent / git.read_text().partition("gitdir: ")[2].strip()
        head = (git / "HEAD").read_text().strip()
        if COMMIT.fullmatch(head):
            return head
        name = head.removeprefix("ref: ")
        common = git / "commondir"
        shared = git / common.read_text().strip() if common.is_file() else git
        for place in (git, shared):
            if (place / name).is_file():
                found = (place / name).read_text().strip()
                return found if COMMIT.fullmatch(found) else None
        for line in (shared / "packed-refs").read_text().splitlines():
            if line.endswith(f" {name}") and COMMIT.fullmatch(line[:40]):
                return line[:40]
    except (OSError, UnicodeDecodeError):
        return None  # no checkout
    return None
