"""Runs without any network: in a network namespace of their own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from faults.disk_tools import needs_strace

SHORT = ["train.tokens=320", "eval.every=0", "checkpoint.every=5"]


def needs_namespaces() -> None:
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("network namespaces need root and util-linux")
    done = subprocess.run(["unshare", "-n", "true"], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"no network namespaces here: {done.stderr.strip()}")


def alone(folder: Path, *args: str) -> tuple[int, str, str]:
    """A command where no interface is up: exit code, output, and calls that could reach an address."""
    calls = folder / f"{args[0]}.calls"
    offline = {"HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"}
    known = {key: value for key, value in os.environ.items() if key not in offline}
    known |= {"HOME": str(folder), "HF_HOME": str(folder / "hf"), "OMP_NUM_THREADS": "1"}
    tracing = ["strace", "-f", "--seccomp-bpf", "-qq", "-e", "trace=connect,sendto", "-o", str(calls)]
    command = ["unshare", "-n", *tracing, sys.executable, "-m", "sae_train", *args]
    done = subprocess.run(command, env=known, capture_output=True, text=True, timeout=500)
    return done.returncode, done.stdout + done.stderr, calls.read_text()


def reached(calls: str) -> list[str]:
    return [line for line in calls.splitlines() if "AF_INET" in line]


@pytest.mark.slow
@pytest.mark.timeout(900)  # three whole processes, traced
def test_without_an_address_in_the_command_nobody_is_asked_and_none_is_missed(tiny, tmp_path):
    needs_namespaces()
    needs_strace()
    run = tmp_path / "run"
    code, text, calls = alone(tmp_path, "train", *tiny, *SHORT, f"run.dir={run}")
    assert code == 0 and (run / "report.html").is_file(), text
    assert reached(calls) == []
    code, text, calls = alone(tmp_path, "publish", f"run={run}", "repo=me/saes", "dry_run=true")
    assert code == 0 and "nobody was asked" in text, text
    assert reached(calls) == []
    asked = [arg for arg in tiny if not arg.startswith("corpus.name=")]
    once = ["corpus.attempts=1", "corpus.name=http://127.0.0.1:9/x.jsonl", f"out={tmp_path / 'out'}"]
    code, text, calls = alone(tmp_path, "harvest", *asked, *SHORT, *once)
    assert code == 75 and "Traceback" not in text, text
    assert reached(calls), "an address that was asked for would be seen"
