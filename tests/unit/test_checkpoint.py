"""Checkpoints: committed whole, verified before use, never overwritten, retired one by one."""

import json
import logging
import math
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from sae_train.checkpoint import CheckpointConfig, Checkpointer
from sae_train.errors import InputError, NumericsError
from sae_train.files import MANIFEST, committed_folder, write_json


def make_state(step: int) -> dict:
    generator = torch.Generator().manual_seed(step)
    return {
        "weights": {"w_dec": torch.randn(16, 8, generator=generator), "b": torch.zeros(8)},
        "step": step,
        "rng": torch.randint(0, 255, (32,), dtype=torch.uint8, generator=generator),
    }


def save_steps(folder: Path, steps: list[int], keep: int = 10) -> Checkpointer:
    saver = Checkpointer(folder, keep)
    for step in steps:
        saver.save(step, make_state(step), {})
    return saver


def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return isinstance(b, list) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def test_a_state_comes_back_with_its_types_dtypes_and_keys(tmp_path):
    names = "float32", "bfloat16", "float16", "float64", "int64", "uint8", "bool"
    state = {
        "tensors": {name: torch.ones(2, 3).to(getattr(torch, name)) for name in names},
        "optim": {"state": {0: {"step": torch.tensor(7.0), "exp_avg": torch.randn(4)}, 1: {}, -2: None}},
        "awkward keys": {
            "": torch.tensor(1),
            "a/b": torch.tensor(2),
            "a": {"b": torch.tensor(3)},
            "__metadata__": torch.tensor(4),
            "$tensor": "no tensor",
            "#0": torch.tensor(5),
            0: torch.tensor(6),
            "%2F é \ud800": torch.tensor(8),
        },
        "__metadata__": torch.tensor(9),
        "plain": [None, True, False, 0, -1, 2**80, 1e-300, 0.1, "text", [], {}, [[1]]],
        "tuple": (1, torch.tensor([2]), (3,)),
        "zero_dim": torch.tensor(2**40),
        "empty": torch.zeros(0, 5),
        "counts": torch.tensor([2**53 + 1, -1]),
    }
    Checkpointer(tmp_path).save(3, state, {"note": [1, "x"]})
    step, back, meta = Checkpointer(tmp_path).load()
    assert (step, meta) == (3, {"note": [1, "x"]})
    assert equal(state, back)


def test_floats_that_json_cannot_hold_come_back(tmp_path):
    Checkpointer(tmp_path).save(1, {"best": math.inf, "worst": -math.inf, "unknown": math.nan}, {})
    _, back, _ = Checkpointer(tmp_path).load()
    assert back["best"] == math.inf
    assert back["worst"] == -math.inf
    assert math.isnan(back["unknown"])


def test_an_adam_optimizer_continues_bit_for_bit(tmp_path):
    def make():
        w = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
        return w, torch.optim.Adam([{"params": [w], "lr": 0.1}])

    def train(w, optim, steps):
        for _ in range(steps):
            optim.zero_grad()
            (w**2).sum().backward()
            optim.step()

    w, optim = make()
    train(w, optim, 3)
    Checkpointer(tmp_path).save(3, {"w": w, "optim": optim.state_dict()}, {})
    train(w, optim, 3)
    w2, optim2 = make()
    _, state, _ = Checkpointer(tmp_path).load()
    w2.data.copy_(state["w"])
    optim2.load_state_dict(state["optim"])
    train(w2, optim2, 3)
    assert torch.equal(w, w2)


@pytest.mark.parametrize("bad", [torch.tensor([1.0, math.nan]), torch.tensor(math.inf, dtype=torch.bfloat16)])
def test_a_state_that_is_not_finite_is_never_committed(tmp_path, bad):
    saver = save_steps(tmp_path, [1])
    with pytest.raises(NumericsError, match="/sae/w"):
        saver.save(2, {"sae": {"w": bad}}, {})
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("value", [object(), {1, 2}, b"bytes", {"a": {(1, 2): 3}}, {True: 1}])
def test_what_a_checkpoint_cannot_hold_is_named(tmp_path, value):
    with pytest.raises(TypeError, match="state/here"):
        Checkpointer(tmp_path).save(1, {"here": value}, {})
    assert list(tmp_path.iterdir()) == []


def damage(folder: Path, how: str) -> None:
    match how:
        case "flip":
            flip_a_byte(folder / "state.safetensors")
        case "json":
            flip_a_byte(folder / "state.json")
        case "truncate":
            os.truncate(folder / "state.safetensors", 40)
        case "zero tail":
            size = (folder / "state.safetensors").stat().st_size
            os.truncate(folder / "state.safetensors", size - 16)
            os.truncate(folder / "state.safetensors", size)
        case "missing":
            (folder / "state.json").unlink()
        case "extra":
            (folder / "more").write_text("x")
        case "no manifest":
            (folder / MANIFEST).unlink()
        case "garbage":
            (folder / MANIFEST).write_bytes(os.urandom(300))
        case "no bytes":
            os.truncate(folder / MANIFEST, 0)
        case "mixed":
            shutil.copy(folder.parent / "step-00000001/state.safetensors", folder)
        case "renamed copy":
            shutil.rmtree(folder)
            shutil.copytree(folder.parent / "step-00000001", folder)


@pytest.mark.parametrize(
    "how",
    [
        *("flip", "json", "truncate", "zero tail", "missing", "extra"),
        *("no manifest", "garbage", "no bytes", "mixed", "renamed copy"),
    ],
)
def test_a_damaged_newest_checkpoint_falls_back_one_step_and_says_why(tmp_path, caplog, how):
    save_steps(tmp_path, [1, 2, 3])
    damage(tmp_path / "step-00000003", how)
    with caplog.at_level(logging.WARNING):
        step, state, _ = Checkpointer(tmp_path).load()
    assert step == 2
    assert equal(state, make_state(2))
    assert "step-00000003" in caplog.text


def test_all_damaged_is_an_error_and_none_at_all_is_a_fresh_start(tmp_path):
    assert Checkpointer(tmp_path / "new").load() is None
    save_steps(tmp_path, [1, 2])
    for step in (1, 2):
        damage(tmp_path / f"step-0000000{step}", "flip")
    with pytest.raises(InputError, match="all 2 are damaged"):
        Checkpointer(tmp_path).load()


def test_a_future_format_stops_the_run_naming_both_versions(tmp_path):
    save_steps(tmp_path, [1, 2])
    manifest = tmp_path / "step-00000002" / MANIFEST
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 9}))
    with pytest.raises(InputError, match=r"format version 9, .* up to 1"):
        Checkpointer(tmp_path).load()


def test_a_chosen_checkpoint_must_be_whole_and_a_checkpoint(tmp_path):
    save_steps(tmp_path, [1, 2])
    assert Checkpointer(tmp_path).load(tmp_path / "step-00000001")[0] == 1
    damage(tmp_path / "step-00000001", "flip")
    with pytest.raises(InputError, match="changed since"):
        Checkpointer(tmp_path).load(tmp_path / "step-00000001")
    with committed_folder(tmp_path / "export", "sae", {}) as temp:
        write_json(temp / "config.json", {})
    with pytest.raises(InputError, match="of kind 'sae', not 'checkpoint'"):
        Checkpointer(tmp_path).load(tmp_path / "export")


def test_foreign_names_are_ignored_and_never_deleted_and_stale_temporaries_are_removed(tmp_path):
    save_steps(tmp_path, [1])
    foreign = ["step-100.bak", "step-00x", "step-5", "step-000000009", "notes"]
    for name in foreign:
        (tmp_path / name).mkdir()
    (tmp_path / "latest").symlink_to(tmp_path / "gone")
    (tmp_path / "step-00000050").symlink_to(tmp_path / "step-00000001")
    (tmp_path / ".tmp-step-00000009-abc").mkdir()
    assert Checkpointer(tmp_path).load()[0] == 1
    assert (tmp_path / ".tmp-step-00000009-abc").exists(), "a reader must not touch a live writer's files"
    save_steps(tmp_path, [2, 3, 4], keep=2)
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {*foreign, "latest", "step-00000050", "step-00000003", "step-00000004"}


def test_retention_keeps_the_newest_whole_ones_and_counts_no_damaged_one(tmp_path):
    save_steps(tmp_path, [1, 2, 3])
    damage(tmp_path / "step-00000002", "flip")
    damage(tmp_path / "step-00000003", "flip")
    saver = Checkpointer(tmp_path, keep=2)
    assert saver.load()[0] == 1
    saver.save(4, make_state(4), {})
    assert Checkpointer.steps(tmp_path) == [1, 2, 3, 4], "1 is the second newest whole one"
    saver.save(5, make_state(5), {})
    assert Checkpointer.steps(tmp_path) == [2, 3, 4, 5]


def test_a_damaged_later_step_is_set_aside_and_a_whole_one_is_refused(tmp_path):
    save_steps(tmp_path, [1, 2, 3])
    damage(tmp_path / "step-00000003", "flip")
    saver = Checkpointer(tmp_path)
    assert saver.load()[0] == 2
    saver.save(3, make_state(33), {})
    assert equal(Checkpointer(tmp_path).load()[1], make_state(33))
    assert len(list(tmp_path.glob("step-00000003.damaged-*"))) == 1
    behind = Checkpointer(tmp_path)
    behind.load(tmp_path / "step-00000001")
    with pytest.raises(InputError, match=r"step-00000002.*move it away"):
        behind.save(2, make_state(2), {})


def test_saving_a_step_twice_changes_nothing(tmp_path):
    saver = save_steps(tmp_path, [1])
    saver.save(1, make_state(99), {})
    resumed = Checkpointer(tmp_path)
    resumed.load()
    resumed.save(1, make_state(99), {})
    assert equal(Checkpointer(tmp_path).load()[1], make_state(1))


@pytest.mark.parametrize(("key", "value"), [("every", 0), ("keep", 1), ("keep", -1)])
def test_a_checkpoint_configuration_that_cannot_work_is_refused(key, value):
    with pytest.raises(InputError, match=f"checkpoint.{key}"):
        CheckpointConfig(**{key: value})


# One process imports torch once and forks a child per fault; the child waits for strace to attach, so
# that counts start at the save. Every fsync and rename of a save, retention included, is one point.
FAULT_SCRIPT = """
    import os, subprocess, sys, time
    from pathlib import Path
    import torch
    from sae_train.checkpoint import Checkpointer

    root, fault = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)

    def state(step):
        return {"w": torch.full((64,), float(step)), "step": step}

    def traced():
        return "TracerPid:\\t0" not in Path("/proc/self/status").read_text()

    for call in ("fsync", "rename"):
        for point in range(1, 40):
            folder = root / f"{call}-{point}"
            saver = Checkpointer(folder, keep=2)
            saver.save(1, state(1), {})
            saver.save(2, state(2), {})
            child = os.fork()
            if child == 0:
                while not traced():
                    time.sleep(0.005)
                try:
                    saver.save(3, state(3), {})
                except OSError:
                    os._exit(5)
                os._exit(0)
            tracer = subprocess.Popen(
                ["strace", "-p", str(child), "-o", "/dev/null", "-e", f"trace={call}",
                 "-e", f"inject={call}:{fault}:when={point}"], stderr=subprocess.DEVNULL)
            _, status = os.waitpid(child, 0)
            tracer.wait()
            code = os.waitstatus_to_exitcode(status)
            print(folder.name, code, flush=True)
            if code == 0:
                break
"""


def strace_works() -> bool:
    if shutil.which("strace") is None:
        return False
    child = subprocess.Popen(["sleep", "5"])
    try:
        found = subprocess.run(
            ["timeout", "1", "strace", "-p", str(child.pid), "-e", "trace=fsync"],
            capture_output=True,
            text=True,
        )
        return "attached" in found.stderr
    finally:
        child.kill()
        child.wait()


def run_script(script: str, *args: str, before: tuple[str, ...] = ()) -> str:
    done = subprocess.run(
        [*before, sys.executable, "-c", textwrap.dedent(script), *args],
        capture_output=True,
        text=True,
        timeout=110,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("fault", ["signal=KILL", "error=EIO"])
def test_a_fault_at_any_fsync_or_rename_leaves_the_old_or_the_new_step_whole(tmp_path, fault):
    if not strace_works():
        pytest.skip("strace is missing or may not attach to a process here")
    lines = run_script(FAULT_SCRIPT, str(tmp_path), fault).split("\n")
    outcomes = dict(line.split() for line in lines if line)
    assert sum(name.startswith("fsync") for name in outcomes) > 8, outcomes
    assert sum(name.startswith("rename") for name in outcomes) > 4, outcomes
    for name, code in outcomes.items():
        folder = tmp_path / name
        saver = Checkpointer(folder, keep=2)
        step, state, _ = saver.load()
        assert code in {"0", "-9" if fault == "signal=KILL" else "5"}, (name, code)
        assert torch.equal(state["w"], torch.full((64,), float(step))), name
        assert step in ({3} if code == "0" else {2, 3}), (name, step)
        if code == "5" and name.startswith("fsync"):
            assert step == 2, (name, "what may not be on disk is not committed")
        assert len(Checkpointer.steps(folder)) >= 2, name
        assert not list(folder.glob("*.damaged-*")), name
        if code == "5" and step == 2:
            assert not list(folder.glob(".tmp-*")), (name, "a save that failed cleans up")
        saver.save(4, {"w": torch.full((64,), 4.0), "step": 4}, {})
        assert Checkpointer(folder).load()[0] == 4, name
        assert not list(folder.glob(".tmp-*")), (name, "the next save removes what the kill left")


FULL_DISK_SCRIPT = """
    import errno, sys
    from pathlib import Path
    import torch
    from sae_train.checkpoint import Checkpointer

    folder = Path(sys.argv[1]) / "checkpoints"
    saver = Checkpointer(folder)
    saver.save(1, {"w": torch.ones(100_000)}, {})
    for attempt in range(2):
        try:
            saver.save(2, {"w": torch.ones(200_000)}, {})
        except OSError as error:
            assert error.errno == errno.ENOSPC, error
            print("full", sorted(p.name for p in folder.iterdir()), Checkpointer(folder).load()[0])
    saver.save(3, {"w": torch.ones(50_000)}, {})
    print("then", Checkpointer(folder).load()[0])
"""


def test_a_full_disk_fails_the_save_loudly_and_keeps_the_old_step(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    probe = (
        subprocess.run(["unshare", "-m", *mount], capture_output=True) if shutil.which("unshare") else None
    )
    if probe is None or probe.returncode != 0:
        pytest.skip("mounting a small tmpfs needs root and a mount namespace")
    before = ("unshare", "-m", "sh", "-c", f'{" ".join(mount)} && exec "$@"', "sh")
    out = run_script(FULL_DISK_SCRIPT, str(tmp_path), before=before)
    assert out.split("\n")[:3] == ["full ['step-00000001'] 1"] * 2 + ["then 3"]


def test_a_checkpoint_of_format_1_is_read_bit_for_bit_for_ever(tmp_path):
    """tests/golden/checkpoint-v1 was written by release 0.1.0 and is never written again."""
    golden = Path(__file__).parents[1] / "golden" / "checkpoint-v1"
    shutil.copytree(golden, tmp_path / "checkpoints")
    loaded = Checkpointer(tmp_path / "checkpoints").load()
    assert loaded is not None
    step, state, meta = loaded
    assert step == state["step"] == 2
    assert torch.equal(state["nested"][0], torch.arange(6.0).reshape(2, 3))
    assert torch.equal(state["nested"]["h"], torch.tensor([1.5, -2.25], dtype=torch.bfloat16))
    assert state["list"] == [None, True, -1, 0.1, "é"]
    assert state["count"] == 2**40 and state["count"].dtype == torch.int64
    assert meta == {"config": {"optim": {"lr": 0.001}}, "fingerprint": {"model": "tiny"}}
