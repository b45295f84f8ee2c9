"""Checkpoints: everything a resume needs, committed whole, verified before use, never overwritten.

A checkpoint is a committed folder (`files.py`) `step-00000500/` with `state.safetensors` and
`state.json`. The state is one nested dict: its tensors go to the first file under their key path,
everything else to the second, a tree that refers to the tensors. No pickle, no link called
"latest": the newest step whose digests verify is the one to continue from.

Where several processes train, each writes its own part into the one folder (`state-1.safetensors` ...),
which must lie on a file system that they share; the lead commits it when all are done. What is read is the
whole, so a run goes on with any number of processes.
"""

import logging
import math
import os
import re
import uuid
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from torch import Tensor

from sae_train.errors import InputError, NumericsError
from sae_train.files import (
    CorruptFolder,
    FutureFormat,
    committed_folder,
    read_json,
    remove_folder,
    remove_leftovers,
    verify,
    verify_digests,
    verify_listing,
    write_json,
    write_tensors,
)
from sae_train.ranks import ALONE, Ranks
from sae_train.verified import read_verified_tensors

logger = logging.getLogger(__name__)

PARTED = "members"
"""Of a state: by name, and each name in one process's part only. All else is the lead's to say."""
KIND = "checkpoint"


@dataclass
class CheckpointConfig:
    """When to save everything a resume needs, and how many saves to keep."""

    every: int = 1000
    """Steps between checkpoints."""
    keep: int = 3
    """Newest whole checkpoints to keep, at least 2: the last one may turn out damaged."""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise InputError("checkpoint.every", self.every, "a number of steps, at least 1")
        if self.keep < 2:
            raise InputError("checkpoint.keep", self.keep, "at least 2")


@dataclass(frozen=True)
class Slice:
    """One process's rows of a tensor of the state; the others' are in their parts of the checkpoint."""

    tensor: Tensor
    index: int
    count: int


class Checkpointer:
    """Saves and loads the checkpoints of one run.

    Args:
        folder: holds `step-*` folders and nothing else of ours; made by the first save.
        keep: newest whole checkpoints kept after each save. Damaged ones neither count nor get deleted.
        check: asked just before a step gets its name; raises if the run folder is not ours any more.
        ranks: the processes that save and load together, with messages of their own.
    """

    def __init__(
        self,
        folder: Path,
        keep: int = 3,
        check: Callable[[], None] = lambda: None,
        ranks: Ranks = ALONE,
    ) -> None:
        assert keep >= 2, keep
        self.ranks = ranks
        self.folder, self.keep, self._check = Path(folder), keep, check
        self._current: int | None = None  # the step this process last saved or loaded from this folder
        self._whole: dict[int, bool] = {}  # verdict on the steps this process has verified
        self._saved = False

    @staticmethod
    def steps(folder: Path) -> list[int]:
        """Committed steps, oldest first, unverified. Links, leftovers and other names do not count."""
        if not folder.is_dir():
            return []
        names = (entry.name for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False))
        steps = {name: int(name[5:]) for name in names if re.fullmatch(r"step-[0-9]{8,12}", name)}
        return sorted(step for name, step in steps.items() if name == f"step-{step:08d}")

    def path(self, step: int) -> Path:
        """The folder of a step's checkpoint, whether it exists or not."""
        return self.folder / f"step-{step:08d}"

    def save(self, step: int, state: Mapping[str, Any], meta: Mapping[str, Any]) -> Path:
        """Commit the state of a step, then retire the oldest beyond `keep`.

        Saving a step that this process has saved or loaded already changes nothing. Where there are several,
        all call this, with the same step, and all succeed or none.

        Args:
            step: optimizer steps done.
            state: nested dicts and lists of tensors, None, bool, int, float and str. Tuples come back
                as lists; int keys come back as int.
            meta: JSON-able facts to check before a resume (configuration hash, versions, threads ...).

        Returns:
            The committed folder.

        Raises:
            NumericsError: a floating-point tensor holds NaN or an infinity; nothing is written.
            InputError: a whole checkpoint of this or a later step is there, from a run that went further.
            OSError: the device is full or fails; earlier checkpoints are intact, saving may be tried again.
        """
        target = self.path(step)
        if step == self._current and target.is_dir():
            return target
        tensors: dict[str, Tensor] = {}
        tree = _flatten(state if self.ranks.lead else {PARTED: state[PARTED]}, "", tensors)

        def finite() -> None:
            for name, tensor in tensors.items():
                if not _finite(tensor):
                    raise NumericsError(f"step {step} is not saved: {name} holds NaN or infinity")

        def write() -> None:
            write_tensors(temp / f"{_part(self.ranks.rank)}.safetensors", tensors)
            write_json(temp / f"{_part(self.ranks.rank)}.json", tree)

        self.ranks.all_do(finite)
        with ExitStack() as commit:
            temp = Path(self.ranks.lead_does(lambda: str(commit.enter_context(self._begin(step, meta)))))
            self.ranks.all_do(write)
            self.ranks.lead_does(commit.close)
        self._current, self._saved = step, True
        self._whole[step] = True
        self.ranks.lead_does(self._retire)
        return target

    def _retire(self) -> None:
        for old in [s for s in self.steps(self.folder) if self._is_whole(s)][: -self.keep]:
            remove_folder(self.path(old))

    def _begin(self, step: int, meta: Mapping[str, Any]) -> AbstractContextManager[Path]:
        """The folder to write into, which gets its name when it is left."""
        self.folder.mkdir(exist_ok=True)  # not its parents: a run folder that is gone is not made anew
        if not self._saved:  # not earlier: a process that only reads must not remove a live writer's files
            remove_leftovers(self.folder)
        self._clear_way(step)
        return committed_folder(self.path(step), KIND, {"step": step, "run": dict(meta)}, self._check)

    def load(self, path: Path | None = None) -> tuple[int, dict[str, Any], dict[str, Any]] | None:
        """The newest checkpoint that verifies, or the one at `path`.

        Returns:
            (step, state, meta) with tensors on the CPU, or None if no checkpoint was ever committed.

        Raises:
            InputError: `path` is damaged or no checkpoint; every checkpoint is damaged (a fresh start is
                the user's decision); or one was written by a newer version of this package.
        """
        steps = self.steps(self.folder)
        if path is not None:
            try:
                return self._read(path)
            except CorruptFolder as error:
                raise InputError(
                    "checkpoint", str(path), f"a whole checkpoint, but {error.reason}"
                ) from error
        for step in reversed(steps):
            try:
                return self._read(self.path(step))
            except FutureFormat as error:
                raise InputError(
                    "checkpoint", str(error.path), f"one this version can read, but it has {error.reason}"
                ) from error
            except CorruptFolder as error:
                logger.warning("skipping damaged checkpoint %s: %s", error.path, error.reason)
        if steps:
            raise InputError(
                "checkpoints",
                str(self.folder),
                f"a whole checkpoint, but all {len(steps)} are damaged; move the folder away to start anew",
            )
        return None

    def _read(self, folder: Path) -> tuple[int, dict[str, Any], dict[str, Any]]:
        manifest = verify_listing(folder, KIND)
        step, meta = _described(folder, manifest)
        state = _put_together(folder, manifest)
        if folder.resolve() == self.path(step).resolve():
            self._current = step
            self._whole[step] = True
        return step, state, meta

    def _is_whole(self, step: int) -> bool:
        if step not in self._whole:
            try:
                _described(self.path(step), verify(self.path(step), KIND))
            except CorruptFolder as error:
                logger.warning("damaged checkpoint %s is kept but not counted: %s", error.path, error.reason)
                self._whole[step] = False
            else:
                self._whole[step] = True
        return self._whole[step]

    def _clear_way(self, step: int) -> None:
        """Set damaged checkpoints of this or later steps aside; refuse to go on behind whole ones.

        A later whole step would win the next resume over what is saved now, so two histories would mix.
        """
        for late in (s for s in self.steps(self.folder) if s >= step):
            if self._is_whole(late):
                raise InputError(
                    "checkpoints",
                    str(self.path(late)),
                    f"no checkpoint of step {step} or later where step {step} is to be saved; move it away",
                )
            self.path(late).rename(self.folder / f"step-{late:08d}.damaged-{uuid.uuid4().hex[:8]}")
            del self._whole[late]


def _part(rank: int) -> str:
    return f"state-{rank}" if rank else "state"


def _put_together(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The state that the files of one checkpoint hold: every byte verified, parts of processes merged."""
    held = manifest["files"]
    names = {part: f"{part}.safetensors" for part in map(_part, range(len(held)))}
    tensors = {
        part: read_verified_tensors(folder, name, manifest) for part, name in names.items() if name in held
    }
    verify_digests(folder, manifest, without={names[part] for part in tensors})
    try:
        whole, *more = (_unflatten(read_json(folder / f"{part}.json"), own) for part, own in tensors.items())
        for state in more:
            whole[PARTED] = _merged(whole[PARTED], state[PARTED])
        whole = _joined(whole)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise CorruptFolder(folder, f"its state cannot be put together ({error})") from error
    if not isinstance(whole, dict):
        raise CorruptFolder(folder, "its state is no table")
    return whole


def _described(folder: Path, manifest: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
    """The step and the facts of the run that a checkpoint's manifest gives."""
    meta = manifest["meta"]
    if type(meta.get("step")) is not int or not isinstance(meta.get("run"), dict):
        raise CorruptFolder(folder, "its manifest does not describe a checkpoint")
    if re.fullmatch(r"step-\d{8,}", folder.name) and folder.name != f"step-{meta['step']:08d}":
        raise CorruptFolder(folder, f"its manifest is that of step {meta['step']}")
    return meta["step"], meta["run"]


def _finite(tensor: Tensor) -> bool:
    """Whether a tensor has no NaN or infinity.

    By its extremes, which pass a NaN on: 11 times faster than isfinite on 2 CPU cores, and no mask.
    """
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    return bool(torch.isfinite(torch.stack(torch.aminmax(tensor.detach()))).all())


def _flatten(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Move the tensors of a state into `tensors` and return the JSON tree that refers to them.

    A dict whose keys are strings not starting with "$" is itself; the rest is tagged: {"$tensor": name},
    {"$float": "nan"}, {"$dict": [[key, value], ...]}. A tensor's name is its key path, percent-quoted, with
    "#" before an int key or list position: no two paths give one name, and no name is `__metadata__`.
    """
    if isinstance(value, Tensor):
        tensors[path] = value
        return {"$tensor": path}
    if isinstance(value, Slice):
        tensors[path] = value.tensor
        return {"$slice": path, "index": value.index, "count": value.count}
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
    if isinstance(value, list | tuple):
        return [_flatten(item, f"{path}/#{i}", tensors) for i, item in enumerate(value)]
    if not isinstance(value, Mapping):
        raise TypeError(f"state{path} is a {type(value).__name__}, which a checkpoint cannot hold")
    pairs = [(key, _flatten(item, f"{path}/{_quote(key, path)}", tensors)) for key, item in value.items()]
    if all(isinstance(key, str) and not key.startswith("$") for key, _ in pairs):
        return dict(pairs)
    return {"$dict": [list(pair) for pair in pairs]}


def _quote(key: Any, path: str) -> str:
    if isinstance(key, str):
        return quote(key, safe=" .:,=()[]", errors="surrogatepass")
    if isinstance(key, int) and not isinstance(key, bool):
        return f"#{key}"
    raise TypeError(f"state{path} has the key {key!r}: a checkpoint's keys are str or int")


def _unflatten(tree: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(tree, list):
        return [_unflatten(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    match tree:
        case {"$tensor": name}:
            return tensors[name]
        case {"$slice": name, "index": int(index), "count": int(count)}:
            return [Slice(tensors[name], index, count)]
        case {"$float": text}:
            return float(text)
        case {"$dict": pairs}:
            return {key: _unflatten(item, tensors) for key, item in pairs}
    return {key: _unflatten(item, tensors) for key, item in tree.items()}


def _merged(one: Any, two: Any) -> Any:
    """Two parts of a state as one: what both have is the same in both, but lists of slices, which add up."""
    if isinstance(one, dict) and isinstance(two, dict):
        return one | {key: _merged(one[key], value) if key in one else value for key, value in two.items()}
    return [*one, *two] if _sliced(one) and _sliced(two) else one


def _sliced(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and isinstance(value[0], Slice)


def _joined(value: Any) -> Any:
    """A state in which slices are whole tensors again."""
    if _sliced(value):
        by_index = {part.index: part.tensor for part in value}
        if sorted(by_index) != list(range(value[0].count)):
            raise ValueError(f"slices {sorted(by_index)} of {value[0].count}")
        return torch.cat([by_index[index] for index in sorted(by_index)])
    if isinstance(value, dict):
        return {key: _joined(item) for key, item in value.items()}
    return [_joined(item) for item in value] if isinstance(value, list) else value
