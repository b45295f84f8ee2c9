"""Batches of whole token windows, for training that goes through the model.

Such a batch has no rows yet: what trains on it runs the model itself. Windows come in the order of the window
stream, which shuffles them in blocks; rows of one window stay together.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sae_train.batch import RowBatch
from sae_train.errors import InputError
from sae_train.harvest.filters import FilterConfig, keep_mask
from sae_train.harvest.harvester import Harvester
from sae_train.harvest.stream import Stream


class WindowSource:
    """An `ActivationSource` whose batches hold windows instead of rows.

    Args:
        stream: the windows.
        harvester: reads the rows that weights start from.
        special_ids, filters: which positions are rows.
        batch_windows, context_length: windows per batch, tokens per window.
        fingerprint: of model, tokenizer and corpus.
    """

    def __init__(
        self,
        stream: Stream,
        harvester: Harvester,
        special_ids: Tensor,
        filters: FilterConfig,
        batch_windows: int,
        context_length: int,
        fingerprint: Mapping[str, str],
    ) -> None:
        self.stream, self.harvester, self.batch_windows = stream, harvester, batch_windows
        self.special_ids, self.filters = special_ids, filters
        self.context_length = context_length
        self.dims: Mapping[str, int] = harvester.dims
        self.fingerprint: Mapping[str, str] = dict(fingerprint) | {
            "hooks": " ".join(sorted(harvester.dims)),
            "order": "windows",
        }
        self.counts: Counter[str] = Counter()
        self.seconds: dict[str, float] = {"wait": 0.0}

    def next_batch(self) -> RowBatch | None:
        """The next windows; `ids` are those of their valid tokens. None when the corpus is used up."""
        windows = self.stream.take(self.batch_windows)
        if windows is None or len(windows.tokens) < self.batch_windows:
            return None
        length = windows.tokens.shape[1]
        ids = (windows.index[:, None] * length + torch.arange(length))[windows.valid]
        return RowBatch({}, ids, windows)

    def tally(self, counts: Mapping[str, int]) -> None:
        """Count tokens seen, kept and dropped per rule. Known to those who have the rows, not here."""
        self.counts.update(counts)

    def sample(self, rows: int) -> dict[str, Tensor]:
        """Rows of the first windows, at most `rows`; the windows are trained on all the same.

        Raises:
            InputError: the corpus has no window, or no ordinary token in the first ones.
        """
        before = self.stream.state_dict()
        windows = self.stream.take(max(1, rows // self.context_length))
        self.stream.load_state_dict(before)
        if windows is None:
            raise InputError("corpus.name", "no text", "text for at least one window")
        found = self.harvester.rows(windows)
        mask, _, _ = keep_mask(found, windows.tokens, windows.valid, self.special_ids, self.filters)
        if not bool(mask.any()):
            raise InputError("corpus.name", "special tokens only", "text with ordinary tokens in it")
        return {hook: x[mask] for hook, x in found.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"windows": self.stream.state_dict(), "counts": dict(self.counts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state["windows"])
        self.counts = Counter(state["counts"])

    def close(self) -> None:
        """Nothing is held open."""
