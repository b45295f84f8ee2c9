"""What is seen of a run from outside: one wandb run over all legs, with or without a server, and its machine.

wandb is the real client; what it wrote is read back with its own `wandb leet inspect`.
"""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from faults.tools import SYNTHETIC, at_step, call, send

from sae_train.log import read_metrics
from sae_train.train.system import WORST

WANDB = [*SYNTHETIC, "train.tokens=1280", "eval.every=0", "logger.wandb=true"]
"""40 steps, every second one logged."""
NOBODY = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "local" + "0" * 35}
"""A port where nobody listens, and a key to show there."""
IMPATIENT = "import sae_train.sinks; sae_train.sinks.WANDB_TIMEOUT_S = 1.0\n"


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    """wandb keeps credentials and caches in the home folder: an empty one."""
    pytest.importorskip("wandb")
    (tmp_path / "home").mkdir()
    return {"HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": str(tmp_path / "home" / "cache")}


def legs(run: Path) -> list[Path]:
    """The offline folders of a run, oldest first; what is left of an online start that failed is none."""
    found = [(path.stat().st_mtime_ns, path) for path in (run / "wandb").glob("offline-run-*/*.wandb")]
    return [path for _, path in sorted(found)]


def records(leg: Path) -> list[dict[str, Any]]:
    """What wandb finds in one leg's file."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(leg)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def of_type(found: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [record[kind] for record in found if record["type"] == kind]


def steps(found: list[dict[str, Any]]) -> list[int]:
    return [row["item"]["_step"] for row in of_type(found, "history") if "main/loss" in row["item"]]


def test_a_run_killed_and_stopped_is_one_run_at_wandb_whose_steps_go_on(zygote, tmp_path, home):
    """The first leg dies without a checkpoint, the second is asked to stop, the third ends."""
    run = tmp_path / "run"
    begun = f"next(Path({str(run)!r}).glob('wandb/offline-run-*/*.wandb'), None)"
    wait = f"next(1 for _ in range(6_000) if {begun} or time.sleep(0.01))"
    die = f"from pathlib import Path\n    {wait}\n    {send(signal.SIGKILL)}"
    unsaved = call("sae_train.checkpoint:Checkpointer.save", "time.sleep(60)")
    for before, code in (
        (unsaved + at_step(5, die), -9),
        (at_step(13, send(signal.SIGTERM)), 75),
        (None, 0),
    ):
        zygote.run("train", *WANDB, f"run.dir={run}", env=home, before=before, code=code, plots=False)
    killed, stopped, ended = legs(run)
    chosen = json.loads((run / "run.json").read_text())["chosen"]["wandb_id"]
    assert {leg.stem for leg in (killed, stopped, ended)} == {f"run-{chosen}"}
    second, third = records(stopped), records(ended)
    assert {of_type(found, "run")[0]["run_id"] for found in (second, third)} == {chosen}
    assert steps(second) == list(range(2, 13, 2)) and steps(third) == list(range(14, 41, 2))
    assert of_type(second, "preempting"), "to a server the run is to be continued"
    assert of_type(second, "exit")[0]["exit_code"] == 75
    assert not of_type(third, "preempting") and not of_type(third, "exit")[0].get("exit_code")


def test_a_server_that_is_not_there_costs_no_run_and_no_number(zygote, tmp_path, home):
    run = tmp_path / "run"
    online = [*WANDB, "logger.wandb_mode=online", f"run.dir={run}"]
    said = zygote.run("train", *online, env=home | NOBODY, before=IMPATIENT, plots=False)
    (leg,) = legs(run)
    assert said.count("is kept offline") == 1, said
    assert f"`wandb sync {leg.parent}` uploads it" in said
    found = records(leg)
    assert steps(found) == list(range(2, 41, 2))
    assert any("main/heldout/fvu" in row["item"] for row in of_type(found, "history"))
    assert of_type(found, "artifact") or of_type(found, "request"), "weights and report are recorded too"
    assert "Traceback" not in said and "left behind" not in said


def test_going_online_without_credentials_is_kept_offline_and_says_what_is_missing(zygote, tmp_path, home):
    run = tmp_path / "run"
    online = [*WANDB, "train.tokens=64", "logger.wandb_mode=online", f"run.dir={run}"]
    nowhere = {
        "WANDB_BASE_URL": NOBODY["WANDB_BASE_URL"],
        "WANDB_API_KEY": "",
        "NETRC": str(tmp_path / "none"),
    }
    said = zygote.run("train", *online, env=home | nowhere, plots=False)
    assert "no credentials: set WANDB_API_KEY" in said
    assert steps(records(legs(run)[0])) == [2]


def test_every_line_says_what_the_run_asks_of_its_machine(zygote, tmp_path):
    run = tmp_path / "run"
    slow = at_step(6, "time.sleep(1.2)")  # readings are at most a second old
    zygote.run("train", *SYNTHETIC, "train.tokens=320", f"run.dir={run}", before=slow, plots=False)
    lines = [record for record in read_metrics(run) if "main/loss" in record]
    assert len(lines) == 5
    always = {f"system/{name}" for name in WORST if not name.startswith("gpu") and name != "tokens_per_s"}
    for line in lines:
        assert always <= line.keys()
        assert 2**26 < line["system/rss_bytes"] < 2**34
    rates = [line["system/tokens_per_s"] for line in lines if "system/tokens_per_s" in line]
    assert rates and all(0 < rate < 5 * 32 / 1.2 for rate in rates), "steps 3 to 6 took more than 1.2 s"
