"""What the tests of sweeps share: a short run on rows without a model, and how a sweep is read back."""

import csv
from pathlib import Path

SHORT = [
    "source=synthetic",
    "source.synthetic={d: 16, features: 32, groups: 4, group_size: 4, l0: 2, rows: 2000}",
    "source.holdout=0.1",
    "source.epochs=8",
    "source.shard_tokens=256",
    "source.lanes=2",
    "sae.d_sae=48",
    "train.tokens=640",
    "train.batch_tokens=32",
    "eval.tokens=100",
    "eval.every=5",
    "logger.every=2",
    "checkpoint.every=5",
    "run.threads=1",
]
"""20 steps, a tenth of a second of training."""
LONGER = ["train.tokens=9600", "checkpoint.every=20", "eval.every=100"]
"""300 steps: time to kill it in."""

FORKED = """
import os, signal, sys, types
import sae_train.launch.local as local
from sae_train.cli.main import main

class Forked:
    def __init__(self, args, stdin, stdout, stderr, env, start_new_session):
        self.returncode = None
        self.pid = os.fork()
        if self.pid:
            return
        code = 1
        try:
            os.setsid()
            nothing = os.open(os.devnull, os.O_RDONLY)
            for number, to in enumerate((nothing, stdout.fileno(), stderr.fileno())):
                os.dup2(to, number)
            os.closerange(3, 4096)
            os.environ.clear()
            os.environ.update(env)
            code = main(list(args[args.index("sae_train") + 1:]))
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def poll(self):
        if self.returncode is None:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if found else None
        return self.returncode

    def wait(self):
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode

    def terminate(self):
        if self.poll() is None:
            os.kill(self.pid, signal.SIGTERM)

local.subprocess = types.SimpleNamespace(Popen=Forked, DEVNULL=None)
"""
"""Code for the zygote's `before=`: runs of a sweep are forks of it, which have everything imported already.

Processes as real as others, which start in milliseconds and not in seconds. Only who looks for them by their
command line does not find them."""


def table(folder: Path) -> dict[str, dict[str, str]]:
    """The rows of a sweep's table.csv by name."""
    with open(folder / "table.csv", newline="") as file:
        return {row["name"]: row for row in csv.DictReader(file)}
