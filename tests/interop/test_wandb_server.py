"""Runs that log to a real server on this machine, to one that dies, hangs or comes late, and `wandb sweep`.

    make test-interop

The server is openwandb, in an environment of its own (`peers/wandb_server.py`); client and agent are wandb's.
openwandb cannot be asked whether an artifact has arrived, which a run reports and gets over.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from faults.tools import SYNTHETIC, at_step, send
from interop.environments import PEERS, python_of

pytestmark = [pytest.mark.interop, pytest.mark.timeout(1200)]

ONLINE = [*SYNTHETIC, "train.tokens=1280", "eval.every=0", "logger.wandb=true", "logger.wandb_mode=online"]
LOGGED = list(range(2, 41, 2))
PATIENT = (
    "import sae_train.sinks, sae_train.log; sae_train.sinks.WANDB_TIMEOUT_S = 100.0\n"
    "sae_train.log.FINISH_TIMEOUT_S = 250.0\n"
)
"""For a server that is there, on a busy machine."""


class Server:
    """openwandb in a process of its own; what it was told survives a restart."""

    def __init__(self, folder: Path) -> None:
        self.python, self.folder = python_of("openwandb"), folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        (folder / "home").mkdir()
        self.env = {
            "WANDB_BASE_URL": self.url,
            "WANDB_API_KEY": "local" + "0" * 35,
            "HOME": str(folder / "home"),
        }
        self.env |= {"XDG_CACHE_HOME": str(folder / "home" / "cache")}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        script = PEERS / "wandb_server.py"
        command = [
            str(self.python),
            str(script),
            "--port",
            str(self.port),
            "--data",
            str(self.folder / "data"),
        ]
        with open(self.folder / "server.log", "ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | self.env)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                self.ask("/api/v2/projects")
                return
            except urllib.error.URLError:
                time.sleep(0.1)
        raise AssertionError((self.folder / "server.log").read_text())

    def send(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def ask(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return json.loads(answer.read())

    def names(self, project: str) -> list[str]:
        """Ids of a project's runs."""
        return [run["run_id"] for run in self.ask(f"/api/v2/projects/default/{project}/runs")["runs"]]

    def run(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.ask(f"/api/v2/runs/{name}")["run"]
        return found

    def steps(self, name: str, key: str = "main/loss") -> list[int]:
        """Steps at which the server has a number, each as often as it has one."""
        try:
            points = self.ask(f"/api/v2/runs/{name}/metrics")["metrics_by_key"].get(key, [])
        except urllib.error.HTTPError:  # it does not know the run yet
            return []
        return sorted(point["step"] for point in points)

    def wandb(self, *args: str, timeout_s: float = 300) -> str:
        """A command of the real client."""
        command = [sys.executable, "-m", "wandb", *args]
        done = subprocess.run(
            command,
            env=os.environ | self.env,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            cwd=self.folder,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    pytest.importorskip("wandb")
    made = Server(tmp_path)
    try:
        yield made
    finally:
        made.stop()


def id_of(run: Path) -> str:
    name: str = json.loads((run / "run.json").read_text())["chosen"]["wandb_id"]
    return name


def test_an_online_run_stopped_and_continued_is_one_run_with_every_step(zygote, server, tmp_path):
    server.start()
    run = tmp_path / "run"
    stop = PATIENT + at_step(13, send(signal.SIGTERM))
    again = {"env": server.env, "plots": False, "timeout_s": 400}
    zygote.run("train", *ONLINE, f"run.dir={run}", before=stop, code=75, **again)
    zygote.run("train", *ONLINE, f"run.dir={run}", before=PATIENT, **again)
    name = id_of(run)
    assert sorted(set(server.steps(name))) == LOGGED
    assert server.names("sae-train") == [name]
    assert server.run(name)["state"] == "finished"
    kinds = {made["artifact_type"] for made in server.ask(f"/api/v2/runs/{name}/artifacts")["artifacts"]}
    assert {"model", "log_feature_sparsity", "report"} <= kinds


@pytest.mark.parametrize("fault", ["killed", "frozen"])
def test_a_server_that_dies_or_hangs_while_a_run_goes_neither_holds_it_up_nor_loses_a_step(
    zygote, server, tmp_path, fault
):
    server.start()
    run = tmp_path / "run"
    gate = tmp_path / "gone"
    wait = f"next(1 for _ in range(60_000) if os.path.exists({str(gate)!r}) or time.sleep(0.01))"
    process = zygote.start(
        *("train", *ONLINE, f"run.dir={run}"),
        env=server.env,
        before=PATIENT.replace("100.0", "30.0") + at_step(20, wait),
        plots=False,
    )
    process.wait_for_step(run, 18)
    deadline = time.monotonic() + 120
    while not server.steps(id_of(run)):
        assert time.monotonic() < deadline, process.text()
        time.sleep(0.1)
    server.stop() if fault == "killed" else server.send(signal.SIGSTOP)
    gate.touch()
    assert process.wait(timeout_s=500) == 0, process.text()
    said = process.text()
    assert "wandb did not take everything" in said or "wandb stopped" in said, said
    (online,) = run.glob("wandb/run-*")
    assert f"`wandb sync --include-online {online}` uploads it" in said, said
    server.start() if fault == "killed" else server.send(signal.SIGCONT)
    server.wandb("sync", "--include-online", str(online))
    assert sorted(set(server.steps(id_of(run)))) == LOGGED


def test_a_server_that_comes_later_gets_the_run_that_was_kept_offline(zygote, server, tmp_path):
    run = tmp_path / "run"
    zygote.run("train", *ONLINE, f"run.dir={run}", env=server.env, plots=False, timeout_s=400)
    server.start()
    (kept,) = run.glob("wandb/offline-run-*")
    server.wandb("sync", str(kept))
    assert server.steps(id_of(run)) == LOGGED


def test_legs_kept_offline_are_uploaded_as_one_run(zygote, server, tmp_path):
    server.start()
    run = tmp_path / "run"
    offline = [*ONLINE, "logger.wandb_mode=offline", f"run.dir={run}"]
    stop = at_step(13, send(signal.SIGTERM))
    zygote.run("train", *offline, env=server.env, before=stop, code=75, plots=False)
    zygote.run("train", *offline, env=server.env, plots=False)
    kept = sorted(map(str, run.glob("wandb/offline-run-*")))
    assert len(kept) == 2
    server.wandb("sync", *kept)
    assert server.steps(id_of(run)) == LOGGED


def test_wandbs_own_sweep_and_agent_train_every_point_of_a_grid(server, tmp_path):
    """Each run is the agent's: its id, in its project, with its values."""
    server.start()
    sweep = {
        "method": "grid",
        "metric": {"name": "main/heldout/fvu", "goal": "minimize"},
        "parameters": {"sae.activation.k": {"values": [2, 4]}, "optim.lr": {"value": 0.003}},
        "command": [
            *("${env}", sys.executable, "-m", "sae_train", "train"),
            *ONLINE,
            "${args_no_hyphens}",
        ],
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    said = server.wandb("sweep", "--project", "swept", "sweep.yaml")
    name = said.split("wandb agent ")[-1].split()[0].strip("`")
    server.wandb("agent", "--count", "4", name, timeout_s=1000)
    runs = sorted((tmp_path / "runs").iterdir())
    found = []
    for run in runs:
        config = yaml.safe_load((run / "config.yaml").read_text())
        assert server.steps(id_of(run)) == LOGGED
        assert server.run(id_of(run))["state"] == "finished"
        assert server.steps(id_of(run), "main/heldout/fvu"), "what the sweep compares"
        found.append((config["sae"]["activation"]["k"], config["optim"]["lr"]))
    assert sorted(found) == [(2, 0.003), (4, 0.003)]
    assert sorted(server.names("swept")) == sorted(map(id_of, runs)), "the agent's ids, in its project"
