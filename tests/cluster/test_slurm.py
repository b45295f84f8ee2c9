"""Runs on a real Slurm: submitted, over two nodes, in an array, cancelled, warned, preempted, without a node.

A run that was interrupted has to end with the bits of one that was not. To be sure where it is interrupted,
it is frozen (SIGSTOP) while Slurm makes up its mind; what preempts sends SIGCONT itself.
"""

import os
import re
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest
from cluster.slurm import NODES, Cluster, wait_until
from faults.tools import SYNTHETIC, differences, final_state, resumed_at, told

from sae_train.launch.base import LAUNCHERS, Job, Started
from sae_train.launch.config import LaunchConfig
from sae_train.launch.record import read_jobs, read_legs
from sae_train.launch.slurm import Slurm
from sae_train.log import read_metrics
from sae_train.train.record import RunRecord

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
DOCS = Path(__file__).resolve().parents[2] / "docs" / "slurm.md"
SLURM = ["launch=slurm", "launch.gpus_per_node=0", "launch.time=1:00:00"]
GRID = ["grid={k: [2, 4]}", "source.lanes=4", "train.tokens=1280"]
LONG = ["train.tokens=12800"]
"""400 steps: long enough to be frozen in."""


@pytest.fixture
def whole(zygote, tmp_path) -> Path:
    """The run as it is without interruption, on this machine."""
    zygote.run("train", *SYNTHETIC, *LONG, f"run.dir={tmp_path / 'whole'}", plots=False)
    return tmp_path / "whole"


def submit(zygote, run: Path, *args: str) -> Started:
    """`sae-train train ... launch=slurm`, as a user types it."""
    command = ["train", *SYNTHETIC, *LONG, *SLURM, f"run.dir={run}", *args]
    text = zygote.run(*command, env={"PATH": os.environ["PATH"]})
    (job,) = read_jobs(run)["slurm"]
    assert f"submitted  job {job.id}: " in text and str(job.log) in text
    return job


def processes(run: Path) -> list[psutil.Process]:
    """Those that train this run, on whatever host."""
    found = []
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
        except psutil.NoSuchProcess:
            continue
        if f"run.dir={run}" in " ".join(words).replace("'", "") and words[1:4] == ["-P", "-m", "sae_train"]:
            found.append(process)
    return found


def steps(run: Path) -> int:
    return max((r["step"] for r in read_metrics(run)), default=0) if (run / "metrics.jsonl").exists() else 0


def freeze(cluster: Cluster, job: Started, run: Path) -> list[psutil.Process]:
    """Stop the clock of a run that has begun and is not done."""
    wait_until(lambda: steps(run) >= 10, f"steps of job {job.id}", 400)
    found = processes(run)
    for process in found:
        process.send_signal(signal.SIGSTOP)
    assert found and not (run / "summary.json").exists(), "it was too fast to be frozen"
    return found


def went_on(process: psutil.Process, job: Started, number: int) -> bool:
    """Lets a frozen run go on once it was sent a signal; True when it has left. Slurm may do so too."""
    try:
        text = Path(f"/proc/{process.pid}/status").read_text()
        masks = re.findall(r"^(?:Shd|Sig)Pnd:\t(\w+)$", text, re.MULTILINE)
        if any(int(mask, 16) >> (number - 1) & 1 for mask in masks):
            process.send_signal(signal.SIGCONT)
    except (FileNotFoundError, ProcessLookupError, psutil.NoSuchProcess):
        pass
    legs = read_legs(job.log)
    return legs.code is not None or legs.starts > 1


def ended(cluster: Cluster, job: Started) -> str:
    """What the job printed, once it is done."""
    cluster.wait_for(job.id, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", timeout_s=400)
    text = job.log.read_text(errors="replace")
    assert cluster.state(job.id) == "COMPLETED", text
    return text


def state(*jobs: Started) -> list[str]:
    """As another process sees them, once Slurm is done with them."""
    launcher = LAUNCHERS.build(LaunchConfig(name="slurm"))
    assert isinstance(launcher, Slurm)
    return list(launcher.states(jobs))


def test_a_run_is_submitted_at_once_sees_its_gpus_and_ends_as_it_would_here(
    cluster, zygote, whole, tmp_path, capsys
):
    run = tmp_path / "a run of 50%"
    began = time.monotonic()
    job = submit(
        zygote,
        run,
        "launch.gpus_per_node=2",
        "launch.processes_per_node=1",
        'launch.setup=["srun --ntasks=1 printenv CUDA_VISIBLE_DEVICES"]',
    )
    with capsys.disabled():
        print(f"\nsubmitted in {time.monotonic() - began:.2f} s, the command and its imports not included")
    again = zygote.start(
        "train", *SYNTHETIC, *LONG, *SLURM, f"run.dir={run}", env={"PATH": os.environ["PATH"]}
    )
    assert again.wait() == 2 and f"a folder without a job; {job.id} is " in again.text()
    text = ended(cluster, job)
    assert text.startswith("0,1\n")
    assert differences(final_state(whole), final_state(run)) == []
    shown = zygote.run("status", f"run={run}", env={"PATH": os.environ["PATH"]})
    assert "status     done, step 400 of 400 (100%)" in shown
    assert f"job        {job.id}, done, started 1 times; log {job.log}" in shown
    assert "launch" in RunRecord.read(run).config


def test_a_run_over_two_nodes_has_a_process_on_each_and_ends_with_the_bits_of_one(cluster, zygote, tmp_path):
    zygote.run("train", *SYNTHETIC, *GRID, f"run.dir={tmp_path / 'whole'}", plots=False)
    run = tmp_path / "run"
    job = submit(zygote, run, *GRID, "launch.nodes=2", "mesh.timeout_s=60")
    ended(cluster, job)
    assert cluster.field(job.id, "NodeList") == "n[1-2]"
    assert cluster.ask("sacct", "-n", "-P", f"--jobs={job.id}.0", "--format=NTasks,NNodes").split() == ["2|2"]
    assert differences(final_state(tmp_path / "whole"), final_state(run)) == []


def test_the_script_of_the_docs_starts_torchrun_over_two_nodes(cluster, zygote, tmp_path):
    zygote.run("train", *SYNTHETIC, *GRID, f"run.dir={tmp_path / 'whole'}", plots=False)
    run = tmp_path / "run"
    (text,) = re.findall(r"```bash\n(#!/bin/bash\n.*?torchrun.*?)```", DOCS.read_text(), re.DOTALL)
    args = " ".join(f"'{arg}'" for arg in [*SYNTHETIC, *GRID, f"run.dir={run}", "mesh.timeout_s=60"])
    text, count = re.subn(r"sae-train train [^\n]*\n", lambda _: f"sae-train train {args}\n", text)
    assert count == 1
    text = text.replace("--gpus-per-node=8", "--gpus-per-node=1").replace(
        "--nproc-per-node=8", "--nproc-per-node=1"
    )
    text = text.replace("source venv/bin/activate", f"export PATH={Path(sys.executable).parent}:$PATH")
    (tmp_path / "job.sh").write_text(text)
    id = cluster.ask("sbatch", "--parsable", f"--output={tmp_path}/out", str(tmp_path / "job.sh")).strip()
    ended(cluster, Started(Job("docs", ()), id, tmp_path / "out"))
    assert differences(final_state(tmp_path / "whole"), final_state(run)) == []


def test_an_array_of_four_runs_its_own_commands_and_what_waits_for_it_starts_only_if_it_may(
    cluster, zygote, tmp_path
):
    launcher = LAUNCHERS.build(LaunchConfig(name="slurm", time="0:30:00", parallel=3))
    runs = [tmp_path / "runs" / f"seed-{seed}" for seed in range(3)]
    jobs = [
        Job(run.name, ("train", *SYNTHETIC, "train.tokens=320", f"run.seed={i}", f"run.dir={run}"))
        for i, run in enumerate(runs)
    ]
    began = time.monotonic()
    array = launcher.submit([*jobs, Job("bad", ("train", "sae.kk=3"))], tmp_path)
    print(f"\nfour submitted in {time.monotonic() - began:.2f} s")
    assert [job.id.partition("_")[2] for job in array] == ["0", "1", "2", "3"]
    (good,) = launcher.submit([Job("good", ("--help",))], tmp_path, after=[one.id for one in array[:3]])
    (never,) = launcher.submit([Job("never", ("--help",))], tmp_path, after=[array[3].id])
    everything = [*array, good, never]
    wait_until(lambda: not {"waiting", "running"} & set(launcher.states(everything)), "the jobs", 600)
    assert launcher.states(everything) == ["done", "done", "done", "failed", "done", "cancelled"]
    assert state(*everything) == launcher.states(everything)
    assert "sae.kk='3'" in array[3].log.read_text()
    assert [RunRecord.read(run).config["run"]["seed"] for run in runs] == [0, 1, 2]
    bare = tmp_path / "bin"  # a cluster without accounts
    bare.mkdir()
    (bare / "squeue").symlink_to(cluster.commands / "squeue")
    for path in (os.environ["PATH"], f"{bare}:/usr/sbin:/sbin:/bin"):
        shown = zygote.run("status", f"dir={tmp_path}", env={"PATH": path})
        for one, expected in zip(everything, ["done"] * 3 + ["failed", "done", "cancelled"], strict=True):
            (line,) = [line for line in shown.splitlines() if line.startswith(f"{one.job.name} ")]
            assert line.split()[1:3] == [one.id, expected]
            assert ("step 10 of 10 (100%)" in line) == one.job.name.startswith("seed-")


def test_cancelled_jobs_are_cancelled_whether_they_wait_or_run_and_do_not_come_back(
    cluster, zygote, tmp_path
):
    run = tmp_path / "run"
    job = submit(zygote, run, "train.tokens=640000", "source.epochs=400", "eval.every=0")
    launcher = LAUNCHERS.build(LaunchConfig(name="slurm"))
    (waiting,) = launcher.submit([Job("waiting", ("--help",))], tmp_path, after=[job.id])
    wait_until(lambda: steps(run) >= 10, "steps", 400)
    assert launcher.states([job, waiting]) == ["running", "waiting"]
    launcher.cancel([job, waiting])
    wait_until(lambda: not cluster.ask("squeue", "-h"), "an empty queue")
    assert launcher.states([job, waiting]) == ["cancelled", "cancelled"]
    assert read_legs(job.log).starts == 1 and not waiting.log.exists()
    assert RunRecord.read(run).status == "stopped"


def test_a_run_near_its_time_limit_saves_goes_back_into_the_queue_and_ends_with_the_same_bits(
    cluster, zygote, whole, tmp_path
):
    run = tmp_path / "run"
    job = submit(zygote, run, "launch.signal_s=1200")
    (process,) = freeze(cluster, job, run)
    cluster.ask("scontrol", "update", f"JobId={job.id}", "TimeLimit=19")
    wait_until(lambda: went_on(process, job, signal.SIGUSR1), "SIGUSR1", 400)
    cluster.ask("scontrol", "update", f"JobId={job.id}", "TimeLimit=60")
    text = ended(cluster, job)
    assert "received SIGUSR1: saved at step" in text
    assert resumed_at(text) is not None and resumed_at(text) >= 10
    assert (read_legs(job.log).starts, cluster.field(job.id, "Restarts")) == (2, "1")
    assert differences(final_state(whole), final_state(run)) == []
    assert told(run) == told(whole)  # one record of the run, as if nothing had been


def test_a_preempted_run_saves_waits_and_ends_with_the_same_bits(cluster, zygote, whole, tmp_path):
    """Slurm sends SIGTERM and not the signal that was asked for, then a second one."""
    run = tmp_path / "run"
    job = submit(zygote, run)
    freeze(cluster, job, run)
    more = ["--partition=high", f"--nodes={len(NODES)}", "--exclusive", f"--output={tmp_path}/high"]
    cluster.ask("sbatch", *more, "--wrap=true")
    text = ended(cluster, job)
    assert "received SIGTERM: saved at step" in text
    assert resumed_at(text) is not None and resumed_at(text) >= 10
    assert (read_legs(job.log).starts, cluster.field(job.id, "Restarts")) == (2, "1")
    assert differences(final_state(whole), final_state(run)) == []


@pytest.mark.parametrize("how", ["--batch", "--full"])
def test_a_warning_to_the_script_reaches_the_run_and_both_go_on(how, cluster, zygote, whole, tmp_path):
    run = tmp_path / "run"
    job = submit(zygote, run)
    (process,) = freeze(cluster, job, run)
    cluster.ask("scancel", "--signal=USR2", how, job.id)
    number = signal.SIGUSR1 if how == "--batch" else signal.SIGUSR2
    wait_until(lambda: went_on(process, job, number), "the signal", 400)
    text = ended(cluster, job)
    assert "saved at step" in text and resumed_at(text) is not None
    assert read_legs(job.log).starts == 2
    assert differences(final_state(whole), final_state(run)) == []


def test_a_job_that_may_not_go_back_stays_stopped_and_the_same_command_continues_it(
    cluster, zygote, whole, tmp_path
):
    run = tmp_path / "run"
    job = submit(zygote, run, "launch.requeue=0")
    (process,) = freeze(cluster, job, run)
    process.terminate()
    process.send_signal(signal.SIGCONT)
    cluster.wait_for(job.id, "FAILED")
    assert state(job) == ["stopped"] and read_legs(job.log).starts == 1
    next_job = submit(zygote, run)
    assert next_job.id != job.id
    assert resumed_at(ended(cluster, next_job)) is not None
    assert differences(final_state(whole), final_state(run)) == []


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_run_whose_node_fails_starts_again_by_itself_and_ends_with_the_same_bits(cluster, zygote, tmp_path):
    zygote.run("train", *SYNTHETIC, *GRID, *LONG, f"run.dir={tmp_path / 'whole'}", plots=False)
    run = tmp_path / "run"
    job = submit(zygote, run, *GRID, *LONG, "launch.nodes=2", "mesh.timeout_s=20")
    freeze(cluster, job, run)
    cluster.hosts["n2"].cut()
    try:
        cluster.wait_for(job.id, "PENDING", "NODE_FAIL", timeout_s=400)
    finally:
        cluster.hosts["n2"].mend()
    text = ended(cluster, job)
    assert resumed_at(text) is not None
    assert differences(final_state(tmp_path / "whole"), final_state(run)) == []
