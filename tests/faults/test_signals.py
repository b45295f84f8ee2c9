"""A run that is asked to stop saves the step it is at and leaves with 75, wherever it is asked."""

import random
import signal
import time
from pathlib import Path

import pytest
from faults.tools import (
    SYNTHETIC,
    at_step,
    call,
    differences,
    final_state,
    read_rows,
    send,
    told,
    whole_tree,
)

from sae_train.checkpoint import Checkpointer
from sae_train.files import verify
from sae_train.train.record import RunRecord

SHORT = ["train.tokens=1280", "checkpoint.every=5", "eval.every=10"]
"""40 steps."""
SECONDS = 25
"""Within which a stopped process has to be gone: a job manager waits for 30."""
TERM, USR1, INT = signal.SIGTERM, signal.SIGUSR1, signal.SIGINT


@pytest.fixture(scope="module")
def whole(zygote, tiny, tmp_path_factory):
    """A run left alone, to compare with."""
    run = tmp_path_factory.mktemp("whole") / "run"
    zygote.run("train", *tiny, *SHORT, f"run.dir={run}", plots=False)
    return run


def committed(run: Path) -> list[int]:
    """Steps saved, all of which are whole; nothing else may lie beside them."""
    folder = run / "checkpoints"
    names = sorted(p.name for p in folder.iterdir()) if folder.exists() else []
    steps = Checkpointer.steps(folder)
    assert names == [f"step-{step:08d}" for step in steps]
    for name in names:
        verify(folder / name, "checkpoint")
    return steps


def assert_goes_on(zygote, args, run, whole):
    """The same command ends as a run that was never stopped."""
    zygote.run("train", *args, f"run.dir={run}", plots=False)
    assert differences(final_state(run), final_state(whole)) == []
    assert told(run) == told(whole)


@pytest.mark.parametrize("number", [TERM, USR1, INT], ids=["TERM", "USR1", "INT"])
def test_a_signal_in_a_step_loses_nothing(zygote, tiny, whole, number, tmp_path):
    run, rows = tmp_path / "run", tmp_path / "rows"
    args = [*tiny, *SHORT]
    step = random.Random(int(number)).randint(3, 37)
    text = zygote.run(
        "train", *args, f"run.dir={run}", rows=rows, before=at_step(step, send(number)), code=75
    )
    assert f"received {signal.Signals(number).name}: saved at step {step}" in text and "Traceback" not in text
    assert len(read_rows(rows)) == step == committed(run)[-1]
    assert_goes_on(zygote, args, run, whole)


def test_a_signal_at_any_time_loses_no_step(zygote, tiny, tmp_path):
    """From outside, at seeded times: what was trained is saved."""
    for i in range(5):
        run, rows = tmp_path / str(i), tmp_path / f"{i}.rows"
        process = zygote.start("train", *tiny, "train.tokens=64000", f"run.dir={run}", rows=rows)
        process.wait_for_step(run, 2)
        time.sleep(random.Random(i).uniform(0, 0.5))
        process.send(TERM)
        assert process.wait(SECONDS) == 75, process.text()
        assert len(read_rows(rows)) == committed(run)[-1], process.text()


MOMENTS = {
    "before the model": call("sae_train.cli.train:wire", send(TERM)),
    "with its configuration": call("sae_train.cli.language_model:load_config", send(TERM), after=True),
    "loading its weights": call("sae_train.cli.language_model:load_model", send(TERM)),
    "after its weights": call("sae_train.cli.language_model:load_model", send(TERM), after=True),
    "held-out rows": call("sae_train.harvest.harvester:Harvester._forward", send(TERM), nth=3),
    "writing run.json": call("sae_train.cli.train:write_bytes", send(TERM)),
    "first shard": call("sae_train.shards.source:ShardSource.sample", send(TERM)),
    "initialisation": call("sae_train.train.members:Member.initialise", send(TERM)),
    "just before the first step": call("sae_train.cli.signals:StopSignals.defer", send(TERM)),
    "just after it may be late": call("sae_train.cli.signals:StopSignals.defer", send(TERM), after=True),
}


@pytest.mark.parametrize("moment", list(MOMENTS))
def test_a_signal_during_startup_leaves_one_whole_checkpoint_or_none(zygote, tiny, moment, tmp_path):
    run, rows = tmp_path / "run", tmp_path / "rows"
    text = zygote.run("train", *tiny, f"run.dir={run}", before=MOMENTS[moment], rows=rows, code=75)
    assert "received SIGTERM" in text and "the same command continues" in text and "Traceback" not in text
    if moment == "just after it may be late":  # then it is the first step that notices
        assert committed(run) == [0, 1] and len(read_rows(rows)) == 1
    else:
        assert committed(run) == [] and read_rows(rows) == []


def test_runs_stopped_in_startup_again_and_again_end_the_same(zygote, tiny, whole, tmp_path):
    run = tmp_path / "run"
    args = [*tiny, *SHORT]
    for before in list(MOMENTS.values())[1::2]:
        zygote.run("train", *args, f"run.dir={run}", before=before, code=75)
    assert_goes_on(zygote, args, run, whole)


SLOW_MODEL = call("sae_train.harvest.harvester:Harvester._forward", "time.sleep(0.05)")
LONG_SHARD = ["source.shard_tokens=64000", "corpus.epochs=4000", "model.micro_batch=2"]
"""A hundred seconds with the model above."""


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_signal_while_the_first_shard_is_harvested_is_heard_in_time(zygote, tiny, ahead, tmp_path):
    run = tmp_path / "run"
    before = SLOW_MODEL + call("sae_train.harvest.harvester:Harvester._forward", send(TERM), nth=80)
    began = time.monotonic()
    args = [*tiny, *LONG_SHARD, f"source.prefetch={ahead}", f"run.dir={run}"]
    zygote.run("train", *args, before=before, code=75)
    assert committed(run) == []
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_signal_while_a_later_shard_is_harvested_saves_the_last_step(zygote, tiny, ahead, tmp_path):
    """14 forwards for held-out rows, 40 for the first shard; those of the second take half a second each."""
    run, rows, whole = tmp_path / "run", tmp_path / "rows", tmp_path / "whole"
    args = [*tiny, *SHORT, f"source.prefetch={ahead}", "source.shard_tokens=640", "model.micro_batch=1"]
    zygote.run("train", *args, f"run.dir={whole}", plots=False)
    forward = "sae_train.harvest.harvester:Harvester._forward"
    before = call(forward, "time.sleep(0.5)", since=70) + call(forward, send(TERM), nth=73)
    zygote.run("train", *args, f"run.dir={run}", rows=rows, before=before, code=75)
    assert len(read_rows(rows)) == committed(run)[-1] < 20  # the first shard has rows for 19
    assert_goes_on(zygote, args, run, whole)


ENDS = {
    "evaluation": (call("sae_train.cli.train:evaluate", send(TERM), nth=2), "saved at step 20"),
    "last step": (at_step(40, send(TERM)), "trained and saved"),
    "last save": (call("sae_train.train.trainer:Trainer.save", send(TERM)), "trained and saved"),
    "last evaluation": (call("sae_train.cli.finish:evaluate", send(TERM)), "trained and saved"),
    "cross-entropy": (call("sae_train.cli.wire:splice_reports", send(TERM), nth=4), "trained and saved"),
}


@pytest.mark.parametrize("place", list(ENDS))
def test_a_signal_in_an_evaluation_or_at_the_end_loses_nothing(zygote, tiny, whole, place, tmp_path):
    before, said = ENDS[place]
    run, args = tmp_path / "run", [*tiny, *SHORT]
    text = zygote.run("train", *args, f"run.dir={run}", before=before, code=75)
    assert said in text and "Traceback" not in text
    committed(run)
    record = RunRecord.read(run)
    assert record is not None and record.status == "stopped"
    assert_goes_on(zygote, args, run, whole)


def test_a_signal_while_the_report_is_written_ends_in_a_whole_report(zygote, tiny, whole, tmp_path):
    """By this process or, if it leaves before, by the same command."""
    run, args = tmp_path / "run", [*tiny, *SHORT]
    process = zygote.start(
        "train", *args, f"run.dir={run}", before=call("sae_train.cli.finish:publish", send(TERM)), plots=False
    )
    assert process.wait() in (0, 75), process.text()
    assert_goes_on(zygote, args, run, whole)
    for name in ("sae.safetensors", "features.safetensors", "metrics.json"):
        assert (run / "saes/main" / name).read_bytes() == (whole / "saes/main" / name).read_bytes(), name
    assert (run / "report.html").stat().st_size > 0


def test_a_long_evaluation_is_left_between_two_batches(zygote, tmp_path):
    """A hundred batches of half a second."""
    run = tmp_path / "run"
    encode = "sae_train.sae.linear:LinearSAE.encode"
    before = call(encode, "time.sleep(0.5)") + call(encode, send(TERM), nth=3)
    args = [*SYNTHETIC, *SHORT, "eval.batch_tokens=2", f"run.dir={run}"]
    began = time.monotonic()
    zygote.run("train", *args, before=before, code=75)
    assert committed(run)[-1] == 10 and time.monotonic() - began < 45


SAVE = "sae_train.checkpoint:Checkpointer.save"


def test_a_signal_during_a_save_commits_that_step_and_the_last_one(zygote, tiny, whole, tmp_path):
    """In the background a save takes its time; it is finished, then the step reached is saved."""
    run, rows, args = tmp_path / "run", tmp_path / "rows", [*tiny, *SHORT]
    before = call(SAVE, send(TERM) + "; time.sleep(0.3)", nth=2)
    zygote.run("train", *args, f"run.dir={run}", before=before, rows=rows, code=75)
    steps = committed(run)
    assert steps[0] == 0 and steps[-1] == len(read_rows(rows)) and len(steps) in (2, 3)
    assert_goes_on(zygote, args, run, whole)


@pytest.mark.parametrize("number", [TERM, INT], ids=["TERM", "INT"])
def test_a_second_signal_ends_the_process_at_once(zygote, tiny, whole, number, tmp_path):
    run, args = tmp_path / "run", [*tiny, *SHORT]
    stuck = call(SAVE, "time.sleep(600)", since=3)
    process = zygote.start("train", *args, f"run.dir={run}", before=stuck + at_step(25, send(number)))
    process.wait_for_step(run, 24)
    time.sleep(1)
    assert process.poll() is None, process.text()
    began = time.monotonic()
    process.send(number)
    assert process.wait() == -number, process.text()
    assert time.monotonic() - began < 2
    assert len(committed(run)) == 2
    assert_goes_on(zygote, args, run, whole)


def test_a_second_signal_does_not_wait_for_a_long_call_of_a_library(zygote):
    """A sum of a hundred seconds, in which Python runs no handler."""
    code = f"""
import os, signal, subprocess
from sae_train.cli.signals import StopSignals
with StopSignals() as signals:
    signals.defer()
    {send(TERM)}
    subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -TERM {{os.getpid()}}"])
    sum(range(10**10))
raise SystemExit(8)
"""
    began = time.monotonic()
    zygote.run(before=code, code=-TERM)
    assert time.monotonic() - began < 20


def test_two_signals_that_come_together_end_the_process(zygote):
    code = f"""
import os, signal, time
from sae_train.cli.signals import StopSignals
with StopSignals() as signals:
    signals.defer()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT])
    {send(TERM)}
    {send(INT)}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM, signal.SIGINT])
    time.sleep(5)
raise SystemExit(8)
"""
    process = zygote.start(before=code)
    assert process.wait() in (-TERM, -INT), process.text()


def test_a_scheduler_may_repeat_its_warning(zygote, tiny, whole, tmp_path):
    run, rows, args = tmp_path / "run", tmp_path / "rows", [*tiny, *SHORT]
    again = send(USR1) + "; time.sleep(0.05)"
    before = at_step(12, again) + call("sae_train.train.trainer:Trainer.save", "; ".join([again] * 3))
    zygote.run("train", *args, f"run.dir={run}", before=before, rows=rows, code=75)
    assert len(read_rows(rows)) == committed(run)[-1] == 12
    assert_goes_on(zygote, args, run, whole)


def test_a_wait_is_ended_by_a_signal_at_any_moment_of_it(zygote):
    """Thousands of signals to a thread that begins and ends waits: none may find it unable to take notice."""
    code = """
import signal, time
from sae_train import stop
signal.signal(signal.SIGALRM, lambda number, frame: stop.request("asked"))
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.0005)
heard, end = 0, time.monotonic() + 2
while time.monotonic() < end:
    stop.clear()
    try:
        stop.sleep(0.001)
    except stop.Interrupted:
        heard += 1
signal.setitimer(signal.ITIMER_REAL, 0)
raise SystemExit(7 if heard > 100 else 8)
"""
    zygote.run(before=code, code=7, timeout_s=60)


def test_a_wait_is_left_soon_after_a_signal(zygote):
    code = f"""
import threading, time, os, signal
from sae_train import stop
from sae_train.cli.signals import StopSignals
with StopSignals() as signals:
    signals.defer()
    threading.Timer(0.2, lambda: {send(TERM)}).start()
    began = time.monotonic()
    try:
        stop.sleep(60)
    except stop.Interrupted:
        raise SystemExit(7 if time.monotonic() - began < 20 else 8)
"""
    zygote.run(before=code, code=7)


def test_a_sweep_that_is_asked_to_stop_does_not_go_on_with_its_next_job(zygote, tmp_path):
    jobs = [
        "-m",
        *SYNTHETIC,
        *SHORT,
        "run.seed=1,2",
        f"run.dir={tmp_path}/${{run.seed}}",
        f"hydra.sweep.dir={tmp_path / 'sweep'}",
    ]
    text = zygote.run("train", *jobs, before=at_step(7, send(TERM)), code=75)
    assert "saved at step 7" in text and "Traceback" not in text
    assert committed(tmp_path / "1")[-1] == 7 and not (tmp_path / "2").exists()
    zygote.run("train", *jobs, plots=False)
    assert committed(tmp_path / "1")[-1] == committed(tmp_path / "2")[-1] == 40


HARVEST = ["train.tokens=1280", "model.micro_batch=2"]
"""Some six shards."""
KILL = send(signal.SIGKILL)
TENSORS = "sae_train.shards.disk:write_tensors"
IN_A_WRITE = {
    "before the rows": call(TENSORS, KILL, nth=4),
    "after the rows": call(TENSORS, KILL, nth=4, after=True),
    "with half of them": call(
        TENSORS, "path = args[0]; os.truncate(path, path.stat().st_size // 2); " + KILL, nth=4, after=True
    ),
    "before a rename": call("os:rename", KILL, nth=4),
    "after a rename": call("os:rename", KILL, nth=4, after=True),
    "flushing": call("os:fsync", KILL, nth=17),
}


@pytest.fixture(scope="module")
def harvested(zygote, tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("harvested") / "shards"
    zygote.run("harvest", *tiny, *HARVEST, f"out={out}")
    tree = whole_tree(out)
    assert len([name for name in tree if name.endswith("rows.safetensors")]) > 4
    return tree


AT_A_CALL = ("before a rename", "after a rename", "flushing")
"""Slow, as test_commit.py has a harvest killed at each of these calls by default."""


@pytest.mark.parametrize(
    "where",
    [pytest.param(where, marks=pytest.mark.slow if where in AT_A_CALL else ()) for where in IN_A_WRITE],
)
def test_a_harvest_killed_in_a_write_has_a_shard_whole_or_not_at_all(
    zygote, tiny, harvested, where, tmp_path
):
    out = tmp_path / "shards"
    zygote.run("harvest", *tiny, *HARVEST, f"out={out}", before=IN_A_WRITE[where], code=-signal.SIGKILL)
    for shard in out.rglob("shard-????????"):
        verify(shard, "shard")
    zygote.run("harvest", *tiny, *HARVEST, f"out={out}")
    assert whole_tree(out) == harvested


@pytest.mark.parametrize(  # all three are heard alike, as the test of a step shows
    "number",
    [TERM, pytest.param(USR1, marks=pytest.mark.slow), pytest.param(INT, marks=pytest.mark.slow)],
    ids=["TERM", "USR1", "INT"],
)
def test_a_harvest_asked_to_stop_keeps_its_whole_shards_and_goes_on(
    zygote, tiny, harvested, number, tmp_path
):
    out = tmp_path / "shards"
    forward = "sae_train.harvest.harvester:Harvester._forward"
    nth = random.Random(int(number)).randint(18, 40)
    text = zygote.run(
        "harvest", *tiny, *HARVEST, f"out={out}", before=call(forward, send(number), nth=nth), code=75
    )
    assert "shards are written; the same command continues" in text and "Traceback" not in text
    for shard in out.rglob("shard-????????"):
        verify(shard, "shard")
    zygote.run("harvest", *tiny, *HARVEST, f"out={out}")
    assert whole_tree(out) == harvested


def test_a_harvest_asked_to_stop_while_it_takes_stock_leaves_at_once(zygote, tiny, harvested, tmp_path):
    out = tmp_path / "shards"
    zygote.run("harvest", *tiny, *HARVEST, f"out={out}")
    check = call("sae_train.shards.disk:_verified", "time.sleep(0.2)") + call(
        "sae_train.shards.disk:_verified", send(TERM), nth=3
    )
    text = zygote.run("harvest", *tiny, *HARVEST, f"out={out}", before=check, code=75)
    assert "before the next step" in text
    assert whole_tree(out) == harvested
