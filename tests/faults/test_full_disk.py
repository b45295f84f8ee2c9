"""Run folders on file systems that fill up, are read-only or vanish: the older step stays, all is told."""

import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faults.disk_tools import (
    HARVEST,
    SAVING,
    WAIT,
    Gate,
    Space,
    fill,
    leftovers,
    one_line,
    wait_until,
    whole_steps,
)
from faults.tools import differences, final_state

from sae_train.log import read_metrics

SAVE = "sae_train.checkpoint:committed_folder"


def train(run: Path, *more: str) -> list[str]:
    return ["train", *SAVING, f"run.dir={run}", *more]


@pytest.fixture(scope="module")
def reference(zygote, tmp_path_factory):
    """A run of 40 steps that met no fault."""
    run = tmp_path_factory.mktemp("reference") / "run"
    zygote.run(*train(run), plots=False)
    return run


@pytest.fixture
def small(tmp_path):
    """A file system of 4 MiB at tmp_path / "disk", in a namespace of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    with Space(f"mount -t tmpfs -o size=4m tmpfs {disk}") as space:
        yield space, disk


def test_a_disk_that_fills_up_ends_the_run_after_three_tries_and_room_continues_it(
    zygote, reference, small, tmp_path
):
    space, disk = small
    gate = Gate(tmp_path / "gate", SAVE, 3)
    process = zygote.start(*train(disk / "run"), before=space.before + WAIT + gate.before, plots=False)
    gate.reached(3, process)
    before, filler = whole_steps(space.path(disk / "run")), fill(space.path(disk), leave_bytes=20_000)
    gate.open(3)
    assert process.wait() == 75, process.text()
    assert "try 1 of 3" in process.text() and "No space left on device" in one_line(process.text())
    assert "make room, and the same command continues" in one_line(process.text())
    assert read_metrics(space.path(disk / "run"))[-1]["step"] < 14, "not trained on without a net"
    assert whole_steps(space.path(disk / "run")) == before
    assert leftovers(space.path(disk / "run")) == []
    filler.unlink()
    text = zygote.run(*train(disk / "run"), before=space.before, plots=False)
    assert f"from step {before[-1]} of 40" in text
    assert differences(final_state(space.path(disk / "run")), final_state(reference)) == []


def test_a_disk_that_has_room_again_after_two_tries_does_not_end_the_run(zygote, reference, small, tmp_path):
    space, disk = small
    gate = Gate(tmp_path / "gate", SAVE, 3, 5)
    process = zygote.start(*train(disk / "run"), before=space.before + WAIT + gate.before, plots=False)
    gate.reached(3, process)
    filler = fill(space.path(disk), leave_bytes=20_000)
    gate.open(3)
    gate.reached(5, process)
    filler.unlink()
    gate.open(5)
    assert process.wait() == 0, process.text()
    assert "try 2 of 3" in process.text() and "try 3" not in process.text()
    assert differences(final_state(space.path(disk / "run")), final_state(reference)) == []


def test_a_disk_that_is_full_at_the_start_is_told_before_anything_is_trained(zygote, small):
    space, disk = small
    fill(space.path(disk))
    started = time.monotonic()
    text = zygote.run(*train(disk / "run"), code=2, before=space.before)
    assert "No space left on device" in one_line(text) and "run.dir" in one_line(text)
    assert time.monotonic() - started < 60


def test_a_disk_with_room_for_the_record_and_no_checkpoint_is_found_out_at_the_first_step(zygote, small):
    space, disk = small
    fill(space.path(disk), leave_bytes=60_000)
    text = zygote.run(*train(disk / "run", "train.tokens=64000"), code=75, before=space.before, plots=False)
    assert "step 0 could not be saved" in text
    assert all(r["step"] < 40 for r in read_metrics(space.path(disk / "run")))
    assert whole_steps(space.path(disk / "run")) == []


def test_a_full_disk_under_the_logs_is_told_once_and_training_goes_on(zygote, tmp_path):
    """checkpoints/ is on a disk with room, metrics.jsonl and train.log are on a full one."""
    disk, room = tmp_path / "disk", tmp_path / "room"
    room.mkdir()
    disk.mkdir()
    run = disk / "run"
    mounts = (
        f"mount -t tmpfs -o size=1m tmpfs {disk}",
        f"mkdir -p {run}/checkpoints",
        f"mount --bind {room} {run}/checkpoints",
    )
    with Space(*mounts) as space:
        gate = Gate(tmp_path / "gate", SAVE, 2, 12)
        process = zygote.start(
            *train(run, "train.tokens=9600"), before=space.before + WAIT + gate.before, plots=False
        )
        gate.reached(2, process)
        filler = fill(space.path(disk))
        gate.open(2)
        gate.reached(12, process)
        filler.unlink()
        gate.open(12)
        assert process.wait() == 0, process.text()
        assert process.text().count("cannot write metrics.jsonl") == 1
        assert process.text().count("Traceback") == 0
        assert "were lost" in process.text()
        steps = [record["step"] for record in read_metrics(space.path(run))]
        assert steps == sorted(steps) and steps[0] == 2 and steps[-1] == 300 and len(steps) < 151
        assert whole_steps(space.path(run))[-1] == 300


def test_a_disk_that_is_full_when_the_run_ends_is_told_in_one_line_and_room_finishes_it(
    zygote, small, tmp_path
):
    """The checkpoints are there; what is missing is the publishable folder and the report."""
    space, disk = small
    gate = Gate(tmp_path / "gate", "sae_train.cli.finish:save_sae", 1)
    process = zygote.start(*train(disk / "run"), before=space.before + gate.before, plots=False)
    gate.reached(1, process)
    filler = fill(space.path(disk))
    gate.open(1)
    assert process.wait() == 75, process.text()
    assert "No space left on device" in one_line(process.text())
    filler.unlink()
    zygote.run(*train(disk / "run"), before=space.before)
    assert space.path(disk / "run" / "report.html").is_file()


def test_a_harvest_onto_a_disk_that_fills_up_stops_and_continues_with_the_same_bytes(zygote, small, tmp_path):
    space, disk = small
    args = ["harvest", *HARVEST]
    gate = Gate(tmp_path / "gate", "sae_train.shards.disk:committed_folder", 3)
    process = zygote.start(*args, f"out={disk / 'out'}", before=space.before + gate.before)
    gate.reached(3, process)
    filler = fill(space.path(disk), leave_bytes=8_000)
    gate.open(3)
    assert process.wait() == 75, process.text()
    assert "shard 1 could not be written" in one_line(process.text()) and "make room" in one_line(
        process.text()
    )
    out = space.path(disk / "out")
    assert [p.name for p in sorted(out.glob("shard-*"))] == ["shard-00000000"] and leftovers(out) == []
    filler.unlink()
    zygote.run(*args, f"out={disk / 'out'}", before=space.before)
    zygote.run(*args, f"out={tmp_path / 'whole'}")

    def rows(folder):
        return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("rows.safetensors")}

    assert rows(out) == rows(tmp_path / "whole")


def test_a_limit_on_the_size_of_files_ends_the_run_like_a_full_disk(zygote, reference, tmp_path):
    run, gate = tmp_path / "run", Gate(tmp_path / "gate", SAVE, 3)
    process = zygote.start(*train(run), before=WAIT + gate.before, plots=False)
    gate.reached(3, process)
    before = whole_steps(run)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (30_000, 30_000))
    gate.open(3)
    assert process.wait() == 75, process.text()
    assert "File too large" in one_line(process.text())
    assert read_metrics(run)[-1]["step"] < 14, "not trained on without a net"
    assert whole_steps(run) == before and leftovers(run) == []
    zygote.run(*train(run), plots=False)
    assert differences(final_state(run), final_state(reference)) == []


@pytest.mark.timeout(400)  # two whole processes, on a machine that may do much else
def test_messages_that_nobody_can_write_down_do_not_end_a_run(tmp_path):
    """In processes of their own to the very end, where Python writes out what it still has to say."""
    command = [sys.executable, "-m", "sae_train", *train(tmp_path / "run", "train.tokens=320")]
    with open("/dev/full", "w") as full:  # as a log on a disk without room
        done = subprocess.run(command, stderr=full, timeout=180)
        wrong = subprocess.run([*command, "train.batch_tokens=0"], stderr=full, timeout=180)
    assert (done.returncode, wrong.returncode) == (0, 2)
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize("there", [False, True], ids=["new", "continued"])
def test_a_read_only_run_folder_is_refused_in_one_line(zygote, tmp_path, there):
    home = tmp_path / "home"
    home.mkdir()
    if there:
        zygote.run(*train(home / "run", "train.tokens=320"), plots=False)
    before = sorted(home.rglob("*"))
    with Space(f"mount --bind {home} {home}", f"mount -o remount,ro,bind {home}") as space:
        started = time.monotonic()
        text = zygote.run(*train(home / "run"), code=2, before=space.before)
    assert "Read-only file system" in one_line(text) and "run.dir" in one_line(text)
    assert time.monotonic() - started < 60
    assert sorted(home.rglob("*")) == before


def test_a_run_folder_of_another_user_is_refused_in_one_line(zygote, tmp_path_factory):
    import shutil
    import tempfile

    home = Path(tempfile.mkdtemp())  # pytest's own folders let no other user in
    try:
        home.chmod(0o755)
        nobody = "import os; os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        text = zygote.run(*train(home / "run"), code=2, before=nobody)
        assert "Permission denied" in one_line(text) and "run.dir" in one_line(text)
        assert list(home.iterdir()) == []
    finally:
        shutil.rmtree(home)


def test_a_run_folder_that_is_moved_away_stops_the_run_at_the_next_save(zygote, reference, tmp_path):
    run, moved, gate = tmp_path / "run", tmp_path / "moved", Gate(tmp_path / "gate", SAVE, 3)
    process = zygote.start(*train(run), before=WAIT + gate.before, plots=False)
    gate.reached(3, process)
    run.rename(moved)
    gate.open(3)
    assert process.wait() == 75, process.text()
    assert f"{run} is gone" in one_line(process.text())
    assert not run.exists(), "no new folder is made under the old name"
    assert len(whole_steps(moved)) == 2
    zygote.run(*train(moved), plots=False)
    assert differences(final_state(moved), final_state(reference)) == []


def test_a_full_dev_shm_is_no_matter(zygote, reference, tmp_path):
    with Space("mount -t tmpfs -o size=1m tmpfs /dev/shm") as space:
        fill(space.path(Path("/dev/shm")))
        zygote.run(*train(tmp_path / "run"), before=space.before, plots=False)
    assert differences(final_state(tmp_path / "run"), final_state(reference)) == []


def test_checkpoints_never_take_more_than_one_save_above_what_is_kept(zygote, tmp_path):
    run = tmp_path / "run"
    process = zygote.start(*train(run, "train.tokens=6400", "checkpoint.keep=2"), plots=False)
    most, samples = 0, 0
    wait_until((run / "checkpoints").is_dir, "the first checkpoint", process)
    while process.poll() is None:
        # du reads each folder at its own moment: a step renamed meanwhile would count twice, so only
        # a listing that is the same before and after counts.
        names = sorted(p.name for p in (run / "checkpoints").iterdir())
        found = subprocess.run(["du", "-sb", run / "checkpoints"], capture_output=True, text=True)
        if found.returncode == 0 and names == sorted(p.name for p in (run / "checkpoints").iterdir()):
            most, samples = max(most, int(found.stdout.split()[0])), samples + 1
        time.sleep(0.001)
    assert process.wait() == 0, process.text()
    last = run / "checkpoints" / f"step-{whole_steps(run)[-1]:08d}"
    size = 4096 + sum(path.stat().st_size for path in last.iterdir())
    assert samples > 10 and most <= (2 + 1) * size + 8192, (samples, most, size)
    assert len(whole_steps(run)) == 2
    print(f"at most {most} bytes in {samples} samples; one checkpoint is {size}")


def test_a_stop_onto_a_full_disk_leaves_the_older_step_and_says_so(zygote, small, tmp_path):
    space, disk = small
    gate = Gate(tmp_path / "gate", SAVE, 3)
    process = zygote.start(*train(disk / "run"), before=space.before + WAIT + gate.before, plots=False)
    gate.reached(3, process)
    before = whole_steps(space.path(disk / "run"))
    fill(space.path(disk), leave_bytes=20_000)
    process.send(signal.SIGTERM)
    gate.open(3)
    assert process.wait() == 75, process.text()
    assert "could not be saved in 3 tries" in one_line(process.text()) and "SIGTERM" in process.text()
    assert whole_steps(space.path(disk / "run")) == before
