"""Rows that the user computed elsewhere: safetensors files with a [n, d] tensor each.

Such files usually hold rows in reading order, far longer than a shard, so a shard cut from a
contiguous range would be a poor sample. Chunks of up to 256 contiguous rows are permuted over the whole
set by (seed, epoch): reads stay sequential enough for a disk and every shard is a sample of everything.
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sae_train.batch import RawRows
from sae_train.errors import InputError
from sae_train.files import CorruptFile, check_header, digest
from sae_train.registry import nearest
from sae_train.seeds import permutation
from sae_train.shards.shard import even_lanes

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
MAX_NONFINITE = 1e-3
"""Share of a shard's rows (one at least) that may be non-finite; more means that the files are broken."""


class TensorRows:
    """A `RowProducer` over safetensors files, mapped into memory, never loaded whole.

    Args:
        paths: files; their rows are concatenated in this order.
        key: the [n, d] tensor's name in each, and the hook's name.
        shard_tokens: rows per shard.
        lanes: lanes the rows of a shard are dealt to, evenly.
        seed: of the order.
        holdout: share of the chunks kept for `split="heldout"`, chosen by the order of epoch 0; at least
            one chunk unless 0.
        split: "train", or "heldout": the rows that no epoch of "train" gives.
        epochs: times the rows are gone through; the held-out rows are gone through once.
        device: where the rows go.

    Attributes:
        most_rows: rows over all epochs, those that are not finite counted.

    Raises:
        InputError: a missing file or key, not [n, d], widths or dtypes that differ, too few rows.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        key: str,
        shard_tokens: int,
        lanes: int,
        seed: int = 0,
        holdout: float = 0.02,
        split: str = "train",
        epochs: int = 1,
        device: str | torch.device = "cpu",
    ) -> None:
        assert split in {"train", "heldout"}, split
        self.key, self.shard_tokens, self.lanes, self.device = key, shard_tokens, lanes, device
        self.split, self.seed, self.epochs = split, seed, epochs if split == "train" else 1
        self.paths = [Path(path) for path in paths]
        with ExitStack() as stack:
            self._slices = [_open(path, key, stack) for path in self.paths]
            self._files = stack.pop_all()
        shapes = [tuple(s.get_shape()) for s in self._slices]
        for path, shape, part in zip(self.paths, shapes, self._slices, strict=True):
            if len(shape) != 2 or shape[1] < 1 or part.get_dtype() not in DTYPES:
                raise InputError(
                    "source.paths",
                    str(path),
                    f"{key} as [n, d] in float32, bfloat16 or float16, "
                    f"not {list(shape)} in {part.get_dtype()}",
                )
            if (shape[1], part.get_dtype()) != (shapes[0][1], self._slices[0].get_dtype()):
                raise InputError(
                    "source.paths",
                    str(path),
                    f"width {shapes[0][1]} and {self._slices[0].get_dtype()} "
                    f"as in {self.paths[0]}, not {shape[1]} and {part.get_dtype()}",
                )
        self._offsets = [sum(shape[0] for shape in shapes[:i]) for i in range(len(shapes) + 1)]
        total = self._offsets[-1]
        # Small sets get small chunks: 256 of them, so that a shard samples the set and a holdout can be 2 %.
        self.chunk_rows = max(1, min(256, total // 256, shard_tokens))
        self._chunks = [
            (file, first, min(first + self.chunk_rows, shape[0]))
            for file, shape in enumerate(shapes)
            for first in range(0, shape[0], self.chunk_rows)
        ]
        picked = max(1, round(holdout * len(self._chunks))) if holdout else 0
        order = permutation(len(self._chunks), "tensors", seed, 0).tolist() if self._chunks else []
        self._mine = sorted(order[:picked] if split == "heldout" else order[picked:])
        if not self._mine:
            raise InputError(
                "source.paths",
                [str(path) for path in self.paths],
                f"more rows: {total} leave none for split {split!r} with source.holdout={holdout}",
            )
        in_chunks = (last - first for _, first, last in (self._chunks[i] for i in self._mine))
        self.most_rows = sum(in_chunks) * self.epochs
        self.dims: Mapping[str, int] = {key: shapes[0][1]}
        self.fingerprint: Mapping[str, str] = {
            "source": f"tensors {key}, split {split}, holdout {holdout}, seed {seed}, {self.epochs} epochs, "
            f"{shard_tokens} rows per shard",
            **{f"file {i}": f"{path.name} {digest(path)}" for i, path in enumerate(self.paths)},
        }
        self.seek({"epoch": 0, "position": 0, "index": 0})

    def seek(self, cursor: dict[str, Any]) -> None:
        self._epoch, self._position, self._index = cursor["epoch"], cursor["position"], cursor["index"]
        order = permutation(len(self._mine), "tensors", self.split, self.seed, self._epoch)
        self._order = [self._mine[i] for i in order.tolist()]

    def next_rows(self) -> RawRows | None:
        """The rows of the next chunks, about `shard_tokens`; the last shard of an epoch may be shorter.

        Raises:
            InputError: more than one row in a thousand is not finite.
        """
        start = time.perf_counter()
        if self._position == len(self._order):
            if self._epoch + 1 >= self.epochs:
                return None
            self.seek({"epoch": self._epoch + 1, "position": 0, "index": self._index})
        cursor = {"epoch": self._epoch, "position": self._position, "index": self._index}
        chosen: list[tuple[int, int, int]] = []
        seen = 0
        while self._position < len(self._order):
            file, first, last = self._chunks[self._order[self._position]]
            if chosen and seen + last - first > self.shard_tokens:
                break
            chosen.append((file, first, last))
            seen += last - first
            self._position += 1
        self._index += 1
        rows = torch.cat([self._slices[file][first:last] for file, first, last in chosen])
        ids = torch.cat([torch.arange(first, last) + self._offsets[file] for file, first, last in chosen])
        rows, ids = self._finite(rows, ids, chosen)
        return RawRows(
            index=cursor["index"],
            rows={self.key: rows.to(self.device)},
            ids=ids.to(self.device),
            lane_rows=even_lanes(len(ids), self.lanes),
            counts={"seen": seen, "kept": len(ids), "nonfinite": seen - len(ids)},
            cursor=cursor,
            seconds={"read": time.perf_counter() - start},
        )

    def _finite(self, rows: Tensor, ids: Tensor, chosen: list[tuple[int, int, int]]) -> tuple[Tensor, Tensor]:
        good = torch.isfinite(rows).all(dim=1)
        bad = len(rows) - int(good.sum())
        if bad == 0:
            return rows, ids
        if bad > max(1, MAX_NONFINITE * len(rows)):
            row = int(ids[~good][0])
            file = max(i for i, offset in enumerate(self._offsets[:-1]) if offset <= row)
            raise InputError(
                "source.paths",
                str(self.paths[file]),
                f"finite rows; {bad} of {len(rows)} are not, row {row - self._offsets[file]} for one",
            )
        return rows[good], ids[good]


def _open(path: Path, key: str, stack: ExitStack) -> Any:
    """The lazily read tensor `key` of a file, kept open by the stack."""
    if not path.is_file():
        raise InputError("source.paths", str(path), "a safetensors file that exists")
    try:
        check_header(path.resolve())  # named by the user, so a link is welcome
        file = stack.enter_context(safe_open(path, framework="pt"))
    except (SafetensorError, CorruptFile) as error:
        reason = error.reason if isinstance(error, CorruptFile) else ascii(str(error))[1:-1][:200]
        raise InputError("source.paths", str(path), f"a whole safetensors file ({reason})") from error
    if key not in file.keys():  # noqa: SIM118 (not a dict: it has no __contains__)
        raise InputError("source.key", key, f"a tensor of {path}: {nearest(key, list(file.keys()))}")
    return file.get_slice(key)
