"""The manifests of docs/cluster: their commands are ours, their numbers agree, their shells pass codes on.

That Kubernetes and SkyPilot can read them is asked of their own schemas in tests/interop/test_schemas.py.
"""

import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from sae_train.cli.compose import compose
from sae_train.cli.main import VERBS
from sae_train.config import to_config
from sae_train.member_set import members

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "cluster"
PAGE = ROOT / "docs" / "cluster.md"


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def job_spec(document: dict[str, Any]) -> dict[str, Any]:
    """The batch/v1 JobSpec of a Job or of a JobSet's only job."""
    if document["kind"] == "Job":
        return document["spec"]
    (job,) = document["spec"]["replicatedJobs"]
    assert job["replicas"] == 1
    return job["template"]["spec"]


JOBS = {
    f"{path.name}": job_spec(document)
    for path in sorted(FOLDER.glob("*.yaml"))
    for document in documents(path.name)
    if document.get("kind") in ("Job", "JobSet")
}


def container(name: str) -> dict[str, Any]:
    (only,) = JOBS[name]["template"]["spec"]["containers"]
    return only


def arguments(name: str) -> list[str]:
    """What follows `sae-train` on the command line of a manifest."""
    if name == "skypilot.yaml":
        return commands(documents(name)[0]["run"])[0]
    args = container(name)["args"]
    return args[args.index("sae-train") + 1 :] if "command" in container(name) else args


def commands(text: str) -> list[list[str]]:
    """Arguments of every `sae-train` in lines of shell; a backslash goes on with the next line."""
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    found = [re.search(r"(?:^|\s)sae-train (?=[a-z])([^;]*)", line) for line in lines]
    return [shlex.split(match[1].rstrip(" &"), comments=True) for match in found if match]


def test_there_are_manifests_of_every_kind():
    assert sorted(path.name for path in FOLDER.glob("*.yaml")) == [
        *("harvest.yaml", "job.yaml", "jobset.yaml", "skypilot.yaml", "storage.yaml"),
    ]
    assert sorted(JOBS) == ["harvest.yaml", "job.yaml", "jobset.yaml"]


@pytest.mark.parametrize("name", ["harvest.yaml", "job.yaml", "jobset.yaml", "skypilot.yaml"])
def test_the_command_of_a_manifest_is_one_that_sae_train_takes(name):
    verb, *overrides = arguments(name)
    composed = compose(verb, overrides)
    if verb == "train":
        config = to_config(composed)
        assert config.run.dir is not None and config.run.dir.startswith("/data/")
        assert len(members(config, composed)) == (32 if "grid" in " ".join(overrides) else 1)
    else:
        assert composed.out.startswith("/shards/")


@pytest.mark.parametrize("name", sorted(JOBS))
def test_a_pod_is_no_root_writes_nowhere_but_its_volumes_and_holds_no_secret(name):
    pod, only = JOBS[name]["template"]["spec"], container(name)
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 10001
    assert "USER 10001:10001" in (ROOT / "Dockerfile").read_text()
    inside = only["securityContext"]
    assert inside["readOnlyRootFilesystem"] and not inside["allowPrivilegeEscalation"]
    assert inside["capabilities"] == {"drop": ["ALL"]}
    assert not pod["automountServiceAccountToken"]
    mounts = {mount["mountPath"]: mount["name"] for mount in only["volumeMounts"]}
    volumes = {volume.pop("name"): volume for volume in map(dict, pod["volumes"])}
    assert mounts.keys() == {"/data", "/shards", "/tmp", "/dev/shm"}
    claims = {document["metadata"]["name"] for document in documents("storage.yaml")}
    used = {volumes[mounts[path]]["persistentVolumeClaim"]["claimName"] for path in ("/data", "/shards")}
    assert used == claims
    assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    for variable in only["env"]:
        secret = re.search("TOKEN|KEY|SECRET|PASSWORD", variable["name"])
        assert ("valueFrom" in variable) == bool(secret), variable
        if secret:
            assert variable["valueFrom"]["secretKeyRef"]["name"] == "sae-train"


@pytest.mark.parametrize("name", ["harvest.yaml", "job.yaml"])
def test_a_job_starts_a_run_again_that_was_stopped_and_gives_up_on_one_that_cannot_work(name):
    rules = JOBS[name]["podFailurePolicy"]["rules"]
    codes = {rule["action"]: rule["onExitCodes"]["values"] for rule in rules if "onExitCodes" in rule}
    assert codes == {"FailJob": [2, 3], "Ignore": [75]}
    assert {"type": "DisruptionTarget", "status": "True"} in rules[-1]["onPodConditions"]
    assert rules[-1]["action"] == "Ignore"
    assert all(rule["onExitCodes"]["containerName"] == "train" for rule in rules if "onExitCodes" in rule)
    assert container(name)["name"] == "train"
    assert JOBS[name]["template"]["spec"]["restartPolicy"] == "Never"
    assert JOBS[name]["template"]["spec"]["terminationGracePeriodSeconds"] >= 60


def test_the_job_set_agrees_with_itself():
    (document,) = documents("jobset.yaml")
    spec, only = job_spec(document), container("jobset.yaml")
    env = {variable["name"]: variable.get("value") for variable in only["env"]}
    assert int(env["NODES"]) == spec["completions"] == spec["parallelism"]
    assert int(env["GPUS"]) == only["resources"]["limits"]["nvidia.com/gpu"]
    name, (job,) = document["metadata"]["name"], document["spec"]["replicatedJobs"]
    assert env["MASTER_ADDR"] == f"{name}-{job['name']}-0-0.{name}"
    processes = int(env["NODES"]) * int(env["GPUS"])
    assert f"source.lanes={processes}" in arguments("jobset.yaml")
    failed, restarted = spec["podFailurePolicy"]["rules"][1]["onExitCodes"], document["spec"]["failurePolicy"]
    assert (failed["operator"], failed["values"]) == ("NotIn", [2, 3]) and spec["backoffLimit"] == 0
    assert restarted["maxRestarts"] > 0
    assert restarted["rules"][0]["onJobFailureReasons"] == ["BackoffLimitExceeded"]


STAND_IN = """#!/bin/sh
echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR:$MASTER_PORT $*" > "$OUT/$RANK.begun"
trap 'sleep 0.2; exit 75' TERM
while [ ! -e "$OUT/go" ]; do sleep 0.02; done
exit $(cat "$OUT/$RANK.code" 2>/dev/null || echo 0)
"""
"""In the place of sae-train: says how it was started, and leaves as it is told."""


def shell_of(name: str, command: str, arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """How a node starts its two processes, with another command in the place of ours; node 1 of 2."""
    if name == "jobset.yaml":
        script = container(name)["args"][0]
        env = {"JOB_COMPLETION_INDEX": "1", "NODES": "2", "GPUS": "2", "MASTER_ADDR": "localhost"}
        return ["bash", "-c", script, command, *arguments], env | {"MASTER_PORT": "29500"}
    script = documents(name)[0]["run"]
    env = {"SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "2"}
    env["SKYPILOT_NODE_IPS"] = "localhost\nelsewhere"
    (ours,) = re.findall(r"sae-train train .*?(?= &)", script, re.DOTALL)
    return ["bash", "-c", script.replace(ours, shlex.join([command, *arguments]))], env


@pytest.mark.parametrize("name", ["jobset.yaml", "skypilot.yaml"])
@pytest.mark.parametrize(("codes", "left_with"), [({}, 0), ({2: 2, 3: 2}, 2), ({2: 75}, 75), ({3: 3}, 3)])
def test_a_node_starts_a_process_for_each_gpu_and_leaves_with_the_code_of_the_run(
    name, codes, left_with, tmp_path
):
    process = node(name, tmp_path)
    for rank, code in codes.items():
        (tmp_path / f"{rank}.code").write_text(str(code))
    (tmp_path / "go").touch()
    assert process.wait(60) == left_with
    begun = [(tmp_path / f"{rank}.begun").read_text().split() for rank in (2, 3)]
    assert begun == [
        ["2", "0", "4", "localhost:29500", "train", "hook=a", "b"],
        ["3", "1", "4", "localhost:29500", "train", "hook=a", "b"],
    ]


@pytest.mark.parametrize("name", ["jobset.yaml", "skypilot.yaml"])
def test_a_node_that_is_told_to_stop_tells_its_processes_and_waits_for_them(name, tmp_path):
    process = node(name, tmp_path)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75


def node(name: str, out: Path) -> subprocess.Popen[bytes]:
    """The shell of a manifest, once both of its processes have begun."""
    command = out / "stand-in"
    command.write_text(STAND_IN)
    command.chmod(0o755)
    args, env = shell_of(name, str(command), ["train", "hook=a", "b"])
    process = subprocess.Popen(args, env=os.environ | env | {"OUT": str(out)})
    deadline = time.monotonic() + 60
    while len(list(out.glob("*.begun"))) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    return process


def test_every_command_of_the_page_is_one_that_sae_train_takes():
    found = commands("\n".join(line for line in PAGE.read_text().splitlines() if line.startswith("    ")))
    assert len(found) >= 8
    for verb, *overrides in found:
        assert verb in VERBS
        overrides = [one for one in overrides if one not in ("-m", "--multirun")]
        if verb == "plan":
            known = ("processes=", "device=", "device_gib=", "format=")
            overrides = [one for one in overrides if not one.startswith(known)]
        if verb in ("train", "plan"):
            to_config(compose("train", overrides))
        elif verb == "harvest":
            compose(verb, overrides)
