"""One source of text: a hub dataset, or local or remote files, read in order with an exact cursor.

Everything is read through `datasets` streaming, unshuffled: its own shuffle buffer loses and repeats
rows on resume. The cursor after a document is the `state_dict` of the stream, which names the file and
the row in it; going back to it re-reads at most that file (parquet: that row group).

Rules for odd text. Bytes that are not UTF-8 and lone surrogates become U+FFFD, and every U+FFFD is
counted. A byte-order mark at the start is dropped; NULs and everything else are kept. A text that is null
is an empty one. Line ends of .txt files become "\\n". JSON lines are read as lines and parsed here, so
that one odd row does not make a whole file unreadable and a bad row can be named.

A dropped connection, or a local file that the operating system cannot read just now, is tried again from
the last document (of a URL: from the last block of bytes, see `web`), a bounded number of times, and then
raises `StoppedEarly`. Damage in a file (cut off, garbled, not what its ending says) is there at every attempt
and raises `InputError` at the first. `huggingface_hub` also retries each request 5 times (about 25 s); the 20
further silent attempts of `datasets` are switched off, so that there is one place that decides and logs.

A resumed run finds out that its text changed by the fingerprint: of a hub dataset the commit; of local files
name, size and content, beyond 64 MB in all the first and last MB of each; of a URL what the server says.
"""

import copy
import glob
import json
import re
import reprlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from sae_train.errors import InputError, StoppedEarly
from sae_train.harvest.mounts import mount
from sae_train.harvest.retries import Retry, one_line
from sae_train.harvest.text_files import (
    DAMAGE,
    TextSpec,
    check_encoding,
    digest_files,
    find_files,
    format_of,
    is_damage,
    is_url,
    unpacker,
)
from sae_train.harvest.web import TIMEOUT_S, RemoteFile, WebFile
from sae_train.seeds import permutation

if TYPE_CHECKING:
    from datasets import IterableDataset

_SURROGATE = re.compile("[\ud800-\udfff]")


def clean(text: str) -> tuple[str, int]:
    """The text by the module's rules, and how many characters in it are U+FFFD."""
    text = _SURROGATE.sub("\ufffd", text.removeprefix("\ufeff"))
    return text, text.count("\ufffd")


def transient_errors() -> tuple[type[Exception], ...]:
    """What an outage looks like: any OSError (connection, timeout, disc, HTTP status of the hub), the hub
    client's transport errors, and a compressed stream that arrives cut or garbled."""
    from huggingface_hub.errors import HTTPError

    return (OSError, HTTPError, *DAMAGE)


class TextSource:
    """Iterator over the texts of one source. Opening it reads the first row, so that what the user got
    wrong (name, subset, split, column, type of its values) is known before anything else is loaded."""

    def __init__(self, spec: TextSpec, seed: int, retry: Retry, timeout_s: float = TIMEOUT_S) -> None:
        self.spec, self._retry, self._timeout_s = spec, retry, timeout_s
        files = find_files(spec)
        self._files = files and [files[i] for i in permutation(len(files), "files", seed).tolist()]
        self._format = format_of(files[0]) if files else None
        self._remote: RemoteFile | None = None
        self.revision = spec.revision
        self._transient = transient_errors()
        self._dataset = self._retrying(self._open, "opening", rewind=False)
        if files is None:
            content = {"name": spec.name, "revision": str(self.revision)}
        elif self._remote is not None:
            content = {"name": spec.name, "file": self._remote.identity}
        else:
            content = {"files": digest_files(files)}
        self.fingerprint = content | {
            "subset": str(spec.subset),
            "split": spec.split,
            "column": spec.text_column,
            "documents": spec.documents if self._format == "text" else "row",
        }
        columns = self._dataset.column_names  # None while unknown, as for JSON
        if self._format not in ("text", "jsonl") and columns is not None:
            if spec.text_column not in columns:
                raise self._no_column(sorted(columns), spec.name)
            self._dataset = self._dataset.select_columns([spec.text_column])
        self.seek(None, 0)
        self.is_empty = next(self, None) is None
        self.seek(None, 0)

    @property
    def is_uncut(self) -> bool:
        """Whether it has text files that are a document each."""
        return self._format == "text" and self.spec.documents == "file"

    def _open(self) -> "IterableDataset":
        import datasets
        from huggingface_hub import HfApi
        from huggingface_hub.errors import (
            EntryNotFoundError,
            HFValidationError,
            OfflineModeIsEnabled,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        datasets.config.STREAMING_READ_MAX_RETRIES = datasets.config.STREAMING_OPEN_MAX_RETRIES = 1
        datasets.config.STREAMING_READ_RETRY_INTERVAL = datasets.config.STREAMING_OPEN_RETRY_INTERVAL = 0
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # else opening a local file asks the hub's address
        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it says, the errors below say
        cache = Path(datasets.config.HF_DATASETS_CACHE)
        try:
            cache.mkdir(parents=True, exist_ok=True)  # else it seems that the text cannot be read
        except (PermissionError, FileNotFoundError, FileExistsError, NotADirectoryError) as error:
            wanted = f"a folder that can be made and written to ({error.strerror}); HF_HOME names another"
            raise InputError("HF_DATASETS_CACHE", str(cache), wanted) from error
        spec, files = self.spec, self._files
        if files is not None:
            if is_url(files[0]):
                self._remote = RemoteFile.look(spec, self._timeout_s)
            openers = {file: self._opener(file) for file in files}
            if self._format != "parquet":
                check_encoding(spec, openers)
            names = [
                mount(openers[file], f".{self._format}")
                if self._remote is not None or unpacker(file) is not None
                else glob.escape(str(Path(file).absolute()))
                for file in files
            ]
            if self._format == "parquet":
                return datasets.load_dataset("parquet", data_files=names, split="train", streaming=True)
            # With errors="replace" and any name but "utf-8" the json reader decodes before it parses.
            encoding = {
                "encoding": "utf-8-sig" if self._format != "json" else "utf8",
                "encoding_errors": "replace",
            }
            if self._format == "json":
                return datasets.load_dataset(
                    "json", data_files=names, split="train", streaming=True, **encoding
                )
            unit = (
                {"file": "document"}.get(spec.documents, spec.documents) if self._format == "text" else "line"
            )
            return datasets.load_dataset(
                "text", data_files=names, split="train", streaming=True, sample_by=unit, **encoding
            )
        try:
            self.revision = HfApi().dataset_info(spec.name, revision=spec.revision).sha
            return datasets.load_dataset(
                spec.name, spec.subset, split=spec.split, revision=self.revision, streaming=True
            )
        except RevisionNotFoundError as error:
            raise InputError(
                spec.field("revision"), spec.revision, f"a branch, tag or commit of {spec.name}"
            ) from error
        except (
            OfflineModeIsEnabled,
            RepositoryNotFoundError,
            EntryNotFoundError,
            FileNotFoundError,
            HFValidationError,
            RuntimeError,
        ) as error:  # RuntimeError: a dataset that is a script
            accepted = f"a hub dataset that can be read, or a local file, folder or glob ({one_line(error)})"
            raise InputError(spec.key, spec.name, accepted) from error

    def _opener(self, file: str) -> Callable[[], IO[bytes]]:
        """Opens a file of this source as the bytes it holds unpacked."""
        unpack = unpacker(file)
        if self._remote is None:
            return partial(unpack or open, file, "rb")
        remote = partial(WebFile, self._remote, self._retry)
        return remote if unpack is None else lambda: unpack(remote(), "rb")

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        """The next text as it stands in the source.

        Raises:
            InputError: the row has no such column, or something other than text in it; the file is malformed.
            StoppedEarly: the source cannot be read any more, after retries.
        """
        row = self._retrying(self._read, "reading", rewind=True)
        # Taken while the stream is whole: after an error inside a read its state may lie between two rows.
        self._cursor = self._dataset.state_dict()
        self.rows += 1
        return self._text(row)

    def _read(self) -> dict[str, Any]:
        try:
            return next(self._rows)
        except StopIteration:  # tenacity and generators would turn it into another error
            raise _Exhausted from None

    def _text(self, row: dict[str, Any]) -> str:
        spec = self.spec
        if self._format == "text":
            return row["text"]
        if self._format == "jsonl":
            if not row["text"].strip():
                return ""
            try:
                row = json.loads(row["text"])
            except (ValueError, RecursionError) as error:  # also: a number too long, nesting too deep
                raise InputError(
                    spec.key, spec.name, f"one JSON object per line; {self._where()}: {error}"
                ) from error
            if not isinstance(row, dict):
                raise InputError(
                    spec.key, spec.name, f"one JSON object per line; {self._where()} is {_kind(row)}"
                )
        if spec.text_column not in row:
            raise self._no_column(sorted(row), self._where())
        text = row[spec.text_column]
        if text is None:
            return ""
        if not isinstance(text, str):
            raise InputError(
                spec.field("text_column"),
                spec.text_column,
                f"a column of text; {self._where()} holds {_kind(text)}",
            )
        return text

    def _where(self) -> str:
        """The row that was read last, and of several files which it stands in."""
        row = f"row {self.rows} of {self.spec.name}"
        several = self._files is not None and len(self._files) > 1
        return f"{row} (which lies in {self._file_of(self._cursor)})" if several else row

    def _no_column(self, columns: list[str], where: str) -> InputError:
        field = self.spec.field("text_column")
        return InputError(field, self.spec.text_column, f"one of the columns {', '.join(columns)} of {where}")

    def tell(self) -> dict[str, Any] | None:
        """The cursor after the last document returned, JSON-able; None at the start."""
        return self._cursor

    def seek(self, cursor: dict[str, Any] | None, rows: int) -> None:
        """Go to the position that `tell` returned when `rows` rows had been read."""
        self._cursor, self.rows = cursor, rows
        self._dataset.load_state_dict(copy.deepcopy(cursor))  # None is the start
        self._rows = iter(self._dataset)

    def _retrying(self, action: Any, doing: str, rewind: bool) -> Any:
        back = partial(self.seek, self._cursor, self.rows) if rewind else None
        try:
            return self._retry(action, f"{doing} {self.spec.name}", self._is_outage, back)
        except _Exhausted:
            raise StopIteration from None
        except InputError:
            raise
        except self._transient as error:
            if not self._is_outage(error):
                raise self._unreadable(error, reading=rewind) from error
            where = f"at row {self.rows}" if rewind else "when opening it"
            hint = "" if self._files else "; there is no file or folder of that name either"
            raise StoppedEarly(
                f"{self.spec.key}={self.spec.name!r} could not be read in {self._retry.attempts} attempts, "
                f"{where}{hint} ({one_line(error)})"
            ) from error
        except (ValueError, RecursionError) as error:  # the latter: JSON nested too deep, inside `datasets`
            raise self._unreadable(error, reading=rewind) from error

    def _is_outage(self, error: BaseException) -> bool:
        """Whether another attempt may go better."""
        return isinstance(error, self._transient) and not (self._files is not None and is_damage(error))

    def _file_of(self, state: dict[str, Any] | None) -> str:
        """The file that a state of the stream stands in, as far as it says."""
        while state and "shard_idx" not in state:
            state = state.get("examples_iterable")
        return self._files[state["shard_idx"]] if self._files and state else self.spec.name

    def _unreadable(self, error: Exception, reading: bool) -> InputError:
        """The reader's complaint about content, names of splits or subsets, as the user's error."""
        spec, message = self.spec, one_line(error)
        if "Bad split" in message or "Unknown split" in message:
            return InputError(spec.field("split"), spec.split, f"a split of {spec.name} ({message})")
        if "BuilderConfig" in message or "Config name" in message:
            return InputError(spec.field("subset"), spec.subset, f"a subset of {spec.name} ({message})")
        # Opening looks into the first file only.
        file = self._file_of(self._dataset.state_dict() if reading else {"shard_idx": 0})
        where = "" if file == spec.name else f" in {file}"
        return InputError(
            spec.key, spec.name, f"well-formed {self._format or 'text'} data{where} ({message})"
        )


class _Exhausted(Exception):
    """The stream ended."""


def _kind(value: object) -> str:
    """A value in words, for a message."""
    if value is None:
        return "null"
    names = {
        bool: "a boolean",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
        str: "text",
    }
    return f"{names.get(type(value), type(value).__name__)} ({reprlib.repr(value)[:40]})"
