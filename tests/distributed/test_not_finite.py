"""NaN in one process: its SAEs leave those steps out, the others train on, and giving up is done by all."""

import re
from pathlib import Path

import pytest
from distributed.conftest import GRID, SHORT
from faults.tools import call, differences, final_state, resumed_at

from sae_train.checkpoint import Checkpointer
from sae_train.log import read_metrics

OWN = {0: ("k2-seed0", "k4-seed0"), 1: ("k2-seed1", "k4-seed1")}
"""Which process has which SAEs, of two."""


def rows_not_finite(first: int, last: int) -> str:
    """Code for `before=`: a row of each of these steps' batches is NaN, in this process's memory only."""
    return call(
        "sae_train.shards.source:ShardSource.next_batch",
        f"""
if {first} <= args[0].batches <= {last}:
    for rows in args[0]._shard.rows.values():  # the batch is a view of them
        rows[args[0]._row - 1] = float("nan")
""",
        after=True,
    )


def skipped(run: Path) -> dict[str, float]:
    """SAE -> steps left out, in the last line of the log that has them."""
    last = [record for record in read_metrics(run) if "k2-seed0/skipped_steps" in record][-1]
    return {name: last[f"{name}/skipped_steps"] for names in OWN.values() for name in names}


def test_rows_that_are_nan_in_one_process_cost_its_saes_those_steps_and_the_others_nothing(
    launch, whole, tmp_path
):
    rank = 1
    run = tmp_path / "run"
    launch(2, "train", *SHORT, f"run.dir={run}", before={rank: rows_not_finite(12, 14)}).wait(0)
    assert skipped(run) == dict.fromkeys(OWN[rank], 3) | dict.fromkeys(OWN[1 - rank], 0)
    unlike = differences(final_state(whole), final_state(run))
    assert unlike, "nothing was injected"
    assert {path.split("/")[2] for path in unlike} == set(OWN[rank])


def said_alike(texts: list[str]) -> str:
    """The last line of each, which has to be the same."""
    lines = {text.strip().splitlines()[-1] for text in texts}
    assert len(lines) == 1 and "Traceback" not in "".join(texts), texts
    return lines.pop()


def test_rows_that_stay_nan_in_one_process_end_all_with_the_same_words(launch, tmp_path):
    rank, run = 0, tmp_path / "run"
    texts = launch(2, "train", *SHORT, f"run.dir={run}", before={rank: rows_not_finite(12, 40)}).wait(3)
    assert f"{OWN[rank][0]}: gradients were not finite for 11 steps in a row (step 22)" in said_alike(texts)
    assert skipped(run) == dict.fromkeys(OWN[rank], 11) | dict.fromkeys(OWN[1 - rank], 0)
    assert Checkpointer.steps(run / "checkpoints")[-1] == 20
    texts = launch(2, "train", *SHORT, f"run.dir={run}").wait(0)  # the last good one is whole, and good
    assert resumed_at(texts[0]) == 20
    assert set(skipped(run).values()) == {0, 9}


@pytest.mark.parametrize("rank", [0, 1])
def test_a_model_that_gives_nan_in_one_process_ends_all_with_the_same_words(rank, launch, tiny, tmp_path):
    """As a broken GPU may. Its rows go to everybody, so all find them."""
    broken = """
from sae_train.harvest.harvester import Harvester
real, calls = Harvester.rows, []
def rows(self, windows, out=None):
    made = real(self, windows, out)
    calls.append(1)
    if len(calls) > 6:
        for x in made.values():
            x[0, 3] = float("nan")
    return made
Harvester.rows = rows
"""
    run = tmp_path / "run"
    args = [*tiny, "source.lanes=4", GRID, "train.tokens=6400", "eval.every=0", f"run.dir={run}"]
    line = said_alike(launch(2, "train", *args, before={rank: broken}).wait(3))
    assert "rows" in line and re.search("are not finite in (float32|bfloat16), first at window", line)
    state = final_state(run)  # whole, and of the steps before
    assert state["/step"] > 0
