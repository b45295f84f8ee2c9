"""The batch script: what it asks the cluster for, that nothing in it is taken apart, what is refused."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sae_train.cli.compose import compose
from sae_train.config import run_folder, to_config
from sae_train.errors import InputError
from sae_train.launch.base import LAUNCHERS, Job
from sae_train.launch.config import LaunchConfig
from sae_train.launch.local import PROGRAM
from sae_train.launch.script import batch_script
from sae_train.launch.slurm import Slurm
from sae_train.train.resume import check_resume

NASTY = (
    "train",
    "a b",
    "it's",
    'say "x"',
    "$HOME",
    "`id`",
    "$(id)",
    "a;b&c|d",
    "é\\n",
    "#no",
    "-x",
    "a\nb",
    "*",
)
ROOT = Path(__file__).resolve().parents[2]
HERE = Path("/somewhere/50% of it's")


def options(text: str) -> dict[str, str]:
    """What follows #SBATCH, as it stands there."""
    lines = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")]
    return dict(line.partition("=")[::2] for line in lines)


def script(config: LaunchConfig, *jobs: Job, after: tuple[str, ...] = ()) -> str:
    return batch_script(config, jobs or (Job("one", ("train",)),), HERE / "logs", HERE, after)


def commands(text: str, task: int | None = None) -> list[str]:
    """The command that bash makes of a script, for one task of an array."""
    start, end = (
        text.index('case "$SLURM_ARRAY' if task is not None else "command=("),
        text.index("\n# Signals"),
    )
    shown = text[start:end] + '\nprintf "%s\\0" "${command[@]}"'
    env = {} if task is None else {"SLURM_ARRAY_TASK_ID": str(task)}
    done = subprocess.run(["bash", "-c", shown], capture_output=True, check=True, env=env)
    return done.stdout.decode().split("\0")[:-1]


def test_every_key_becomes_the_option_that_it_is_named_after():
    config = LaunchConfig(
        partition="gpu",
        account="acc-1",
        qos="high",
        nodes=2,
        gpus_per_node=8,
        cpus_per_task=6,
        mem_gb=100,
        time="1-04:00:00",
        signal_s=300,
        extra={
            "constraint": "a100&nvlink",
            "exclusive": True,
            "comment": 'a "b" #c\\',
            "oversubscribe": False,
        },
    )
    assert options(script(config, after=("17", "18_3"))) == {
        "job-name": "one",
        "dependency": "afterok:17:18_3",
        "kill-on-invalid-dep": "yes",
        "partition": "gpu",
        "account": "acc-1",
        "qos": "high",
        "nodes": "2",
        "ntasks-per-node": "8",
        "gpus-per-node": "8",
        "cpus-per-task": "6",
        "mem": "100G",
        "time": "1-04:00:00",
        "signal": "USR1@300",
        "requeue": "",
        "open-mode": "append",
        "chdir": '"/somewhere/50% of it\'s"',
        "constraint": '"a100&nvlink"',
        "exclusive": "",
        "comment": '"a \\"b\\" #c\\\\"',
        "output": '"/somewhere/50%% of it\'s/logs/slurm-%j.log"',
    }


def test_what_is_not_asked_for_is_left_to_the_cluster():
    told = options(script(LaunchConfig(requeue=0, signal_s=0)))
    assert set(told) == {"job-name", "nodes", "ntasks-per-node", "no-requeue", "open-mode", "chdir", "output"}
    assert told["ntasks-per-node"] == "1"


def test_several_jobs_are_one_array_of_which_each_task_runs_its_own():
    jobs = [Job(f"job-{i}", ("train", f"run.seed={i}", *NASTY)) for i in range(4)]
    text = script(LaunchConfig(parallel=2), *jobs)
    assert options(text)["array"] == "0-3%2"
    assert options(text)["output"].endswith('/slurm-%A_%a.log"')
    for i, job in enumerate(jobs):
        assert commands(text, i) == [*PROGRAM, *job.args]


def test_no_argument_is_taken_apart_or_run_by_the_shell():
    assert commands(script(LaunchConfig(), Job("one", NASTY))) == [*PROGRAM, *NASTY]


@pytest.mark.parametrize(
    "config", [LaunchConfig(), LaunchConfig(setup=["module load 'x y'", "a=1 # b"], nodes=3)]
)
def test_bash_takes_the_whole_script(config):
    done = subprocess.run(["bash", "-n"], input=script(config), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_set_up_comes_before_the_run_and_its_failure_ends_the_job():
    text = script(LaunchConfig(setup=["source 'my env/bin/activate'", "false"]))
    lines = text[text.index("# The processes") : text.index("srun --kill")]
    ready = 'note() { :; }\nscontrol() { echo n1; }\nSLURM_JOB_ID=7\nsource() { echo "got $1"; }\n'
    ready += text[text.index("unready()") : text.index("note started")]
    done = subprocess.run(["bash", "-c", ready + lines + "echo not reached"], capture_output=True, text=True)
    assert done.stdout == "got my env/bin/activate\nlaunch.setup failed: false\n"
    assert done.returncode == 2


def test_an_image_is_an_option_of_srun_and_has_its_own_sae_train():
    text = script(LaunchConfig(container_image="nvcr.io#x/y:1", container_mounts=["/data:/data"]))
    (line,) = [line for line in text.splitlines() if line.startswith("srun ")]
    assert "--container-image=nvcr.io#x/y:1" in line
    assert f"--container-mounts={HERE}:{HERE},/data:/data".replace("'", "'\"'\"'") in line
    assert commands(text) == ["sae-train", "train"]


PROGRAMS = {
    "srun": """trap 'echo "srun got USR1" >> "$CALLS"; exit "${ASKED:-$CODE}"' USR1
echo up >> "$CALLS"
if [ "${SIGNAL:-early}" != early ]; then kill -s "$SIGNAL" "$PPID"; fi
if [ -n "${SIGNAL:-}" ]; then for _ in $(seq 200); do sleep 0.05; done; fi
exit "$CODE" """,
    "scontrol": """case "$1" in show) echo node1;; *) echo "scontrol $*" >> "$CALLS";; esac""",
    "squeue": """echo "$STATE" """,
}
"""In the place of Slurm's: ends of `srun` that a real one has in a race only, states that it passes by."""


@pytest.mark.parametrize(
    ("told", "code", "back"),
    [
        ({"CODE": "0"}, 0, False),
        ({"CODE": "75"}, 75, True),
        ({"CODE": "2"}, 2, False),
        ({"CODE": "75", "STATE": "COMPLETING"}, 75, False),
        ({"CODE": "75", "SLURM_RESTART_COUNT": "99"}, 75, True),
        ({"CODE": "75", "SLURM_RESTART_COUNT": "100"}, 75, False),
        ({"CODE": "138"}, 75, True),  # USR1, 10, before there was a handler
        ({"CODE": "140"}, 75, True),  # USR2, 12
        ({"CODE": "143"}, 75, True),  # TERM, 15
        ({"CODE": "137"}, 137, False),  # KILL, 9: nobody asked it to stop
        *(({"CODE": "1", "ASKED": "75", "SIGNAL": name}, 75, True) for name in ("TERM", "USR1", "USR2")),
        ({"CODE": "1", "ASKED": "0", "SIGNAL": "TERM"}, 75, True),  # an srun that does not wait for its tasks
        ({"CODE": "1", "ASKED": "3", "SIGNAL": "TERM"}, 3, False),
        ({"CODE": "1", "ASKED": "75", "SIGNAL": "early"}, 75, True),  # while launch.setup runs
    ],
)
def test_what_the_script_makes_of_the_end_of_a_run(told, code, back, tmp_path):
    for name, text in PROGRAMS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    early = told.get("SIGNAL") == "early"
    config = LaunchConfig(setup=["kill -USR1 $$"] if early else [])
    own = batch_script(config, [Job("one", ("train",))], tmp_path, tmp_path)
    calls = tmp_path / "calls"
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(calls), "STATE": "RUNNING"}
    env |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NAME": "one", **told}
    done = subprocess.run(["bash", "-c", own], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    seen = calls.read_text().splitlines()
    assert (seen[-1:] == ["scontrol requeue 7"]) == back
    if not early:  # else the signal may come before there is a handler, and end srun
        passed_on = ["srun got USR1"] if "SIGNAL" in told else []
        assert seen == ["up", *passed_on, *(["scontrol requeue 7"] if back else [])]
    legs = [line.split() for line in (tmp_path / "slurm-7.legs").read_text().splitlines()]
    assert [(leg[0], leg[-1]) for leg in legs][1] == ("ended", str(code)) and legs[0][0] == "started"
    assert ("not put back into the queue: the job is COMPLETING" in done.stdout) == (
        told.get("STATE") is not None
    )


def test_how_often_a_job_goes_back_is_in_the_script():
    assert re.search(
        r'= 75 \] && \[ "\$\{SLURM_RESTART_COUNT:-0\}" -lt 7 \]', script(LaunchConfig(requeue=7))
    )


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("partition", "a b", "name"),
        ("partition", "x\n#SBATCH --uid=0", "name"),
        ("nodes", 0, "from 1"),
        ("gpus_per_node", -1, "from 0"),
        ("signal_s", 70000, "65535"),
        ("time", "14400", "in quotes"),
        ("time", "4:00", "H:MM:SS"),
        ("time", "0:01:00", "fewer seconds"),
        ("setup", ["a\nb"], "one line"),
        ("container_mounts", ["/a:/b"], "image"),
        ("container_image", "", "one line"),
        ("extra", {"wrap": "id"}, "no key for"),
        ("extra", {"output": "x"}, "no key for"),
        ("extra", {"A b": 1}, "long name"),
        ("extra", {"comment": "a\nb"}, "one line"),
        ("extra", "x", "options"),
    ],
)
def test_values_that_cannot_be_are_refused_by_their_key(key, value, wanted):
    with pytest.raises(InputError, match=wanted) as refused:
        LaunchConfig(**{key: value})
    assert refused.value.field.startswith("launch.")


@pytest.mark.parametrize("name", ["", "a/b", "..", "-x", "a b", "a\n"])
def test_a_job_whose_name_cannot_be_a_file_is_refused(name, tmp_path):
    with pytest.raises(InputError, match="letters"):
        Slurm(LaunchConfig(name="slurm")).submit([Job(name, ("train",))], tmp_path)


@pytest.mark.parametrize("where", ["args", "setup", "extra"])
def test_a_secret_gets_into_no_script(where, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_API_TOKEN", "s3cret-s3cret")
    hidden = "x=s3cret-s3cret"
    config = {"setup": {"setup": [hidden]}, "extra": {"extra": {"comment": hidden}}}.get(where, {})
    args = ("train", hidden) if where == "args" else ("train",)
    with pytest.raises(InputError, match="MY_API_TOKEN") as refused:
        Slurm(LaunchConfig(name="slurm", **config)).submit([Job("one", args)], tmp_path)
    assert "s3cret" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_a_host_without_slurm_is_told_so_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="there is no sbatch here"):
        Slurm(LaunchConfig(name="slurm")).submit([Job("one", ("train",))], tmp_path)


def test_neither_submitit_nor_a_launcher_of_hydra_is_needed(monkeypatch):
    for name in ("submitit", "hydra_plugins.hydra_submitit_launcher"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    assert "submitit" not in (ROOT / "constraints.txt").read_text()
    config = to_config(compose("train", ["experiment=demo", "launch=slurm"]))
    assert isinstance(LAUNCHERS.build(config.launch), Slurm)


def test_where_a_run_is_launched_is_no_part_of_what_it_is():
    here, there = (
        to_config(compose("train", ["experiment=demo", *more]))
        for more in ([], ["launch=slurm", "launch.partition=gpu", "launch.extra={constraint: a100}"])
    )
    assert there.launch.gpus_per_node == 1
    assert run_folder(here) == run_folder(there)
    check_resume({"launch": {"nodes": 1}, "a": 1}, {"launch": {"nodes": 4}, "a": 1})


def test_a_harvest_is_one_process_whatever_the_runs_that_wait_for_it_are(tmp_path, monkeypatch):
    """Asked of an `sbatch` that takes any script: what a real one makes of it is tests/cluster's to say."""
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text("#!/bin/sh\ncat > /dev/null\necho 17\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:/usr/bin:/bin")
    launcher = Slurm(LaunchConfig(name="slurm", nodes=2, gpus_per_node=8))
    for folder, job in (("h", Job("shards", ("harvest",), alone=True)), ("r", Job("run", ("train",)))):
        launcher.submit([job], tmp_path / folder)
    harvest, run = ((tmp_path / f / "logs" / "slurm-17.sh").read_text() for f in ("h", "r"))
    assert "--nodes=1\n" in harvest and "--ntasks-per-node=1\n" in harvest
    assert "--gpus-per-node=1\n" in harvest
    assert "--nodes=2\n" in run and "--ntasks-per-node=8\n" in run and "--gpus-per-node=8\n" in run
