"""How processes of one run leave it: asked to, killed, stuck, by an error of one; none waits in vain."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from distributed.conftest import GRID, SHORT, free_port
from faults.tools import SYNTHETIC, at_step, call, differences, final_state, resumed_at, send

from sae_train.checkpoint import Checkpointer

LONG = [*SYNTHETIC, "source.lanes=4", GRID, "source.epochs=40", "train.tokens=64000", "eval.every=0"]


def steps(run: Path) -> list[int]:
    return Checkpointer.steps(run / "checkpoints")


@pytest.mark.parametrize("rank", [0, 1])
def test_all_save_the_same_step_when_one_is_asked_to_stop(rank, launch, tmp_path):
    run = tmp_path / "run"
    group = launch(2, "train", *LONG, f"run.dir={run}")
    group.members[0].wait_for_step(run, 6)
    group.members[rank].send(signal.SIGTERM)
    texts = group.wait(75)
    assert "another process was asked to stop: saved" in texts[1 - rank]
    assert "received SIGTERM: saved" in texts[rank]
    assert steps(run)


@pytest.mark.slow  # test_uneven.py does that too, row by row
def test_a_run_goes_on_with_another_number_of_processes_to_the_same_bits(launch, zygote, tiny, tmp_path):
    sizes = (2, 1, 3)
    args = [*tiny, "source.lanes=4", GRID, "train.tokens=1280", "eval.every=20"]
    zygote.run("train", *args, f"run.dir={tmp_path / 'whole'}", plots=False)
    run = tmp_path / "cut"
    for leg, size in enumerate(sizes):
        last = leg == len(sizes) - 1
        stop = None if last else at_step(8 + 9 * leg, send(signal.SIGTERM))
        texts = launch(size, "train", *args, f"run.dir={run}", before=stop).wait(0 if last else 75)
        assert (resumed_at(texts[0]) is not None) == (leg > 0)
    assert differences(final_state(tmp_path / "whole"), final_state(run)) == []


@pytest.mark.parametrize("killed", [0, 1])
def test_when_one_is_killed_the_others_leave_soon_and_the_run_goes_on_from_its_checkpoint(
    killed, launch, whole, tmp_path
):
    run = tmp_path / "cut"
    group = launch(2, "train", *SHORT, f"run.dir={run}", before={killed: at_step(23, send(signal.SIGKILL))})
    assert group.members[killed].wait() == -9
    killed_at = time.monotonic()
    assert group.members[1 - killed].wait() == 75
    assert time.monotonic() - killed_at < 20
    line = group.members[1 - killed].text().strip().splitlines()[-1]
    assert "another process of this run is gone" in line and "the same command continues" in line
    assert steps(run)[-1] >= 10
    texts = launch(2, "train", *SHORT, f"run.dir={run}").wait(0)
    assert resumed_at(texts[0]) in (10, 15, 20)
    assert differences(final_state(whole), final_state(run)) == []


def test_one_that_stands_still_is_given_up_after_the_timeout(launch, tmp_path):
    stuck = at_step(12, send(signal.SIGSTOP))
    run = tmp_path / "run"
    group = launch(2, "train", *SHORT, "mesh.timeout_s=5", f"run.dir={run}", before={1: stuck})
    assert group.members[0].wait() == 75
    assert "does not answer" in group.members[0].text()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_disk_that_fails_one_of_them_fails_the_save_of_all_and_it_is_tried_again(
    rank, launch, whole, tmp_path
):
    run = tmp_path / "run"
    full = call("sae_train.checkpoint:write_tensors", "raise OSError(28, 'No space left on device')", nth=2)
    texts = launch(2, "train", *SHORT, f"run.dir={run}", before={rank: full}).wait(0)
    for text in texts:
        assert "could not be saved" in text and "try 1 of 3" in text
    assert differences(final_state(whole), final_state(run)) == []


BROKEN = {
    "its harvest": ("model", "sae_train.harvest.harvester:Harvester.rows", 40),
    "its text": ("model", "sae_train.harvest.windows:WindowStream.take", 9),
    "its rows": ("synthetic", "sae_train.shards.synthetic:SyntheticRows.next_rows", 5),
}


@pytest.mark.parametrize(
    ("what", "rank"),
    [  # each place, by the lead and by another process where that is cheap; what all do then is the same code
        ("its harvest", 0),
        ("its text", 1),
        ("its rows", 0),
        ("its rows", 1),
        pytest.param("its harvest", 1, marks=pytest.mark.slow),
        pytest.param("its text", 0, marks=pytest.mark.slow),
    ],
)
def test_what_breaks_the_data_of_one_ends_all_with_its_words_and_what_was_done_saved(
    what, rank, launch, tiny, tmp_path
):
    source, place, nth = BROKEN[what]
    action = "from sae_train.errors import InputError; raise InputError('cable', 'cut', 'a whole one')"
    run = tmp_path / "run"
    args = [
        *(tiny if source == "model" else LONG),
        "source.lanes=4",
        GRID,
        "train.tokens=6400",
        "eval.every=0",
    ]
    args += ["checkpoint.every=1000", "source.prefetch=1", f"run.dir={run}"]
    texts = launch(2, "train", *args, before={rank: call(place, action, nth=nth)}).wait(2, timeout_s=60)
    assert all(text.strip().splitlines()[-1].endswith("cable='cut': expected a whole one") for text in texts)
    assert steps(run)[-1] > 0, "saved where the data ended"


def test_a_lead_that_cannot_remove_an_old_checkpoint_fails_the_save_of_all(launch, whole, tmp_path):
    run = tmp_path / "run"
    stuck = call("sae_train.checkpoint:remove_folder", "raise OSError(5, 'Input/output error')", nth=1)
    texts = launch(2, "train", *SHORT, "checkpoint.keep=2", f"run.dir={run}", before={0: stuck}).wait(0)
    assert all("could not be saved" in text and "try 1 of 3" in text for text in texts)
    assert differences(final_state(whole), final_state(run)) == []


def test_weights_that_are_not_finite_in_one_process_are_saved_by_none(launch, tmp_path):
    run = tmp_path / "run"
    bad = call(
        "sae_train.checkpoint:Checkpointer.save",
        "next(iter(args[2]['members'].values()))['sae']['b_dec'][0] = float('nan')",
        nth=2,
    )
    texts = launch(2, "train", *SHORT, f"run.dir={run}", before={1: bad}).wait(3)
    assert all("is not saved" in text and "NaN" in text for text in texts)
    assert len(steps(run)) == 1


@pytest.mark.parametrize("source", ["model", "synthetic"])
def test_data_that_ends_early_ends_all_of_them_alike(source, launch, tiny, tmp_path):
    args = [*(tiny if source == "model" else SYNTHETIC), "source.lanes=4", GRID, "train.tokens=64000"]
    args += ["corpus.epochs=2"] if source == "model" else ["source.epochs=1"]
    run = tmp_path / "run"
    texts = launch(2, "train", *args, f"run.dir={run}").wait(2)
    # How many rows a text gives shows when it ends; those of a dictionary can be counted before.
    told = "saved at step" if source == "model" else "the rows that source=synthetic has"
    assert all("train.tokens=64000" in text and told in text for text in texts)
    texts = launch(2, "train", *args, f"run.dir={run}", "corpus.allow_short=true").wait(0)
    assert (run / "report.html").exists()


def test_processes_that_run_different_releases_are_refused_at_the_start(launch, tmp_path):
    other = (
        "import sae_train.cli.train as train; known = train.versions(); "
        "train.versions = lambda: known | {'sae-train': '9'}"
    )
    texts = launch(2, "train", *SHORT, f"run.dir={tmp_path / 'run'}", before={1: other}).wait(2)
    assert all("sae-train=" in text and "the same in every process" in text for text in texts)


def test_processes_that_were_told_different_things_are_refused_at_the_start(zygote, tmp_path):
    port, group = str(free_port()), []
    for rank, lr in enumerate(("1e-3", "2e-3")):
        env = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        run = f"run.dir={tmp_path / 'run'}"
        group.append(zygote.start("train", *SHORT, f"optim.lr={lr}", run, env=env))
    for process in group:
        assert process.wait() == 2
        (line,) = process.text().strip().splitlines()[-1:]
        assert "optim.lr=" in line and "the same in every process; process" in line
    assert not (tmp_path / "run" / "run.json").exists()


def test_an_address_where_nobody_is_met_ends_in_one_line(zygote, tmp_path):
    env = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    env["MASTER_PORT"] = str(free_port())
    text = zygote.run(
        "train", *SHORT, "mesh.timeout_s=3", f"run.dir={tmp_path / 'run'}", env=env, code=2, timeout_s=60
    )
    assert "MASTER_ADDR:MASTER_PORT='127.0.0.1:" in text.strip().splitlines()[-1]


def test_an_address_that_somebody_else_has_ends_in_one_line(zygote, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        env = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        env["MASTER_PORT"] = str(taken.getsockname()[1])
        run = f"run.dir={tmp_path / 'run'}"
        text = zygote.run("train", *SHORT, "mesh.timeout_s=3", run, env=env, code=2, timeout_s=60)
    assert "MASTER_ADDR:MASTER_PORT='127.0.0.1:" in text.strip().splitlines()[-1]


def test_torchrun_restarts_a_run_whose_process_was_killed_and_it_ends_with_the_same_bits(whole, tmp_path):
    run, once = tmp_path / "run", tmp_path / "killed"
    script = tmp_path / "worker.py"
    script.write_text(f"""
import os, sys
from pathlib import Path
from matplotlib.figure import Figure
Figure.savefig = lambda self, path, **kwargs: Path(path).touch()
from sae_train.shards.source import ShardSource
real = ShardSource.next_batch
def next_batch(self):
    if self.batches == 23 and os.environ["RANK"] == "1" and not Path({str(once)!r}).exists():
        Path({str(once)!r}).touch()
        os.kill(os.getpid(), 9)
    return real(self)
ShardSource.next_batch = next_batch
from sae_train.cli.main import main
sys.exit(main(["train", *{[*SHORT, f"run.dir={run}"]!r}]))
""")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *("--max-restarts=2", "--monitor-interval=0.2", str(script)),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    assert once.exists() and "continuing" in done.stderr
    assert differences(final_state(whole), final_state(run)) == []
