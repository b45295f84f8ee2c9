"""Shares that do not come out even, at the end of the data and elsewhere: no bit shows it, and none waits."""

import signal
from pathlib import Path

import pytest
from distributed.test_members import members
from faults.tools import (
    SYNTHETIC,
    at_step,
    differences,
    final_state,
    kill_once_saved,
    read_rows,
    resumed_at,
    send,
)

GRID = "grid={k: [2, 4], seed: [0, 1]}"
SOON = "mesh.timeout_s=30"
"""What waits in vain fails soon."""


def rows_of(tmp_path: Path, *numbers: int) -> list[tuple[int, ...]]:
    """What was trained on, batch by batch, by these processes of `launch` one after the other."""
    return [batch for number in numbers for batch in read_rows(tmp_path / f"rows-{number}")]


def test_61_rows_end_two_processes_alike_after_the_rows_that_one_has(launch, zygote, tmp_path):
    rows = "source.synthetic={d: 16, features: 32, groups: 4, group_size: 4, l0: 2, rows: 61}"
    args = [*SYNTHETIC, rows, "source.epochs=1", "train.batch_tokens=8", "eval.tokens=4", SOON, GRID]
    args += ["corpus.allow_short=true"]
    one = {"rows": tmp_path / "rows-of-one", "plots": False}
    zygote.run("train", *args, f"run.dir={tmp_path / 'one'}", **one)
    launch(2, "train", *args, f"run.dir={tmp_path / 'two'}").wait(0)
    assert "the data ended at step 7 of " in (tmp_path / "two" / "train.log").read_text()
    whole = read_rows(tmp_path / "rows-of-one")
    assert len(whole) == 7 and rows_of(tmp_path, 0) == whole == rows_of(tmp_path, 1)
    assert differences(final_state(tmp_path / "one"), final_state(tmp_path / "two")) == []
    counts = members(tmp_path / "two")["rows"]
    assert counts["seen"] == 61
    assert counts["kept"] - counts["unaligned"] - counts["tail"] == 56


def test_a_last_shard_with_fewer_windows_than_lanes_ends_three_processes_alike(
    launch, zygote, tiny, tmp_path
):
    short = [
        "corpus.context_length=14",
        "source.shard_tokens=224",
        "corpus.epochs=1",
        "corpus.allow_short=true",
    ]
    args = [*tiny, *short, "source.lanes=8", SOON, GRID]
    one = {"rows": tmp_path / "rows-of-one", "plots": False}
    zygote.run("train", *args, f"run.dir={tmp_path / 'one'}", **one)
    launch(3, "train", *args, f"run.dir={tmp_path / 'three'}").wait(0)
    whole = read_rows(tmp_path / "rows-of-one")
    assert len(whole) > 5
    for rank in range(3):
        assert rows_of(tmp_path, rank) == whole
    assert differences(final_state(tmp_path / "one"), final_state(tmp_path / "three")) == []
    alone, together = members(tmp_path / "one"), members(tmp_path / "three")
    assert together["rows"] == alone["rows"] and together["row_ledger"] == alone["row_ledger"]
    windows, rest = divmod(alone["rows"]["seen"], 14)
    assert rest == 0 and 0 < windows % 16 < 3, "a process without a window in it, or this is about nothing"


def test_no_row_is_skipped_or_repeated_as_the_number_of_processes_changes(launch, zygote, tiny, tmp_path):
    """Also where it divides neither the lanes nor the batch."""
    sizes = (2, 1, 2, 3)
    args = [*tiny, "source.lanes=8", SOON, GRID, "train.tokens=1280", "eval.every=20"]
    one = {"rows": tmp_path / "rows-of-one", "plots": False}
    zygote.run("train", *args, f"run.dir={tmp_path / 'one'}", **one)
    run, leads = tmp_path / "run", []
    for leg, size in enumerate(sizes):
        last = leg == len(sizes) - 1
        stop = {size - 1: at_step(7 + 9 * leg, send(signal.SIGTERM))} if not last else None
        texts = launch(size, "train", *args, f"run.dir={run}", before=stop).wait(0 if last else 75)
        assert (resumed_at(texts[0]) is not None) == (leg > 0)
        leads.append(sum(sizes[:leg]))
    whole = read_rows(tmp_path / "rows-of-one")
    assert len(whole) == 40 and rows_of(tmp_path, *leads) == whole
    assert members(run)["row_ledger"] == members(tmp_path / "one")["row_ledger"]
    assert differences(final_state(tmp_path / "one"), final_state(run)) == []


@pytest.mark.slow
def test_five_processes_are_killed_and_three_go_on_to_the_same_bits(launch, zygote, tiny, tmp_path):
    args = [*tiny, "source.lanes=8", SOON, GRID, "train.tokens=1280", "eval.every=20"]
    zygote.run("train", *args, f"run.dir={tmp_path / 'one'}", plots=False)
    run = tmp_path / "run"
    group = launch(5, "train", *args, f"run.dir={run}", before={4: kill_once_saved(run, 17)})
    group.wait(75, 75, 75, 75, -9)
    texts = launch(3, "train", *args, f"run.dir={run}").wait(0)
    assert (resumed_at(texts[0]) or 0) > 0
    assert differences(final_state(tmp_path / "one"), final_state(run)) == []


def test_processes_without_a_lane_and_without_an_sae_hold_nobody_up(launch, zygote, tiny, tmp_path):
    args = [*tiny, "source.lanes=2", SOON, "train.tokens=1280", "eval.every=20"]
    zygote.run("train", *args, f"run.dir={tmp_path / 'one'}", plots=False)
    run = tmp_path / "run"
    stop = {2: at_step(12, send(signal.SIGTERM))}
    texts = launch(3, "train", *args, f"run.dir={run}", before=stop).wait(75)
    assert "received SIGTERM: saved at step 12" in texts[2]
    launch(3, "train", *args, f"run.dir={run}").wait(0)
    assert differences(final_state(tmp_path / "one"), final_state(run)) == []
