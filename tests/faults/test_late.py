"""Going on far into a text: what has been read is not tokenised again, and the place is exact."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from sae_train.harvest.corpus import CorpusConfig, Documents
from sae_train.harvest.windows import BATCH_DOCUMENTS, WindowStream

WORDS, LENGTH, DOCUMENTS = 100, 40, 6000
BLOCK_WINDOWS = 64


class Counting:
    """A tokenizer, and how many documents it was given in batches."""

    is_fast = False  # or the Rust tokenizer inside it would be called

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer, self.documents = tokenizer, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __len__(self) -> int:
        return len(self._tokenizer)

    def __call__(self, texts: Any, *args: Any, **kwargs: Any) -> Any:
        self.documents += len(texts) if isinstance(texts, list) else 0
        return self._tokenizer(texts, *args, **kwargs)


@pytest.mark.parametrize("share", [0.5, 0.95])
def test_a_stream_that_goes_on_late_tokenises_no_more_than_a_block_and_a_batch(
    share: float, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    draw = random.Random(0)
    with open(tmp_path / "a.jsonl", "w") as file:
        for _ in range(DOCUMENTS):
            text = " ".join(f"w{draw.randrange(WORDS)}" for _ in range(LENGTH))
            file.write(json.dumps({"text": text}) + "\n")
    config = CorpusConfig(
        name=str(tmp_path / "a.jsonl"), context_length=16, shuffle_windows=BLOCK_WINDOWS, holdout=0.0
    )

    def stream() -> tuple[WindowStream, Counting]:
        tokenizer = Counting(tiny_tokenizer)
        return WindowStream(Documents(config, "train"), tokenizer, config, "train"), tokenizer  # type: ignore[arg-type]

    whole, read = stream()
    while whole.taken * 16 < share * DOCUMENTS * LENGTH:
        assert whole.take(32) is not None
    state, before = json.loads(json.dumps(whole.state_dict())), read.documents
    wanted = whole.take(4)
    again, told = stream()
    again.load_state_dict(state)
    got = again.take(4)
    assert got is not None and wanted is not None
    assert got.tokens.equal(wanted.tokens) and got.index.equal(wanted.index)
    bound = BLOCK_WINDOWS * 16 // LENGTH + 1 + 2 * BATCH_DOCUMENTS
    assert 0 < told.documents <= bound < before / 5, (told.documents, before)
