"""A sweep on a real Slurm: a harvest as a job, an array of four that waits for it, workers of a search."""

import os
from pathlib import Path

import pytest
from cluster.slurm import wait_until
from sweep.short import LONGER, SHORT, table

from sae_train.launch.record import read_jobs, read_legs
from sae_train.train.record import RunRecord

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1500)]
SLURM = ["launch=slurm", "launch.gpus_per_node=0", "launch.time=1:00:00"]
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")


@pytest.fixture
def live(tiny_model_dir, tiny_corpus_dir) -> list[str]:
    model = [f"model.name={tiny_model_dir('llama')}", f"corpus.name={tiny_corpus_dir}", "hook=resid_post.1"]
    windows = ["corpus.context_length=16", "corpus.holdout=0.25", "corpus.epochs=60"]
    return [*model, *windows, *SHORT[4:], *LONGER, *SLURM]


def done(run: Path) -> bool:
    record = RunRecord.read(run)
    return record is not None and record.status == "done"


def all_over(cluster, folder: Path) -> None:
    for job in read_jobs(folder)["slurm"]:
        cluster.wait_for(job.id, *OVER, timeout_s=900)


def test_an_array_of_four_waits_for_one_harvest_and_the_same_command_goes_on_and_sums_up(
    cluster, zygote, live, tmp_path
):
    folder, env = tmp_path / "s", {"PATH": os.environ["PATH"]}
    args = [*live, "train.accumulate=1,2", "train.batch_tokens=32,64", "k=2,4", f"sweep.dir={folder}"]
    text = zygote.run("sweep", *args, env=env, timeout_s=120)
    assert "8 SAEs in 4 runs" in text and "0 of 4 runs done" in text
    jobs = {one.job.name: one for one in read_jobs(folder)["slurm"]}
    names = [name for name in jobs if name != "shards"]
    assert len(names) == 4 and len({jobs[name].id.split("_")[0] for name in names}) == 1
    again = zygote.run("sweep", *args, env=env, timeout_s=120)
    assert "jobs" in again and {one.id for one in read_jobs(folder)["slurm"]} == {
        one.id for one in jobs.values()
    }

    wait_until(
        lambda: any((folder / "runs" / name / "metrics.jsonl").exists() for name in names), "a run", 900
    )
    assert read_legs(jobs["shards"].log).code == 0
    victim = next(name for name in names if not done(folder / "runs" / name))
    cluster.ask("scancel", jobs[victim].id)
    all_over(cluster, folder)
    finished = {
        name: (folder / "runs" / name / "run.json").stat().st_mtime_ns for name in names if name != victim
    }
    assert all(done(folder / "runs" / name) for name in finished)
    if not done(folder / "runs" / victim):
        zygote.run("sweep", *args, env=env, timeout_s=120)
        renewed = {one.job.name: one.id for one in read_jobs(folder)["slurm"]}
        assert [name for name in names if renewed[name] != jobs[name].id] == [victim]
        all_over(cluster, folder)
    text = zygote.run("sweep", *args, env=env, timeout_s=120)
    rows = table(folder)
    assert len(rows) == 8 and {row["status"] for row in rows.values()} == {"done"} and "best: " in text
    for name, stamp in finished.items():
        assert (folder / "runs" / name / "run.json").stat().st_mtime_ns == stamp


def test_workers_of_an_array_search_together(cluster, zygote, live, tmp_path):
    folder, env = tmp_path / "s", {"PATH": os.environ["PATH"]}
    args = [*live, "lr=tag(log,interval(1e-4,1e-1))", "sweep.trials=4", "sweep.batch=2", "sweep.workers=2"]
    assert "search" in zygote.run("sweep", *args, f"sweep.dir={folder}", env=env, timeout_s=120)
    all_over(cluster, folder)
    text = zygote.run("sweep", *args, f"sweep.dir={folder}", env=env, timeout_s=120)
    assert len(table(folder)) == 4 and "best: " in text
    names = [one.job.name for one in read_jobs(folder)["slurm"]]
    assert names == ["shards", "worker-0", "worker-1"]
