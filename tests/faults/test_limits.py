"""Runs at the limits of a process: memory, descriptors, modes, and what many saves leave behind."""

import json
import os
import resource
import shutil
import stat
from pathlib import Path

import psutil
import pytest
from faults.disk_tools import SAVING, WAIT, Gate, leftovers, one_line, whole_steps
from faults.tools import differences, final_state

from sae_train.files import write_json

SAVE = "sae_train.checkpoint:committed_folder"


def train(run: Path, *more: str) -> list[str]:
    return ["train", *SAVING, f"run.dir={run}", *more]


def test_a_run_out_of_memory_says_so_in_one_line_and_its_checkpoints_stay(zygote, tmp_path):
    """The address space is limited to what the run has, as it is about to make another shard of 64 MB, which
    is more than malloc keeps for later."""
    run, gate = tmp_path / "run", Gate(tmp_path / "gate", SAVE, 2)
    args = train(run, "train.batch_tokens=4096", "train.tokens=819200", "source.shard_tokens=262144")
    process = zygote.start(*args, before=WAIT + gate.before, plots=False)
    gate.reached(2, process)
    steps, size = whole_steps(run), psutil.Process(process.pid).memory_info().vms
    resource.prlimit(process.pid, resource.RLIMIT_AS, (size + 2**20, size + 2**20))
    gate.open(2)
    assert process.wait() == 2, process.text()
    assert "out of memory" in one_line(process.text()) and "train.batch_tokens" in one_line(process.text())
    assert whole_steps(run)[-1] >= steps[-1]
    assert leftovers(run) == []


def test_a_run_with_64_descriptors_works(zygote, tiny, tmp_path):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\n"
    args = [*tiny, "train.tokens=640", f"run.dir={tmp_path / 'run'}"]
    zygote.run("train", *args, before=limit, plots=False)
    assert whole_steps(tmp_path / "run")[-1] == 20


def test_a_run_without_a_free_descriptor_ends_in_one_line_and_continues(zygote, tmp_path):
    run, gate = tmp_path / "run", Gate(tmp_path / "gate", SAVE, 3)
    process = zygote.start(*train(run), before=WAIT + gate.before, plots=False)
    gate.reached(3, process)
    steps = whole_steps(run)
    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (3, 64))
    gate.open(3)
    assert process.wait() == 75, process.text()
    assert "Too many open files" in one_line(process.text())
    assert whole_steps(run) == steps
    zygote.run(*train(run), plots=False)
    zygote.run(*train(tmp_path / "whole"), plots=False)
    assert differences(final_state(run), final_state(tmp_path / "whole")) == []


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_every_file_of_a_run_has_the_mode_that_the_umask_gives(zygote, tmp_path, umask):
    run = tmp_path / "run"
    zygote.run(*train(run, "train.tokens=320"), before=f"import os; os.umask({umask})\n", plots=False)
    found = {path: stat.S_IMODE(path.stat().st_mode) for path in (run, *run.rglob("*"))}
    assert len(found) > 15
    for path, mode in found.items():
        assert mode == (0o777 if path.is_dir() else 0o666) & ~umask, path


def test_links_planted_in_a_run_folder_are_neither_followed_nor_written_through(zygote, tmp_path):
    run, precious = tmp_path / "run", tmp_path / "precious"
    zygote.run(*train(run, "train.tokens=320"), plots=False)
    record = json.loads((run / "run.json").read_text())
    precious.mkdir()
    (precious / "file").write_text("x")
    for name in ("run.json", "config.yaml", "summary.json"):
        (run / name).unlink()
        (run / name).symlink_to(precious / "file")
    (run / "checkpoints" / ".tmp-step-00000012-ab").symlink_to(precious)
    (run / "checkpoints" / ".tmp-x").symlink_to(precious / "file")
    write_json(run / "run.json", record | {"status": "stopped"})
    shutil.rmtree(run / "checkpoints" / "step-00000010")  # so that there is something to save
    zygote.run(*train(run, "train.tokens=320"), plots=False)
    assert (precious / "file").read_text() == "x" and [p.name for p in precious.iterdir()] == ["file"]
    assert whole_steps(run)[-1] == 10 and leftovers(run) == []
    assert not any((run / name).is_symlink() for name in ("run.json", "config.yaml", "summary.json"))


MANY_SAVES = """
import psutil, torch
from pathlib import Path
from sae_train.checkpoint import Checkpointer
from sae_train.train.saver import Saver
saver = Saver(Checkpointer(Path(FOLDER), keep=2), {})
state = {"w": torch.randn(1 << 20), "moments": [torch.randn(1 << 20)], "step": 0}
rss = {}
for step in range(1, 221):
    state["step"] = step
    saver.start(step, state)
    saver.join()
    rss[step] = psutil.Process().memory_info().rss
print("grown", rss[220] - rss[20], rss[20], flush=True)
"""


def test_200_saves_in_the_background_leave_no_memory_behind(zygote, tmp_path):
    """8 MiB each, after 20 to warm up."""
    before = f"FOLDER = {str(tmp_path / 'checkpoints')!r}\n{MANY_SAVES}"
    text = zygote.run("--help", before=before)
    grown = int(text.split("grown ")[1].split()[0])
    assert grown < 16 * 2**20, text
    print(f"200 saves of 8 MiB: {grown / 2**20:.1f} MiB more")
    assert len(os.listdir(tmp_path / "checkpoints")) == 2
