"""Token windows: documents tokenised, packed into [B, T], shuffled in blocks, with an exact cursor.

Packing. Documents follow each other without gaps and may cross window edges. With `bos=document` each
begins with BOS and nothing else separates them. Otherwise EOS follows each document, where the tokenizer
has one, and with `bos=window` every window begins with BOS. A tokenizer without BOS, EOS and padding
simply packs text. Only the last window of the stream can be padded. An encoder's [CLS] counts as BOS.

Shuffling. `shuffle_windows` consecutive windows form a block, permuted by a pure function of (seed, block
number); the held-out split keeps reading order. Row ids follow the order after shuffling.

Cursor. A block begins inside some batch of documents, so its start is the state of the documents before
that batch and the number of tokens of it that earlier blocks used. Loading a state tokenises from there
to the window again: at most one block and one batch, whatever the length of the run.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeAlias

import numpy as np
import torch
import xxhash
from torch import Tensor

from sae_train.errors import InputError
from sae_train.harvest.corpus import CorpusConfig, Document, Documents
from sae_train.seeds import permutation

log = logging.getLogger("sae_train.harvest")

BATCH_DOCUMENTS = 64
BATCH_CHARS = 2_000_000
"""A batch of documents ends at either bound, so that memory does not follow the longest document."""
ENOUGH_TOKENS = 1 << 20
"""A corpus whose first million tokens are all special is not read any further."""
PIECE_CHARS = 100_000
"""Longer texts are tokenised in pieces, which bounds memory and uses several cores."""


Array: TypeAlias = np.ndarray[Any, Any]
Block: TypeAlias = tuple[Array, Array, Array]
"""Tokens, validity and document starts, each [B, T]."""


@dataclass
class Windows:
    """B windows of T tokens; row id of a token = index * T + position."""

    tokens: Tensor
    """[B, T] int64"""
    valid: Tensor
    """[B, T] bool; False is padding, at the end of the corpus only."""
    starts: Tensor
    """[B, T] bool; True is the first token of a document (its BOS, if it has one)."""
    index: Tensor
    """[B] int64: 0, 1, 2 ... over the whole stream, in the order of training."""

    def __getitem__(self, part: slice) -> "Windows":
        return Windows(self.tokens[part], self.valid[part], self.starts[part], self.index[part])


def check_vocabulary(tokenizer: Any, vocab_size: int) -> None:
    """Raise InputError if the tokenizer can produce an id that the model has no embedding for."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocab_size:
        accepted = f"a tokenizer whose largest id, {largest}, is below the model's vocabulary of {vocab_size}"
        raise InputError("model.tokenizer", tokenizer.name_or_path, accepted)


def special_ids(tokenizer: Any) -> Tensor:
    """[S] int64, sorted: ids of BOS, EOS, padding and the like."""
    return torch.tensor(sorted(set(tokenizer.all_special_ids)), dtype=torch.int64)


def bos_rule(tokenizer: Any, bos: str) -> tuple[str, int | None]:
    """Resolve `corpus.bos` into (document | window | none, id of BOS).

    `auto` is document when the tokenizer's own encoding of a text begins with BOS (Llama, Gemma), else
    none: GPT-2 and Pythia define a BOS but were trained with it between documents, where EOS goes anyway.

    Raises:
        InputError: a BOS is asked for and the tokenizer has none.
    """
    token = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.cls_token_id
    if bos == "auto":
        bos = "document" if token is not None and tokenizer("a")["input_ids"][:1] == [token] else "none"
    if bos != "none" and token is None:
        raise InputError(
            "corpus.bos", bos, f"none or auto: the tokenizer {tokenizer.name_or_path} has no BOS"
        )
    return bos, token if bos != "none" else None


def pieces(text: str, size: int = PIECE_CHARS) -> Iterator[str]:
    """Cut a text into parts of at most `size` characters, at white space where there is any.

    White space leads a part because most tokenizers keep it at the front of the word that follows.
    """
    start = 0
    while len(text) - start > size:
        end = start + size
        for cut in range(end, start + size // 2, -1):
            if text[cut].isspace():
                end = cut
                break
        yield text[start:end]
        start = end
    yield text[start:]


def _failed(error: BaseException) -> bool:
    """Whether the tokenizer, rather than anything else, gave up on a text.

    Its Rust side raises plain `Exception` for errors and `PanicException`, a BaseException that no module
    exports, for panics.
    """
    return type(error) is Exception or type(error).__name__ == "PanicException"


class WindowStream:
    """Windows of one split of a corpus.

    Args:
        documents: the documents, at their start.
        tokenizer: of transformers, fast or slow.
        config: window length, BOS rule, shuffling and seed.
        split: which split the documents are of; None takes their word for it.

    After an error the stream has lost its place, but `state_dict` is still that of the last window taken.
    """

    def __init__(
        self, documents: Documents, tokenizer: Any, config: CorpusConfig, split: str | None = None
    ) -> None:
        assert split in (None, documents.split), f"asked for {split}, documents are {documents.split}"
        self._documents, self._tokenizer, self._config = documents, tokenizer, config
        self.bos, self._bos_id = bos_rule(tokenizer, config.bos)
        self._eos_id = None if self.bos == "document" else tokenizer.eos_token_id
        if self.bos == "window" and config.context_length < 2:
            raise InputError(
                "corpus.context_length", config.context_length, "2 or more with corpus.bos=window"
            )
        self._text_tokens = config.context_length - (self.bos == "window")
        pad = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self._pad_id = next(token for token in pad if token is not None)
        self._special = special_ids(tokenizer).numpy()
        self._block_windows = config.shuffle_windows if documents.split == "train" else 1
        self._counts = {"tokens": 0, "special_tokens": 0, "skipped_documents": 0}
        self._buffer: Array = np.empty(0, dtype=np.int32)
        self._buffer_starts: Array = np.empty(0, dtype=bool)
        self._block_start: dict[str, Any]
        self._block_data: Block | None
        self._batch_state = self._batch_start()
        self._batch_tokens = 0
        self._ended = False
        self._next_block(0)

    # -- the stream -------------------------------------------------------------------------------

    @property
    def counts(self) -> dict[str, int]:
        """What was tokenised so far, which is up to one block ahead of what was taken: documents, empty and
        skipped documents, replaced characters, tokens (of documents and their BOS or EOS)."""
        return self._documents.counts | self._counts

    @property
    def taken(self) -> int:
        """Number of windows taken so far, from the start of the stream."""
        return self._block * self._block_windows + self._offset

    def take(self, n: int) -> Windows | None:
        """The next n windows, fewer at the end of the corpus, None when there are no more.

        Raises:
            InputError, StoppedEarly: as for `Documents`; or the corpus holds nothing but special tokens.
        """
        parts: list[Block] = []
        first, missing = self.taken, n
        while missing:
            if self._block_data is None:
                self._block_data = self._make_block()
            tokens, valid, starts = (part[self._offset : self._offset + missing] for part in self._block_data)
            if len(tokens):
                parts.append((tokens, valid, starts))
                self._offset += len(tokens)
                missing -= len(tokens)
            elif len(self._block_data[0]) < self._block_windows:
                break
            else:
                self._next_block(self._block + 1)
        if not parts:
            return None
        joined = [torch.from_numpy(np.concatenate(part)) for part in zip(*parts, strict=True)]
        return Windows(joined[0].long(), joined[1], joined[2], torch.arange(first, self.taken))

    def fingerprint(self) -> dict[str, str]:
        """Everything the windows are a function of: documents, tokenizer, how they are cut and ordered."""
        tokenizer = self._tokenizer
        if tokenizer.is_fast:
            text = self._backend().to_str()
        else:
            text = json.dumps(tokenizer.get_vocab(), sort_keys=True)
        return self._documents.fingerprint() | {
            "tokenizer": xxhash.xxh3_128_hexdigest(text.encode()),
            "corpus.context_length": str(self._config.context_length),
            "corpus.bos": self.bos,
            "corpus.shuffle_windows": str(self._block_windows),
        }

    def state_dict(self) -> dict[str, Any]:
        """JSON-able position after the last window taken."""
        return {"block": self._block, "offset": self._offset, **self._block_start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._documents.load_state_dict(state["documents"])
        self._counts = dict(state["counts"])
        self._ended = False
        self._buffer, self._buffer_starts = self._buffer[:0], self._buffer_starts[:0]
        self._batch_state = self._batch_start()
        self._batch_tokens = 0
        skip = state["skip"]
        if skip:
            self._read_batch()
            self._buffer, self._buffer_starts = self._buffer[skip:], self._buffer_starts[skip:]
        self._next_block(state["block"])
        assert self._block_start["skip"] == skip
        self._offset = state["offset"]

    # -- blocks -----------------------------------------------------------------------------------

    def _batch_start(self) -> dict[str, Any]:
        return {"documents": self._documents.state_dict(), "counts": dict(self._counts)}

    def _next_block(self, block: int) -> None:
        """Stand at the start of a block. The buffer holds what the last batch has left for it."""
        if not len(self._buffer):
            self._batch_state, self._batch_tokens = self._batch_start(), 0
        self._block, self._offset = block, 0
        self._block_start = self._batch_state | {"skip": self._batch_tokens - len(self._buffer)}
        self._block_data = None

    def _make_block(self) -> Block:
        """Tokens, validity and document starts of the block's windows, permuted; the last may be short."""
        wanted, width = self._block_windows * self._text_tokens, self._text_tokens
        while len(self._buffer) < wanted and not self._ended:
            self._read_batch()
        used = min(wanted, len(self._buffer))
        num_windows = -(-used // width)
        shape = (num_windows, width)
        tokens: Array = np.full(shape, self._pad_id, dtype=np.int32)
        valid: Array = np.zeros(shape, dtype=bool)
        starts: Array = np.zeros(shape, dtype=bool)
        tokens.flat[:used] = self._buffer[:used]
        valid.flat[:used] = True
        starts.flat[:used] = self._buffer_starts[:used]
        self._buffer, self._buffer_starts = self._buffer[used:], self._buffer_starts[used:]
        self._check_text()
        if self.bos == "window":
            assert self._bos_id is not None
            tokens = np.insert(tokens, 0, self._bos_id, axis=1)
            valid, starts = np.insert(valid, 0, True, axis=1), np.insert(starts, 0, False, axis=1)
        if self._block_windows == 1:
            return tokens, valid, starts
        order = permutation(num_windows, "windows", self._config.seed, self._block).numpy()
        return tokens[order], valid[order], starts[order]

    def _check_text(self) -> None:
        """Raise InputError if the corpus, or very much of it, gave nothing but special tokens."""
        counts = self._counts
        if counts["tokens"] > counts["special_tokens"] or not (
            self._ended or counts["tokens"] >= ENOUGH_TOKENS
        ):
            return
        found = (
            f"{counts['tokens']} special tokens and {counts['skipped_documents']} documents it cannot encode"
        )
        spec = self._documents.specs[0]
        raise InputError(spec.key, spec.name, f"text that the tokenizer can make tokens of, it made {found}")

    # -- tokens -----------------------------------------------------------------------------------

    def _read_batch(self) -> None:
        """Tokenise the next batch of documents onto the end of the buffer."""
        state = self._batch_start()
        batch, chars = [], 0
        for document in islice(self._documents, BATCH_DOCUMENTS):
            batch.append(document)
            chars += len(document.text)
            if chars >= BATCH_CHARS:
                break
        if not batch:
            self._ended = True
            return
        rows, starts = [self._buffer], [self._buffer_starts]
        for document, ids in zip(batch, self._encode(batch), strict=True):
            rows.append(ids)
            starts.append(np.arange(len(ids)) == 0)
            self._documents.took(document.source, len(ids))
        self._batch_state, self._batch_tokens = state, sum(map(len, rows[1:]))
        self._counts["tokens"] += self._batch_tokens
        self._counts["special_tokens"] += sum(int(np.isin(ids, self._special).sum()) for ids in rows[1:])
        self._buffer, self._buffer_starts = np.concatenate(rows), np.concatenate(starts)

    def _encode(self, batch: list[Document]) -> list[Array]:
        """Token ids of each document with its BOS or EOS; none where the tokenizer gives up on it."""
        parts = [list(pieces(document.text)) for document in batch]
        flat = self._tokenise([piece for part in parts for piece in part])
        encoded: list[Array | None] = []
        if flat is not None:
            each = iter(flat)
            encoded = [np.concatenate([next(each) for _ in part]) for part in parts]
        else:
            for document, part in zip(batch, parts, strict=True):
                alone = self._tokenise(part)
                if alone is None:
                    self._counts["skipped_documents"] += 1
                    log.warning(
                        "skipped document %d of %s: the tokenizer failed on it",
                        document.row,
                        self._documents.specs[document.source].name,
                    )
                encoded.append(None if alone is None else np.concatenate(alone))
        bos = [self._bos_id] if self.bos == "document" else []
        eos = [self._eos_id] if self._eos_id is not None else []
        return [
            np.concatenate([bos, ids, eos]).astype(np.int32)
            if ids is not None and len(ids)
            else np.empty(0, dtype=np.int32)
            for ids in encoded
        ]

    def _backend(self) -> Any:
        """The Rust tokenizer, about twice as fast called directly; a saved one may truncate or pad."""
        backend = self._tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        return backend

    def _tokenise(self, texts: list[str]) -> list[Array] | None:
        """Ids of each text without the tokenizer's own special tokens; None if it failed on one of them."""
        try:
            if not self._tokenizer.is_fast:
                rows = self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
            else:
                rows = [one.ids for one in self._backend().encode_batch_fast(texts, add_special_tokens=False)]
        except BaseException as error:
            if not _failed(error):
                raise
            return None
        return [np.array(row, dtype=np.int32) for row in rows]
