"""Checkpoints and shards that were damaged, mixed or meddled with: found, named, never trained on."""

import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from faults.disk_tools import HARVEST, SAVING, WAIT, Gate, one_line, whole_steps
from faults.tools import differences, final_state

from sae_train.checkpoint import Checkpointer
from sae_train.files import MANIFEST

FILES = ("state.safetensors", "state.json", MANIFEST)


def train(run: Path, *more: str) -> list[str]:
    return ["train", *SAVING, f"run.dir={run}", *more]


@pytest.fixture(scope="module")
def reference(zygote, tmp_path_factory):
    """A run of 40 steps that met no fault."""
    run = tmp_path_factory.mktemp("reference") / "run"
    zygote.run(*train(run), plots=False)
    return run


@pytest.fixture(scope="module")
def stopped(zygote, tmp_path_factory):
    """A run that was killed at step 12 or later of 40: to be copied, and broken."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    gate = Gate(run.parent / "gate", "sae_train.checkpoint:committed_folder", 5)
    process = zygote.start(*train(run, "checkpoint.keep=3"), before=WAIT + gate.before, plots=False)
    gate.reached(5, process)
    process.send(9)
    process.wait()
    assert len(whole_steps(run)) == 3
    return run


@pytest.fixture
def run(stopped, tmp_path):
    return shutil.copytree(stopped, tmp_path / "run", symlinks=True)


def newest(run: Path, back: int = 1) -> Path:
    return run / "checkpoints" / f"step-{Checkpointer.steps(run / 'checkpoints')[-back]:08d}"


def flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def truncate(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size))


def zero_tail(path: Path, rng: random.Random) -> None:
    size = path.stat().st_size
    os.truncate(path, size - rng.randrange(8, size // 2))
    os.truncate(path, size)


@pytest.mark.parametrize(("damage", "times"), [(flip, 200), (truncate, 50), (zero_tail, 20)])
def test_every_damage_of_the_newest_checkpoint_falls_back_one_step_and_names_the_file(
    run, caplog, damage, times
):
    rng = random.Random(0)
    found, older = 0, Checkpointer.steps(run / "checkpoints")[-2]
    for i in range(times):
        path = newest(run) / FILES[i % len(FILES)]
        good = path.read_bytes()
        damage(path, rng)
        if path.read_bytes() == good:
            continue
        caplog.clear()
        loaded = Checkpointer(run / "checkpoints").load()
        assert loaded is not None and loaded[0] == older, (i, path)
        assert newest(run).name in caplog.text and path.name in caplog.text, caplog.text
        path.write_bytes(good)
        found += 1
    assert found >= times - 1
    print(f"{found} of {found} found ({damage.__name__})")


def mixed(run: Path) -> None:
    shutil.copy(newest(run, 2) / "state.safetensors", newest(run))


def swapped(run: Path) -> None:
    a, b = newest(run), newest(run, 2)
    a.rename(run / "x")
    b.rename(a)
    (run / "x").rename(b)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "flip": lambda run: flip(newest(run) / "state.safetensors", random.Random(1)),
    "mixed": mixed,
    "garbage manifest": lambda run: (newest(run) / MANIFEST).write_bytes(b"\x00" * 100),
    "no manifest": lambda run: (newest(run) / MANIFEST).unlink(),
    "empty": lambda run: [path.unlink() for path in newest(run).iterdir()],
    "extra": lambda run: (newest(run) / "core").write_bytes(b"x"),
    "missing": lambda run: (newest(run) / "state.json").unlink(),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_run_whose_newest_checkpoint_is_damaged_continues_from_the_one_before(zygote, reference, run, how):
    broken, older = newest(run), newest(run, 2)
    DAMAGE[how](run)
    text = zygote.run(*train(run), plots=False)
    assert f"skipping damaged checkpoint {broken}" in text
    assert f"from step {int(older.name[5:])} of 40" in text
    assert differences(final_state(run), final_state(reference)) == []
    kept = list(run.glob(f"checkpoints/{broken.name}.damaged-*"))
    assert len(kept) == 1, "set aside, not deleted: it may be all that somebody has"


def test_two_checkpoints_under_each_other_s_names_are_both_refused(zygote, reference, run):
    third = newest(run, 3)
    swapped(run)
    text = zygote.run(*train(run), plots=False)
    assert f"from step {int(third.name[5:])} of 40" in text
    assert differences(final_state(run), final_state(reference)) == []


def test_a_run_all_of_whose_checkpoints_are_bad_is_refused_and_nothing_is_touched(zygote, run):
    for step in Checkpointer.steps(run / "checkpoints"):
        flip(run / "checkpoints" / f"step-{step:08d}" / "state.safetensors", random.Random(step))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    text = zygote.run(*train(run), code=2)
    assert "all 3 are damaged" in one_line(text)
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != ".lock"} == before


def test_a_run_whose_checkpoints_are_gone_is_refused_and_never_started_anew(zygote, run):
    shutil.rmtree(run / "checkpoints")
    metrics = (run / "metrics.jsonl").read_bytes()
    text = zygote.run(*train(run), code=2)
    assert "they are gone" in one_line(text)
    assert (run / "metrics.jsonl").read_bytes() == metrics


def test_a_checkpoint_of_a_newer_release_is_refused_naming_both_versions(zygote, run):
    manifest = newest(run) / MANIFEST
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 2'))
    text = zygote.run(*train(run), code=2)
    assert "format version 2" in one_line(text) and "up to 1" in one_line(text)


def test_names_that_are_no_checkpoints_are_ignored_and_never_deleted(zygote, reference, run):
    folder = run / "checkpoints"
    (folder / "latest").symlink_to(folder / "step-99999999")
    (folder / "step-00000100").symlink_to(newest(run, 2))
    (folder / "step-00000200").write_text("a file")
    for name in ("step-100.bak", "step-00x", "step-101", "notes"):
        shutil.copytree(newest(run), folder / name)
    foreign = {p.name for p in folder.iterdir()} - {f"step-{s:08d}" for s in Checkpointer.steps(folder)}
    assert len(foreign) == 7
    zygote.run(*train(run), plots=False)
    assert foreign <= {path.name for path in folder.iterdir()}
    assert differences(final_state(run), final_state(reference)) == []


def test_retention_never_deletes_the_last_good_step_behind_three_broken_ones(zygote, run):
    folder = run / "checkpoints"
    good, second, third = Checkpointer.steps(folder)
    shutil.copytree(folder / f"step-{good:08d}", folder / f"step-{good + 3:08d}")
    for old, new in ((third, good + 2), (second, good + 1)):
        (folder / f"step-{old:08d}").rename(folder / f"step-{new:08d}")
    zygote.run(*train(run, "checkpoint.keep=2", "checkpoint.every=40"), plots=False)
    assert Checkpointer.steps(folder) == [good, good + 1, good + 2, good + 3, 40]
    loaded = Checkpointer(folder).load(folder / f"step-{good:08d}")
    assert loaded is not None and loaded[0] == good


def test_the_order_of_checkpoints_is_that_of_their_steps_whatever_the_clock_said(zygote, reference, run):
    """As after a clock that was set back by a day, and ahead by one."""
    now = time.time()
    for i, step in enumerate(Checkpointer.steps(run / "checkpoints")):
        folder = run / "checkpoints" / f"step-{step:08d}"
        for path in (*folder.iterdir(), folder):
            os.utime(path, (now + 86_400 * (1 - i), now + 86_400 * (1 - i)))
    text = zygote.run(*train(run), plots=False)
    assert f"from step {step} of 40" in text
    assert differences(final_state(run), final_state(reference)) == []


POISON = """
import sae_train.train.trainer as t
gather = t.Trainer._gather
def poisoned(self, state):
    if state.step >= 12:
        next(state.members[0].sae.parameters()).data.view(-1)[3] = float("nan")
    return gather(self, state)
t.Trainer._gather = poisoned
"""


def test_weights_that_are_not_finite_are_never_committed_and_end_the_run(zygote, tmp_path):
    run = tmp_path / "run"
    text = zygote.run(*train(run), code=3, before=WAIT + POISON, plots=False)
    assert "step 12 is not saved" in one_line(text) and "NaN or infinity" in one_line(text)
    assert whole_steps(run) == [4, 8]


@pytest.fixture(scope="module")
def harvested(zygote, tmp_path_factory):
    """A harvest of six shards."""
    out = tmp_path_factory.mktemp("harvest") / "out"
    zygote.run("harvest", *HARVEST, f"out={out}")
    return out


def from_shards(folder: Path) -> list[str]:
    args = [a for a in SAVING if not a.startswith(("source", "hook", "train.tokens"))]
    return ["train", *args, "source=shards", f"source.path={folder}", "hook=auto", "train.tokens=1280"]


@pytest.fixture(scope="module")
def on_good_shards(zygote, harvested, tmp_path_factory):
    run = tmp_path_factory.mktemp("good") / "run"
    zygote.run(*from_shards(harvested), f"run.dir={run}", plots=False)
    return run


@pytest.mark.parametrize("how", ["flip", "swap", "zero tail", "torn"])
def test_a_damaged_shard_stops_the_run_by_name_and_is_remade_by_the_harvest_alone(
    zygote, harvested, on_good_shards, tmp_path, how
):
    out = shutil.copytree(harvested, tmp_path / "out")
    args = from_shards(out)
    bad, rows = out / "shard-00000002", out / "shard-00000002" / "rows.safetensors"
    match how:
        case "flip":
            flip(rows, random.Random(3))
        case "swap":
            shutil.copy(out / "shard-00000001" / "rows.safetensors", rows)
        case "zero tail":
            zero_tail(rows, random.Random(4))
        case "torn":
            (bad / MANIFEST).unlink()
    text = zygote.run(*args, f"run.dir={tmp_path / 'b'}", code=2, plots=False)
    assert str(bad) in one_line(text) and "run the same harvest command again" in one_line(text)
    stopped_at = whole_steps(tmp_path / "b")[-1]
    assert stopped_at > 0, "what was trained before it is saved"
    kept = {path: path.stat().st_ino for path in out.rglob("rows.safetensors") if path.parent != bad}
    text = zygote.run("harvest", *HARVEST, f"out={out}")
    assert f"removing damaged shard {bad}" in text
    assert {path: path.stat().st_ino for path in kept} == kept, "only the damaged one is written"
    assert rows.read_bytes() == (harvested / "shard-00000002" / "rows.safetensors").read_bytes()
    text = zygote.run(*args, f"run.dir={tmp_path / 'b'}", plots=False)
    assert f"from step {stopped_at} of 40" in text
    assert differences(final_state(tmp_path / "b"), final_state(on_good_shards)) == []
