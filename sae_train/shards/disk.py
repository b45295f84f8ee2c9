"""Shards on disk: harvest once, train any number of runs.

    FOLDER/harvest.json                   what was harvested, and whether it is complete
    FOLDER/shard-00000012/MANIFEST.json   index, cursor, hooks, dtype, rows, counts, digests
    FOLDER/shard-00000012/rows.safetensors
    FOLDER/heldout/...                    the same again, of documents that training never sees

Each shard is a committed folder (`files.py`): it is whole or absent, and every byte is checked
each time it is read, because one flipped bit in a row would otherwise train unnoticed. A shard that
fails the check ends the run by name; it is never skipped.
"""

import logging
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_train.errors import InputError
from sae_train.files import (
    MAX_HEADER_BYTES,
    CorruptFile,
    CorruptFolder,
    committed_folder,
    read_tensors,
    remove_folder,
    remove_leftovers,
    verify,
    write_json,
    write_tensors,
)
from sae_train.registry import nearest
from sae_train.seeds import permutation
from sae_train.shards.harvest import Harvest, is_table
from sae_train.shards.shard import Shard, ShardStream

logger = logging.getLogger(__name__)

KIND = "shard"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ROWS = "rows.safetensors"
IDS = "ids"


def shard_path(folder: Path, index: int) -> Path:
    return folder / f"shard-{index:08d}"


def tensor_names(hooks: Sequence[str]) -> dict[str, str]:
    """hook -> a plain tensor name; a number tells apart hooks that differ only in what is replaced."""
    return {hook: f"{i}.{re.sub(r'[^A-Za-z0-9._-]', '_', hook)}" for i, hook in enumerate(hooks)}


class ShardWriter:
    """Writes the shards of a stream to a folder, continuing what an earlier call left.

        writer = ShardWriter(folder, stream)
        writer.resume(stream)
        while (shard := stream.next_shard()) is not None:
            writer.write(shard)
        writer.finish()

    Args:
        folder: made if it does not exist; only one writer may use it at a time.
        stream: whose shards will come; its dims, lanes and fingerprint describe the harvest.
        about: what else is known of the rows: `Harvest.about`.

    Attributes:
        shards: shards that stand committed and checked, from the first on.
        rows: rows in them.
        counts: their tokens seen, kept and dropped per rule.
        complete: nothing is left to do: the whole harvest is there and every digest is right.

    Raises:
        InputError: the folder holds a harvest of something else.
    """

    def __init__(self, folder: Path, stream: ShardStream, about: Mapping[str, Any] | None = None) -> None:
        self.folder = Path(folder)
        told = dict(about or {})
        self.harvest = Harvest(dict(stream.dims), stream.lanes, dict(stream.fingerprint), about=told)
        self.shards, self.rows = 0, 0
        self.counts: dict[str, int] = {}
        self._last_cursor: dict[str, Any] | None = None
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.folder)
        found = Harvest.read(self.folder)
        if found is None:
            write_json(self.folder / "harvest.json", asdict(self.harvest))
        else:
            self._check_same(found)
            self._take_stock(found)
        self.complete = found is not None and found.complete and self.shards == found.shards

    def resume(self, stream: ShardStream) -> None:
        """Seek the stream to the last committed shard. It is made once more, so `write` can compare the two:
        a harvest that cannot continue bit for bit stops here instead of mixing two kinds of rows."""
        if self._last_cursor is not None:
            stream.seek(self._last_cursor)

    def write(self, shard: Shard) -> None:
        """Commit a shard, or compare it with the one of its index that is there.

        Raises:
            InputError: the committed shard of this index holds other rows.
            OSError: the device is full or fails; the shards before are intact, the harvest can go on later.
        """
        target = shard_path(self.folder, shard.index)
        names = tensor_names(list(shard.rows))
        tensors = {names[hook]: x for hook, x in shard.rows.items()} | {IDS: shard.ids}
        if target.exists():
            stored = read_tensors(target / ROWS)
            same = stored.keys() == tensors.keys() and all(
                torch.equal(stored[n], tensors[n].cpu()) for n in stored
            )
            if not same:
                raise InputError(
                    "out",
                    str(target),
                    "the rows that this harvest makes again bit for bit; "
                    "model, library versions, device or number of threads changed: harvest into a new folder",
                )
        else:
            assert shard.index == self.shards, (shard.index, self.shards)
            first, last = (int(shard.ids.min()), int(shard.ids.max())) if len(shard) else (-1, -1)
            meta = {
                "index": shard.index,
                "cursor": shard.cursor,
                "hooks": names,
                "rows": len(shard),
                "dtypes": {hook: str(x.dtype).removeprefix("torch.") for hook, x in shard.rows.items()},
                "dims": {hook: x.shape[1] for hook, x in shard.rows.items()},
                "first_id": first,
                "last_id": last,
                "counts": shard.counts,
                "fingerprint": self.harvest.fingerprint,
            }
            with committed_folder(target, KIND, meta) as temp:
                write_tensors(temp / ROWS, tensors)
        if shard.index >= self.shards:
            self._count(len(shard), shard.counts, shard.cursor)

    def finish(self) -> None:
        """Mark the harvest complete. Raises InputError if it holds no row."""
        if self.rows == 0:
            raise InputError(
                "out", str(self.folder), f"at least one row, but the harvest gave none ({self.counts})"
            )
        done = asdict(self.harvest) | {
            "complete": True,
            "shards": self.shards,
            "rows": self.rows,
            "counts": self.counts,
        }
        write_json(self.folder / "harvest.json", done)
        self.complete = True

    def _check_same(self, found: Harvest) -> None:
        ours, theirs = asdict(self.harvest), asdict(found)
        for key in ("format", "dims", "lanes"):
            if ours[key] != theirs[key]:
                raise InputError(
                    "out",
                    str(self.folder),
                    f"a new folder: the harvest there has {key} {theirs[key]}, this one {ours[key]}",
                )
        for key in sorted(ours["fingerprint"].keys() | theirs["fingerprint"].keys()):
            here, there = ours["fingerprint"].get(key), theirs["fingerprint"].get(key)
            if here != there:
                raise InputError(
                    "out",
                    str(self.folder),
                    f"a new folder: the harvest there has {key} {there!r}, this one {here!r}",
                )

    def _take_stock(self, found: Harvest) -> None:
        """Count the whole shards from the first on; damaged ones are removed, to be made again."""
        last = max((int(p.name[6:]) for p in self.folder.glob("shard-????????")), default=-1)
        intact = True
        for index in range(last + 1):
            path = shard_path(self.folder, index)
            if not path.exists():
                intact = False
                continue
            try:
                meta = _verified(path, index)
            except CorruptFolder as error:
                logger.warning(
                    "removing damaged shard %s, it will be harvested again: %s", path, error.reason
                )
                remove_folder(path)
                intact = False
                continue
            if intact:
                self._count(meta["rows"], meta["counts"], meta["cursor"])

    def _count(self, rows: int, counts: Mapping[str, int], cursor: dict[str, Any]) -> None:
        self.shards += 1
        self.rows += rows
        for rule, count in counts.items():
            self.counts[rule] = self.counts.get(rule, 0) + count
        self._last_cursor = cursor


def _verified(path: Path, index: int) -> dict[str, Any]:
    """The meta of a shard every byte of which is right and that is the one its name says."""
    meta: dict[str, Any] = verify(path, KIND)["meta"]
    if meta.get("index") != index:
        raise CorruptFolder(path, f"its manifest is that of shard {str(meta.get('index'))[:20]}")
    sound = is_table(meta.get("hooks"), str) and is_table(meta.get("counts"), int)
    if not sound or not isinstance(meta.get("cursor"), dict) or type(meta.get("rows")) is not int:
        raise CorruptFolder(path, "its manifest does not describe a shard")
    return meta


class DiskShards:
    """The shards of a harvest folder as a stream.

    Epoch 0 goes through them in harvest order, so a run sees the rows that a run from the live model
    sees; later epochs in an order permuted by (seed, epoch).

    Args:
        folder: written by `ShardWriter`, complete.
        hooks: which of its hooks to read; None reads all.
        epochs: times the shards are gone through.
        seed: of the order of later epochs.
        device: where the rows go.

    Raises:
        InputError: no harvest, an unfinished one, a missing shard, or a hook that was not harvested.
    """

    def __init__(
        self,
        folder: Path,
        hooks: Sequence[str] | None = None,
        epochs: int = 1,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:
        self.folder, self.epochs, self.seed, self.device = Path(folder), epochs, seed, device
        harvest = Harvest.read(self.folder)
        if harvest is None:
            raise InputError(
                "source.path", str(folder), "a folder written by sae-train harvest (it has harvest.json)"
            )
        if not harvest.complete:
            raise InputError(
                "source.path", str(folder), "a finished harvest; run the same harvest command again"
            )
        for hook in hooks or ():
            if hook not in harvest.dims:
                raise InputError("hook", hook, f"one that was harvested: {nearest(hook, list(harvest.dims))}")
        for index in range(harvest.shards):
            if not shard_path(self.folder, index).is_dir():
                raise InputError(
                    "source.path",
                    str(shard_path(self.folder, index)),
                    f"a shard: the harvest has {harvest.shards}; run the same harvest command again",
                )
        self.harvest, self.lanes = harvest, harvest.lanes
        self.most_rows = harvest.rows * epochs
        self.hooks = list(hooks) if hooks is not None else list(harvest.dims)
        self.dims: Mapping[str, int] = {hook: harvest.dims[hook] for hook in self.hooks}
        self.fingerprint: Mapping[str, str] = dict(harvest.fingerprint)
        if epochs > 1:
            self.fingerprint = {
                **self.fingerprint,
                "epochs": f"{epochs} of {harvest.shards} shards, seed {seed}",
            }
        self._epoch, self._position = 0, 0
        self._order = self._epoch_order(0)

    def next_shard(self) -> Shard | None:
        """Read and check the next shard.

        Raises:
            InputError: it is damaged; the message names it and says what is wrong.
        """
        if self._position == len(self._order):
            if self._epoch + 1 >= self.epochs:
                return None
            self.seek({"epoch": self._epoch + 1, "position": 0})
        shard = self._read(self._order[self._position])
        self._position += 1
        return shard

    def seek(self, cursor: dict[str, Any]) -> None:
        self._epoch, self._position = cursor["epoch"], cursor["position"]
        self._order = self._epoch_order(self._epoch)

    def close(self) -> None:
        """Nothing is held open."""

    def _epoch_order(self, epoch: int) -> list[int]:
        if epoch == 0:
            return list(range(self.harvest.shards))
        order: list[int] = permutation(self.harvest.shards, "epoch", self.seed, epoch).tolist()
        return order

    def _read(self, index: int) -> Shard:
        start = time.perf_counter()
        path = shard_path(self.folder, index)
        try:
            meta = _verified(path, index)
            tensors = read_tensors(path / ROWS, self.device, MAX_HEADER_BYTES)
            self._check(path, meta, tensors)
        except (CorruptFile, FileNotFoundError) as error:
            reason = error.reason if isinstance(error, CorruptFile) else "it is gone"
            raise InputError(
                "source.path",
                str(path),
                f"the shard as harvested, but {reason}; run the same harvest command again",
            ) from error
        return Shard(
            index=self._epoch * self.harvest.shards + self._position,
            rows={hook: tensors[meta["hooks"][hook]] for hook in self.hooks},
            ids=tensors[IDS],
            counts=meta["counts"],
            cursor={"epoch": self._epoch, "position": self._position},
            seconds={"read": time.perf_counter() - start},
        )

    def _check(self, path: Path, meta: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """See that a shard holds what is said of it: its digests do not vouch for its author."""
        if meta.get("fingerprint") != self.harvest.fingerprint:
            raise CorruptFile(path, "it is a shard of another harvest")
        rows, ids = meta["rows"], tensors.get(IDS)
        if ids is None or ids.dtype != torch.int64 or ids.shape != (rows,) or rows % self.lanes:
            raise CorruptFile(path, f"it has no {rows} numbered rows in {self.lanes} lanes")
        for hook in self.hooks:
            x = tensors.get(meta["hooks"].get(hook, ""))
            if x is None or x.dtype not in DTYPES or x.shape != (rows, self.dims[hook]):
                raise CorruptFile(path, f"it has no {rows} rows of width {self.dims[hook]} for {hook}")
