"""`sae-train VERB [key=value ...]`: finds the verb, runs it, and turns what ends it into an exit code."""

import ctypes
import errno
import importlib
import os
import platform
import signal
import sys
import traceback

from sae_train.cli.help import overview
from sae_train.cli.multirun import is_sweep
from sae_train.cli.output import nobody_reads, tolerate_lost_messages
from sae_train.cli.signals import StopSignals
from sae_train.errors import InputError, NumericsError, StoppedEarly
from sae_train.files import CorruptFile
from sae_train.redact import printable, redact
from sae_train.registry import nearest
from sae_train.stop import Interrupted

VERBS = {
    "train": "harvest activations and train SAEs on them; continues the run that is there",
    "sweep": "many SAEs or runs at once: a grid on one harvest, jobs over shared shards, or a search",
    "plan": "memory, disk and time of a run, before anything starts",
    "harvest": "write activation shards to disk, once, for any number of runs",
    "eval": "held-out metrics of a run or of a published SAE",
    "publish": "put the SAEs of finished runs on the Hugging Face hub",
    "export": "an SAE in another library's format, proved by reading it back",
    "import": "another library's SAE as one of ours",
    "status": "progress, rate and last checkpoint of runs, and their jobs",
}
MODULES = {"import": "import_sae"}
"""Where a verb's module has another name."""


OUTSIDE_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE),
    *(errno.EMFILE, errno.ENFILE),
}
"""Of a disk that is full or fails, or a process out of descriptors, wherever that is met."""
NOBODY_READS = 128 + signal.SIGPIPE
"""What a shell says of a command that this ends."""
M_ARENA_MAX = -8
"""glibc's number for the most arenas that malloc may use."""


def one_arena() -> None:
    """Have all threads share one heap.

    The thread that harvests and the one that trains hand tensors of megabytes to each other. With glibc's
    default, an arena for each, the resident size creeps up in a long run; with one it stays level.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed. torch has a type for it on accelerators only."""
    told = ("can't allocate memory", "Cannot allocate memory", "can't start new thread")
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(text in str(error) for text in told)
    )


def shown(message: str, keep: str = "") -> str:
    """A message as the terminal may have it: it can quote what a stranger wrote, or what nobody may see."""
    return printable(str(redact(message)), keep)


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code (0 done, 1 a bug, 2 input, 3 numerics, 75 stopped and saved,
    141 nobody reads the output any more)."""
    tolerate_lost_messages()
    try:
        code = command(argv)
        sys.stdout.flush()
        return code
    except Exception as error:
        if isinstance(error, BrokenPipeError) and nobody_reads():
            return NOBODY_READS
        # A bug: its traceback is for whoever mends it, but it may quote secrets. wandb replaces
        # sys.excepthook by one that prints everything, so this is the place.
        print(shown("".join(traceback.format_exception(error)), keep="\n"), end="", file=sys.stderr)
        return 1


def command(argv: list[str] | None) -> int:
    """Run one command, and turn what may be expected to end it into an exit code."""
    one_arena()
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    args = sys.argv[1:] if argv is None else list(argv)
    if not args or args[0] in ("-h", "--help", "help"):
        print(overview(VERBS))
        return 0
    verb, rest = args[0], args[1:]
    try:
        if verb not in VERBS:
            raise InputError("command", verb, nearest(verb, list(VERBS)))
        if "-h" in rest or "--help" in rest:
            print(importlib.import_module("sae_train.cli.keys").verb_help(verb))
            return 0
        if verb == "train" and is_sweep(rest):
            verb = "sweep"
        # Each command pulls in torch and more; loading one only when it runs keeps --help immediate.
        with StopSignals():  # those seconds too: a scheduler may change its mind at any time
            code: int = importlib.import_module(f"sae_train.cli.{MODULES.get(verb, verb)}").run(rest)
        return code
    except (InputError, NumericsError, StoppedEarly) as error:
        print(shown(f"sae-train {verb}: {error}"), file=sys.stderr)
        return error.exit_code
    except CorruptFile as error:
        print(shown(f"sae-train {verb}: {error} (expected a file that this release wrote)"), file=sys.stderr)
        return InputError.exit_code
    except OSError as error:
        if error.errno not in OUTSIDE_ERRORS:
            raise
        print(
            shown(
                f"sae-train {verb}: {error}; what was saved before is whole: once that is mended, the same "
                "command continues"
            ),
            file=sys.stderr,
        )
        return StoppedEarly.exit_code
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        asked = str(error).splitlines()[0] if str(error) else "no more to be had"
        print(
            shown(
                f"sae-train {verb}: out of memory ({asked}); lower train.batch_tokens, source.shard_tokens, "
                "eval.tokens or sae.d_sae. Checkpoints are whole"
            ),
            file=sys.stderr,
        )
        return InputError.exit_code
    except Interrupted as error:
        print(f"sae-train {verb}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"sae-train {verb}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
