"""The corpus: documents of one or several sources in a fixed order, split into train and held-out.

A document belongs to the held-out split when the hash of its text falls below the held-out share. The
split is therefore a property of the text: it does not depend on seed, order or source, training never
sees a held-out document, and copies of one text land on the same side.

Of several sources the next document comes from the one whose tokens so far, divided by its weight, are
fewest. There is no random choice to restore, and the shares are right to within one document. A source
that ends drops out; the others keep their shares among themselves.
"""

import dataclasses
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import xxhash

from sae_train.errors import InputError
from sae_train.harvest.retries import Retry
from sae_train.harvest.text_files import TextSpec
from sae_train.harvest.texts import TextSource, clean
from sae_train.harvest.web import TIMEOUT_S

log = logging.getLogger("sae_train.harvest")

CHARS_PER_TOKEN = 4
"""Only an estimate for documents handed out and not yet reported by `took`; English BPE gives 4 to 5."""
REPEATS_SAMPLE = 10_000
"""Documents, from the first on, whose hashes are kept to find exact copies: about a megabyte."""
REPEATS_WARNED = 0.1
"""Share of copies among them that is worth a warning."""
REPLACED_WARNED = 1e-3
"""Share of characters that are U+FFFD that is worth a warning: Latin-1 read as UTF-8 has many more."""
REPLACED_LEAST = 20
"""Fewer are no evidence."""
_SOURCE_KEYS = ("name", "subset", "split", "revision", "text_column", "weight")


@dataclass
class CorpusConfig:
    """Which text is read, how it is cut into documents and windows, and what is held out."""

    name: str | None = None
    """Hub dataset id, or a file, folder, glob or URL of .txt, .jsonl, .json, .parquet (packed: .gz, .zst)."""
    subset: str | None = None
    """Configuration of a hub dataset."""
    split: str = "train"
    """Split of a hub dataset."""
    revision: str | None = None
    """Branch, tag or commit of a hub dataset; the commit it stands for is recorded."""
    text_column: str = "text"
    """Column or JSON field that holds the text."""
    documents: str = "file"
    """How a .txt is cut into documents: file, line or paragraph (separated by an empty line)."""
    sources: list[Any] = field(default_factory=list)
    """Several corpora: a list of {name, subset, split, revision, text_column, weight}, weights in tokens."""
    max_documents: int | None = None
    """Documents read per pass, of either split; null reads all."""
    holdout: float = 0.02
    """Share of documents kept from training, chosen by a hash of the text."""
    context_length: int = 256
    """Tokens per window."""
    bos: str = "auto"
    """Where BOS goes: document, window or none; auto is document if the tokenizer adds one, else none."""
    shuffle_windows: int = 4096
    """Windows permuted together before they are harvested; 1 keeps reading order."""
    epochs: int = 1
    """Passes of training over the corpus; the held-out split is never repeated."""
    allow_short: bool = False
    """Whether a run may end early when the corpus holds fewer tokens than it wants."""
    seed: int = 0
    """Orders files and windows."""
    attempts: int = 5
    """Times a read that fails for an outside reason (network, server, disc) is tried before the run is saved
    and stops with exit code 75."""
    retry_wait_s: float = 1.0
    """Seconds before the second attempt; each later wait is twice as long, at most 30, plus a random part."""
    timeout_s: float = TIMEOUT_S
    """Seconds that the server of a URL may be silent before an attempt counts as failed."""

    def __post_init__(self) -> None:
        for key, choices in (
            ("documents", ("file", "line", "paragraph")),
            ("bos", ("auto", "document", "window", "none")),
        ):
            if getattr(self, key) not in choices:
                raise InputError(f"corpus.{key}", getattr(self, key), f"one of {', '.join(choices)}")
        for key in ("context_length", "shuffle_windows", "epochs", "max_documents", "attempts"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise InputError(f"corpus.{key}", value, "a number of at least 1")
        for key in ("retry_wait_s", "timeout_s"):
            if not 0 < getattr(self, key) < float("inf"):
                raise InputError(f"corpus.{key}", getattr(self, key), "a number of seconds above 0")
        if not 0 <= self.holdout < 1:
            raise InputError("corpus.holdout", self.holdout, "a share from 0 up to, not including, 1")
        if self.name and self.sources:
            raise InputError("corpus.sources", self.sources, "either corpus.name or corpus.sources, not both")

    def specs(self) -> list[TextSpec]:
        """The sources to read.

        Raises:
            InputError: none is named; an entry of `sources` lacks a name or has an unknown key or bad weight.
        """
        shared: dict[str, Any] = {
            "documents": self.documents,
            "text_column": self.text_column,
            "split": self.split,
        }
        if not self.sources:
            if not self.name:
                raise InputError(
                    "corpus.name", self.name, "a hub dataset id, or a local file, folder or glob"
                )
            return [TextSpec("corpus.name", self.name, self.subset, revision=self.revision, **shared)]
        specs = []
        for index, source in enumerate(self.sources):
            key = f"corpus.sources[{index}]"
            if not isinstance(source, dict) or not source.get("name") or set(source) - set(_SOURCE_KEYS):
                raise InputError(key, source, f"a name and any of {', '.join(_SOURCE_KEYS[1:])}")
            weight = source.get("weight", 1.0)
            if not isinstance(weight, int | float) or not 0 < weight < float("inf"):
                raise InputError(f"{key}.weight", weight, "a positive number")
            specs.append(TextSpec(**({"key": f"{key}.name"} | shared | source)))
        return specs


class Document(NamedTuple):
    """One document: its text, which row of its source it is (0-based), and which source."""

    text: str
    row: int
    source: int


def is_held_out(text: str, share: float) -> bool:
    """Whether a salted xxh3 of the text, as a number in [0, 1), is below the held-out share."""
    return text_hash(text) < share * 2.0**64


def text_hash(text: str) -> int:
    return xxhash.xxh3_64_intdigest(b"sae-train held-out\0" + text.encode())


@dataclass
class _Progress:
    """Where one source stands in the current pass."""

    tokens: int = 0
    pending: list[int] = field(default_factory=list)
    """Estimated tokens of each document handed out whose size `took` has not reported yet, oldest first."""
    ended: bool = False


class Documents(Iterator[Document]):
    """Documents of one split, in order, with a cursor that is exact after any document.

    Args:
        config: which corpus.
        split: "train" or "heldout".
        retry: how often an outage is waited for before `StoppedEarly`; None: as the configuration says.

    Raises:
        InputError: a source cannot be opened or its first row holds no text; the corpus is empty; nothing is
            held out but the held-out split is asked for. When iterated: a later row holds no text; the
            split selects no document.
    """

    def __init__(self, config: CorpusConfig, split: str = "train", retry: Retry | None = None) -> None:
        assert split in ("train", "heldout"), split
        if split == "heldout" and config.holdout == 0:
            raise InputError("corpus.holdout", 0.0, "a share above 0, as held-out documents are asked for")
        self.config, self.split = config, split
        self._epochs = config.epochs if split == "train" else 1
        self.specs = config.specs()
        retry = retry or Retry(config.attempts, config.retry_wait_s)
        self._sources = [TextSource(spec, config.seed, retry, config.timeout_s) for spec in self.specs]
        if all(source.is_empty for source in self._sources):
            raise InputError(self.specs[0].key, self.specs[0].name, "a corpus with at least one document")
        self._progress = [_Progress() for _ in self._sources]
        self.epoch = 0
        self._read = 0
        self.counts = {"documents": 0, "empty_documents": 0, "replaced_characters": 0}
        # Of the documents so far, while they are looked at for copies: in training, from the very first on.
        self._hashes: set[int] | None = set() if split == "train" else None
        # While U+FFFD are looked for, likewise.
        self._characters: int | None = 0 if split == "train" else None

    def fingerprint(self) -> dict[str, str]:
        """Everything that content and order of the documents are a function of; not the number of passes."""
        keys = ("max_documents", "holdout", "seed")
        found = {f"corpus.{key}": str(getattr(self.config, key)) for key in keys}
        for index, (spec, source) in enumerate(zip(self.specs, self._sources, strict=True)):
            found[f"corpus.{index}.weight"] = str(spec.weight)
            found |= {f"corpus.{index}.{key}": value for key, value in source.fingerprint.items()}
        return found

    def __next__(self) -> Document:
        while True:
            source = self._next_source()
            if source is None:
                self._end_pass()
                continue
            text = next(self._sources[source], None)
            if text is None:
                self._progress[source].ended = True
                log.info("%s ended after %d rows", self.specs[source].name, self._sources[source].rows)
                continue
            self._read += 1
            text, replaced = clean(text)
            if not text.strip():
                self.counts["empty_documents"] += 1
                continue
            if is_held_out(text, self.config.holdout) != (self.split == "heldout"):
                continue
            self.counts["documents"] += 1
            self.counts["replaced_characters"] += replaced
            if self._characters is not None:
                self._characters += len(text)
                if replaced:
                    self._warn_of_replaced(self._characters)
            if self._hashes is not None:
                self._hashes.add(text_hash(text))
                if self.counts["documents"] == REPEATS_SAMPLE:
                    self._warn_of_repeats()
            self._progress[source].pending.append(len(text) // CHARS_PER_TOKEN + 1)
            return Document(text, self._sources[source].rows - 1, source)

    def took(self, source: int, num_tokens: int) -> None:
        """Report how many tokens the oldest unreported document of a source came to."""
        self._progress[source].pending.pop(0)
        self._progress[source].tokens += num_tokens

    def _next_source(self) -> int | None:
        limit = self.config.max_documents
        if limit is not None and self._read >= limit:
            return None
        open_ones = [index for index, progress in enumerate(self._progress) if not progress.ended]
        return min(open_ones, key=self._filled, default=None)

    def _filled(self, source: int) -> float:
        progress = self._progress[source]
        return (progress.tokens + sum(progress.pending)) / self.specs[source].weight

    def _end_pass(self) -> None:
        """Go back to the start if another pass is due, else end the iteration."""
        if self.counts["documents"] == 0:
            if self.counts["empty_documents"] == self._read:
                spec = self.specs[0]
                raise InputError(spec.key, spec.name, f"text: all {self._read} documents are empty")
            if self.split == "heldout":
                accepted = f"a share that selects at least one of the corpus's {self._read} documents"
            else:
                accepted = f"a share that leaves some text of the corpus's {self._read} documents to train on"
            if any(source.is_uncut for source in self._sources):
                accepted += "; each .txt is one, and corpus.documents=paragraph (or line) makes it many"
            raise InputError("corpus.holdout", self.config.holdout, accepted)
        self._warn_of_repeats()
        if self.epoch + 1 >= self._epochs:
            raise StopIteration
        self.epoch += 1
        self._read = 0
        for source, progress in zip(self._sources, self._progress, strict=True):
            # What is still pending was handed out in this pass and will be reported in the next.
            progress.tokens, progress.ended = 0, False
            source.seek(None, 0)

    def _warn_of_repeats(self) -> None:
        """Say so if many of the documents were copies; then stop looking."""
        if self._hashes is None:
            return
        looked_at, different = self.counts["documents"], len(self._hashes)
        self._hashes = None
        if looked_at - different > REPEATS_WARNED * looked_at:
            log.warning(
                "%d of the first %d training documents are exact copies of others: the SAE learns them by "
                "heart and its numbers look better than they are; remove copies from %s",
                looked_at - different,
                looked_at,
                ", ".join(spec.name for spec in self.specs),
            )

    def _warn_of_replaced(self, characters: int) -> None:
        """Say so if text cannot have been UTF-8; then stop looking."""
        found = self.counts["replaced_characters"]
        if found >= REPLACED_LEAST and found > REPLACED_WARNED * characters:
            self._characters = None
            log.warning(
                "%d of the first %d characters of training text are U+FFFD, which is what bytes that are not "
                "UTF-8 become: convert %s to UTF-8, or the SAE learns features of them",
                found,
                characters,
                ", ".join(spec.name for spec in self.specs),
            )

    def state_dict(self) -> dict[str, Any]:
        """JSON-able position after the last document returned."""
        return {
            "epoch": self.epoch,
            "read": self._read,
            "counts": dict(self.counts),
            "sources": [
                {"cursor": source.tell(), "rows": source.rows} | dataclasses.asdict(progress)
                for source, progress in zip(self._sources, self._progress, strict=True)
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self._read, self.counts = state["epoch"], state["read"], dict(state["counts"])
        self._hashes = self._characters = None
        assert len(state["sources"]) == len(self._sources), "compare fingerprints before loading a state"
        for index, saved in enumerate(state["sources"]):
            self._sources[index].seek(saved["cursor"], saved["rows"])
            self._progress[index] = _Progress(saved["tokens"], list(saved["pending"]), saved["ended"])
