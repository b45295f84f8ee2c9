"""The commit protocol under faults of single system calls: kills, errors, delays at every fsync and rename.

Whole commands run; strace sits on the one thread that saves. A fault hits the k-th call of that save, for
every k.
"""

import re
import signal
import time
from pathlib import Path

import pytest
from faults.disk_tools import (
    HARVEST,
    SAVING,
    WAIT,
    Gate,
    leftovers,
    needs_strace,
    strace,
    wait_until,
    whole_steps,
)
from faults.tools import differences, final_state

from sae_train.log import read_metrics

SAVE = "sae_train.checkpoint:committed_folder"
SHARD = "sae_train.shards.disk:committed_folder"
RECORD = "sae_train.train.record:write_json"
CALLS = ("fsync", "rename", "renameat")
ALL_CALLS = (*CALLS, "write", "ftruncate", "openat", "mkdir", "chmod", "unlink", "unlinkat", "rmdir")


def calls_in(log: Path, last: str = "") -> dict[str, int]:
    """How often each system call is in strace's log, up to the first fsync after the line of `last`."""
    lines = log.read_text().splitlines()
    if last:
        at = next(i for i, line in enumerate(lines) if re.search(last, line))
        end = next(i for i in range(at, len(lines)) if lines[i].startswith("fsync"))
        lines = lines[: end + 1]
    names = [line.split("(", 1)[0] for line in lines if "(" in line]
    return {name: names.count(name) for name in dict.fromkeys(names)}


@pytest.fixture(scope="module")
def reference(zygote, tmp_path_factory):
    """Run, without any fault, with so many tokens; made once for each number."""
    made: dict[int, Path] = {}

    def run(tokens: int) -> Path:
        if tokens not in made:
            made[tokens] = tmp_path_factory.mktemp("reference") / "run"
            args = [*SAVING, f"train.tokens={tokens}", f"run.dir={made[tokens]}"]
            zygote.run("train", *args, plots=False)
        return made[tokens]

    return run


def kill_every_save(zygote, reference, tmp_path, calls) -> int:
    """One run, killed at each point of one save after another and continued each time; how many points."""
    run, tokens = tmp_path / "run", 32 * 200
    args = ["train", *SAVING, f"run.dir={run}"]
    # A save that also retires an old step, watched from its first to its last system call.
    gate, log = Gate(tmp_path / "count", SAVE, 4), tmp_path / "strace"
    process = zygote.start(*args, f"train.tokens={tokens}", before=WAIT + gate.before, plots=False)
    with strace(gate.reached(4, process), "-o", str(log)) as tracer:
        gate.open(4)
        wait_until(lambda: tracer.poll() is not None, "the save's thread has ended")
    process.send(signal.SIGKILL)
    process.wait()
    counts = {syscall: n for syscall, n in calls_in(log).items() if syscall in calls}
    points = [(syscall, k) for syscall, n in counts.items() for k in range(1, n + 1)]
    newest = whole_steps(run)[-1]
    for i, (syscall, k) in enumerate(points):
        gate = Gate(tmp_path / f"gate-{i}", SAVE, 1)
        process = zygote.start(*args, f"train.tokens={tokens}", before=WAIT + gate.before, plots=False)
        with strace(
            gate.reached(1, process), "-e", f"trace={syscall}", "-e", f"inject={syscall}:signal=KILL:when={k}"
        ):
            gate.open(1)
            assert process.wait() == -9, (syscall, k, process.text())
        steps = whole_steps(run)
        assert f"from step {newest} of" in process.text(), (syscall, k, newest, process.text())
        assert len(steps) >= 2 and steps[-1] >= newest, (syscall, k, steps, newest)
        newest = steps[-1]
    zygote.run(*args, f"train.tokens={tokens}", plots=False)
    assert differences(final_state(run), final_state(reference(tokens))) == []
    steps = [record["step"] for record in read_metrics(run)]
    assert steps == [record["step"] for record in read_metrics(reference(tokens))], "each step once"
    assert leftovers(run / "checkpoints") == []
    print(f"{len(points)} points of a save: {counts}")
    return len(points)


def test_a_run_killed_at_every_fsync_and_rename_of_a_save_ends_with_the_same_bits(
    zygote, reference, tmp_path
):
    needs_strace()
    assert kill_every_save(zygote, reference, tmp_path, CALLS) >= 15


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_killed_at_any_call_of_a_save_that_changes_the_disk_ends_with_the_same_bits(
    zygote, reference, tmp_path
):
    needs_strace()
    assert kill_every_save(zygote, reference, tmp_path, ALL_CALLS) >= 30


def test_a_run_killed_while_it_writes_its_record_ends_with_the_same_bits(zygote, reference, tmp_path):
    """run.json is written when a run starts and when it ends; the start is at step 0 and later."""
    needs_strace()
    run, points = tmp_path / "run", [("fsync", 1), ("rename", 1), ("fsync", 2)]
    for i, (syscall, k) in enumerate([*points * 2, *points]):
        at_end = i >= 2 * len(points)
        gate = Gate(tmp_path / f"gate-{i}", RECORD, 2 if at_end else 1)
        args = ["train", *SAVING, f"run.dir={run}"]
        process = zygote.start(*args, before=gate.before, plots=False)
        thread = gate.reached(2 if at_end else 1, process)
        with strace(thread, "-e", f"trace={syscall}", "-e", f"inject={syscall}:signal=KILL:when={k}"):
            gate.open(2 if at_end else 1)
            assert process.wait() == -9, (syscall, k, process.text())
        whole_steps(run)
    text = zygote.run(*args, plots=False)
    assert "is finished (40 steps)" in text, "killed after the rename: it is done"
    assert differences(final_state(run), final_state(reference(1280))) == []


def files_of(harvest: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(harvest)): path.read_bytes()
        for path in sorted(harvest.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def test_a_harvest_killed_at_every_fsync_and_rename_of_a_shard_ends_with_the_same_bytes(zygote, tmp_path):
    needs_strace()
    args = ["harvest", *HARVEST]
    zygote.run(*args, f"out={tmp_path / 'whole'}")
    assert len(list((tmp_path / "whole").glob("shard-*"))) >= 6
    out, log, gate = tmp_path / "killed", tmp_path / "strace", Gate(tmp_path / "count", SHARD, 2)
    process = zygote.start(*args, f"out={out}", before=gate.before)
    with strace(gate.reached(2, process), "-o", str(log), "-e", f"trace={','.join(CALLS)}"):
        gate.open(2)
        wait_until((out / "shard-00000001").exists, "the next shard is there", process)
        process.send(signal.SIGKILL)
        process.wait()
    counts = calls_in(log, r'rename\(.*shard-00000000"\)')
    points = [(syscall, k) for syscall in CALLS for k in range(1, counts.get(syscall, 0) + 1)]
    for i, (syscall, k) in enumerate(points):
        gate = Gate(tmp_path / f"gate-{i}", SHARD, 1)
        process = zygote.start(*args, f"out={out}", before=gate.before)
        with strace(
            gate.reached(1, process), "-e", f"trace={syscall}", "-e", f"inject={syscall}:signal=KILL:when={k}"
        ):
            gate.open(1)
            assert process.wait() == -9, (syscall, k, process.text())
    zygote.run(*args, f"out={out}")
    assert files_of(out) == files_of(tmp_path / "whole")
    print(f"{len(points)} points of a shard's commit: {counts}")
    assert len(points) >= 10


def test_an_io_error_at_any_fsync_fails_that_save_loudly_and_the_next_one_succeeds(
    zygote, reference, tmp_path
):
    """Every second save meets EIO at its next fsync: the next try saves."""
    needs_strace()
    run, tokens, failing = tmp_path / "run", 32 * 100, range(2, 2 + 2 * 9, 2)
    gate = Gate(tmp_path / "gate", SAVE, *failing)
    args = ["train", *SAVING, f"train.tokens={tokens}", f"run.dir={run}"]
    process = zygote.start(*args, before=WAIT + gate.before, plots=False)
    for k, number in enumerate(failing, 1):
        thread = gate.reached(number, process)
        inject = f"inject=fsync:error=EIO:when={k}"
        with strace(thread, "-o", str(tmp_path / f"{k}"), "-e", "trace=fsync", "-e", inject) as tracer:
            before = whole_steps(run)
            gate.open(number)
            wait_until(lambda tracer=tracer: tracer.poll() is not None, "the failed save is over")
        assert "INJECTED" in (tmp_path / f"{k}").read_text(), k
        assert before[-1] in whole_steps(run)
    assert process.wait() == 0, process.text()
    assert process.text().count("could not be saved ([Errno 5] Input/output error") == len(failing)
    assert "try 2 of 3" not in process.text()
    assert differences(final_state(run), final_state(reference(tokens))) == []
    assert leftovers(run) == []


def test_training_goes_on_while_a_slow_disk_takes_its_time_and_one_save_is_under_way_at_once(
    zygote, reference, tmp_path
):
    needs_strace()
    run, gate = tmp_path / "run", Gate(tmp_path / "gate", SAVE, 3, 5)
    args = ["train", *SAVING, f"run.dir={run}", "train.tokens=64000"]
    process = zygote.start(*args, before=gate.before, plots=False)
    slow = ("-e", "trace=fsync", "-e", "inject=fsync:delay_enter=400000")  # 9 times 0.4 s
    with strace(gate.reached(3, process), *slow) as tracer:
        gate.open(3)
        saved, trained = whole_steps(run)[-1], read_metrics(run)[-1]["step"]
        while tracer.poll() is None:
            assert len(list((run / "checkpoints").glob(".tmp-step-*"))) <= 1, "two saves at once"
            time.sleep(0.01)
    assert read_metrics(run)[-1]["step"] > max(trained, saved + 4) + 4, "more than a whole interval meanwhile"
    with strace(gate.reached(5, process), *slow):
        gate.open(5)
        process.send(signal.SIGTERM)
        assert process.wait() == 75, process.text()
    assert f"saved at step {whole_steps(run)[-1]}" in process.text()
    assert leftovers(run) == []
