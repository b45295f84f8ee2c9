"""A process that has imported everything and forks a child for each command: a run starts in milliseconds.

Real processes to kill, stop and trace, without paying for `import torch` each time. Reads one JSON request
per line and answers each with one line:

    {"run": [args], "out": PATH, "env": {...}, "rows": PATH or null, "before": CODE or null, "plots": BOOL}
        -> pid
    {"poll": pid}
        -> exit code or null

`rows` appends the ids of every batch that is trained on (little-endian int64, a count first) to a file;
`before` is Python run in the child before the command, for faults that no signal can make; without `plots`
the report's pictures are empty files, because drawing them takes longer than the whole run.
"""

import json
import os
import sys
import traceback
from typing import Any

import datasets  # noqa: F401
import matplotlib.figure
import torch
import transformers.models.llama.modeling_llama  # noqa: F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

# Commands import much of this when they need it, and transformers loads models lazily: seconds per child.
import sae_train.cli.eval
import sae_train.cli.harvest
import sae_train.cli.status
import sae_train.cli.train  # noqa: F401
from sae_train.cli.compose import compose
from sae_train.cli.main import main
from sae_train.train.ledger import RowLedger


def record_rows(path: str) -> None:
    add = RowLedger.add
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    def recorded(self: RowLedger, ids: torch.Tensor) -> None:
        add(self, ids)
        numbers = torch.cat([torch.tensor([len(ids)]), ids.cpu()]).numpy().astype("<i8")
        os.write(handle, numbers.tobytes())

    RowLedger.add = recorded  # type: ignore[method-assign]


def empty_picture(figure: Any, path: Any, **kwargs: Any) -> None:
    with open(path, "wb"):
        pass


def child(job: dict[str, Any]) -> int:
    out = os.open(job["out"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ.update(job.get("env") or {})
    if job.get("rows"):
        record_rows(job["rows"])
    if not job.get("plots", True):
        matplotlib.figure.Figure.savefig = empty_picture  # type: ignore[method-assign]
    try:
        if job.get("before"):
            exec(job["before"], {})
        return main(job["run"])
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 1


def serve() -> None:
    torch.set_num_threads(1)
    for verb in ("train", "harvest"):
        compose(verb, [])
    get_checkpoint_conversion_mapping("llama")  # makes a table of them all
    ended: dict[int, int] = {}
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        if "run" in job:
            pid = os.fork()
            if pid == 0:
                os.setsid()
                code = child(job)
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
            print(pid, flush=True)
        else:
            pid = job["poll"]
            if pid not in ended:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    ended[pid] = os.waitstatus_to_exitcode(status)
            print(json.dumps(ended.get(pid)), flush=True)


if __name__ == "__main__":
    serve()
    os._exit(0)  # taking down what was imported takes seconds
