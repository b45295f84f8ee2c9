"""The guard against tests of resuming that cannot fail: take away any item of the saved state, and one does.

A run is continued from a checkpoint of its middle, once as it is and once per item with that item changed:
to what a process that has just started would hold, or to something else where that is the same. Each time
the end has to differ from that of the run that was left alone, or the resume has to fail. So an item that
nobody restores is noticed, and so is one that nothing needs.
"""

import copy
import logging
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faults.tools import DYING, SYNTHETIC, differences, final_state, told
from omegaconf import DictConfig
from torch import Tensor

from sae_train.batch import RowBatch
from sae_train.cli.compose import compose
from sae_train.cli.train import train
from sae_train.errors import InputError, NumericsError
from sae_train.shards.source import ShardSource
from sae_train.train.saver import snapshot
from sae_train.train.state import TrainState

MIDDLE = 21
"""The step saved. It was evaluated, it lies within a shard and between two looks at which latents are dead,
and it is odd: each generator, which gave one normal number per step, holds the second half of a pair."""
STEPS = 30
SKIPPED = {7}
"""Steps whose rows are not finite, so that the optimizer leaves them out."""
HIGH = {MIDDLE - 2, MIDDLE - 1, MIDDLE, MIDDLE + 1}
"""Steps whose loss leaps up: the first three are left out as spikes, the fourth is not."""

WAYS = {
    "autograd": ["kernels.stepper=autograd", "train.ema=0.9"],
    "fused": ["kernels.stepper=fused", "optim.clip_norm=lagged", "optim.clip=0.05", "optim.moments=bfloat16"],
    "active rows": ["kernels.stepper=fused", "optim.rows=active", "optim.beta1=0"],
}
PARTS = 4

EXCUSED = {
    "extra/clock": "seconds, which no two runs share",
    "extra/producer": "seconds, which no two runs share",
    "extra/log/step": "the next record of metrics.jsonl sets it; TensorBoard alone reads it, at the start",
    "rng/cuda": "empty without a GPU",
    "skipped_in_a_row": "back at 0 after a good step: it has a test of its own below",
    "schedule/_last_lr": "every step sets it before it is read",
    "schedule/_get_lr_called_within_step": "every step sets it before it is read",
    "average/module.input_scale": "every step copies it from the SAE: it is not trained",
}
"""Items that make no difference here, and why."""
EXCUSED_IN: dict[str, dict[str, str]] = {
    "autograd": {},
    "fused": {f"optimizer/state/{i}/step": "a fused step counts once, for all parameters" for i in (1, 2, 3)},
}
EXCUSED_IN["active rows"] = EXCUSED_IN["fused"] | {
    "optimizer/state/3/exp_avg": "without a first moment (beta1=0) it is the gradient of the last step"
}

NOT_TO_ALTER = ("amsgrad", "params")
"""Constants, the same in every process of a run. With other values torch's Adam writes out of bounds (it
takes moments for those of another parameter, or maxima that nobody made) and the process dies."""


HERE, ELSEWHERE = "tried by default", "the others"
"""Most of a checkpoint is restored by code that no way of stepping has a part in. By default such items are
tried with autograd alone, those of the SAEs with fused steps too, and those of the optimizer in every way."""
SCOPES = [HERE, pytest.param(ELSEWHERE, marks=pytest.mark.slow)]


def scope(way: str, path: tuple[Any, ...]) -> str:
    beginning = {"autograd": (), "fused": ("members",), "active rows": ("members", "main", "optimizer")}[way]
    return HERE if path[: len(beginning)] == beginning else ELSEWHERE


@dataclass
class Base:
    """A run left alone, and the folder as a kill in its middle would have left it."""

    way: str
    composed: DictConfig
    folder: Path
    state: dict[str, Any]
    end: dict[str, Any]
    told: list[dict[str, Any]]


@contextmanager
def plugged(skipped: set[int]) -> Iterator[None]:
    """Rows as a plug-in that draws random numbers might make them, and not finite at some steps."""
    with pytest.MonkeyPatch.context() as patch:
        real = ShardSource.next_batch

        def next_batch(self: ShardSource) -> RowBatch | None:
            rows = real(self)
            if rows is None:
                return None
            drawn = float(torch.randn(())) + float(np.random.standard_normal()) + random.gauss(0, 1)
            factor = torch.nan if self.batches in skipped else 1 + 0.01 * drawn
            factor *= 100 if self.batches in HIGH else 1
            return RowBatch({hook: x * factor for hook, x in rows.rows.items()}, rows.ids)

        patch.setattr(ShardSource, "next_batch", next_batch)
        patch.setattr("sae_train.cli.train.finish", lambda *args: None)  # the report comes after all state
        yield


def run(composed: DictConfig, folder: Path) -> None:
    composed.run.dir = str(folder)
    assert train(composed, ["train"]) == 0
    logging.getLogger().handlers[:] = [
        handler for handler in logging.getLogger().handlers if not isinstance(handler, logging.FileHandler)
    ]


def make_base(way: str, folder: Path, skipped: set[int]) -> Base:
    composed = compose(
        "train",
        [
            *SYNTHETIC,
            *DYING,
            *WAYS[way],
            f"train.tokens={32 * STEPS}",
            f"checkpoint.every={MIDDLE}",
            f"eval.every={MIDDLE}",
            "source.prefetch=0",
            "source.shard_tokens=255",  # one row too many for the lanes: it is counted
            "train.spike_window=12",
        ],
    )
    states: list[dict[str, Any]] = []
    with plugged(skipped), pytest.MonkeyPatch.context() as patch:
        real = TrainState.state_dict
        patch.setattr(
            TrainState, "state_dict", lambda self: states.append(snapshot(real(self))) or real(self)
        )
        try:
            run(composed, folder / "whole")
        except NumericsError:
            assert len(skipped) > 1
    cut = folder / "cut"
    name = f"step-{MIDDLE:08d}"
    shutil.copytree(folder / "whole" / "checkpoints" / name, cut / "checkpoints" / name)
    shutil.copy(folder / "whole" / "metrics.jsonl", cut)
    state = next(state for state in states if state["step"] == MIDDLE)
    return Base(way, composed, cut, state, final_state(folder / "whole"), told(folder / "whole"))


@pytest.fixture(scope="module", params=list(WAYS))
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Base:
    return make_base(request.param, tmp_path_factory.mktemp(request.param), SKIPPED)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all items; a list of plain values, such as a generator's words, is one item."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    elif isinstance(value, list) and any(isinstance(item, dict | list | Tensor) for item in value):
        for i, item in enumerate(value):
            yield from leaves(item, (*path, i))
    else:
        yield path


def at(value: Any, path: tuple[Any, ...]) -> Any:
    """The item at a path, or None where there is none."""
    for key in path:
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            return None
    return value


def excused(base: Base, path: tuple[Any, ...]) -> bool:
    name = "/".join(map(str, path))
    return any(name.startswith(key) or name.endswith(key) for key in EXCUSED | EXCUSED_IN[base.way])


def items(base: Base, which: str) -> list[tuple[Any, ...]]:
    return [path for path in leaves(base.state) if scope(base.way, path) == which]


def same(one: Any, two: Any) -> bool:
    return differences({"": one}, {"": two}) == []


def altered(value: Any) -> Any:
    """Another value of the same kind."""
    if isinstance(value, Tensor):
        if value.dtype == torch.bool:
            return ~value
        return value + (1 + value.abs()) / 8 if value.is_floating_point() else value + 1
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, list) and value:
        return [altered(value[0]), *value[1:]]
    return "another"


Change = Callable[[dict[str, Any], dict[str, Any]], None]
"""(state that is loaded, state of the process before) -> changes the first."""


def resume(base: Base, folder: Path, change: Change, skipped: set[int]) -> str | None:
    """Continue from the middle with a changed state; None if nobody noticed, or what was noticed."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(base.folder, folder)
    real = TrainState.load_state_dict

    def load(self: TrainState, state: dict[str, Any]) -> None:
        assert state["step"] == MIDDLE
        state = copy.deepcopy(state)
        change(state, snapshot(self.state_dict()))
        real(self, state)

    with plugged(skipped), pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainState, "load_state_dict", load)
        try:
            run(base.composed, folder)
        except Exception as error:  # of any kind: the resume failed, and not in silence
            return f"{type(error).__name__}: {error}"
    if found := differences(base.end, final_state(folder)):
        return ", ".join(found)
    try:
        return None if told(folder) == base.told else "metrics.jsonl"
    except InputError as error:
        return f"metrics.jsonl: {error}"


def test_the_state_as_it_is_continues_to_the_same_end(base, tmp_path):
    assert resume(base, tmp_path / "run", lambda state, fresh: None, SKIPPED) is None


def test_the_saved_state_is_one_in_which_every_item_is_at_work(base):
    (member,) = base.state["members"].values()
    assert len(member["dead"]) > 0, "no latent is dead"
    assert int(member["skipped"]) == len(SKIPPED) + 3, "the spikes count too"
    assert base.state["source"]["row"] > 0 and base.state["source"]["cursor"] != base.state["source"]["start"]
    assert int(member["spikes"]["streak"]) == 3 and int(member["spikes"]["spikes"]) == 3
    assert base.state["extra"]["judged"] == MIDDLE
    assert base.state["rng"]["numpy"]["has_gauss"] == 1 and base.state["rng"]["python"]["gauss"] is not None
    assert len(list(leaves(base.state))) > 50
    assert len(items(base, HERE)) > {"autograd": 80, "fused": 40, "active rows": 15}[base.way]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("which", SCOPES)
def test_an_item_of_state_that_is_not_restored_is_noticed(base, which, part, tmp_path):
    unnoticed = []
    for path in [path for path in items(base, which) if path[-1] not in NOT_TO_ALTER][part::PARTS]:

        def change(state: dict[str, Any], fresh: dict[str, Any], path: tuple[Any, ...] = path) -> None:
            saved, new = at(state, path), at(fresh, path)
            at(state, path[:-1])[path[-1]] = altered(saved) if new is None or same(new, saved) else new

        if not excused(base, path) and resume(base, tmp_path / "run", change, SKIPPED) is None:
            unnoticed.append("/".join(map(str, path)))
    assert unnoticed == []


@pytest.mark.timeout(600)
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("which", SCOPES)
def test_an_item_of_state_that_is_missing_is_noticed(base, which, part, tmp_path):
    unnoticed = []
    constants = set()  # what the process holds without being told: the other test shows that it counts
    for path in items(base, which)[part::PARTS]:

        def change(state: dict[str, Any], fresh: dict[str, Any], path: tuple[Any, ...] = path) -> None:
            if same(at(state, path), at(fresh, path)):
                constants.add(path)
            del at(state, path[:-1])[path[-1]]

        if not excused(base, path) and resume(base, tmp_path / "run", change, SKIPPED) is None:
            unnoticed.append(path)
    assert [path for path in unnoticed if path not in constants] == []


@pytest.mark.parametrize("way", list(WAYS))
def test_skipped_steps_in_a_row_are_counted_across_a_resume(way, tmp_path):
    """Twelve of them, five before the resume: only with those does the run stop as it must."""
    skipped = set(range(MIDDLE - 4, STEPS + 1))
    base = make_base(way, tmp_path, skipped)
    (member,) = base.state["members"].values()
    assert int(member["skipped_in_a_row"]) == 5
    noticed = resume(base, tmp_path / "run", lambda state, fresh: None, skipped)
    assert noticed is not None and "not finite for" in noticed

    def forget(state: dict[str, Any], fresh: dict[str, Any]) -> None:
        for saved in state["members"].values():
            saved["skipped_in_a_row"].zero_()

    again = resume(base, tmp_path / "again", forget, skipped)
    assert again is None or "not finite for" not in again
