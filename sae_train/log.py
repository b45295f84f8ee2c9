"""What a run tells: metrics.jsonl, the record of every number, and train.log, the record of every message.

metrics.jsonl has one line per write, flushed: `{"step": 10, "tokens": 20480, "time": ..., name: value}`, with
null for what is not finite and those names under "nonfinite". A checkpoint remembers how long the file was,
and a resumed run cuts it back to that length: steps that are done again appear once. Logging never ends a
run: a full disk, or a wandb that hangs or raises, is reported once and training goes on.
"""

import errno
import importlib.util
import json
import logging
import math
import os
import re
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sae_train.errors import InputError
from sae_train.redact import printable, redact
from sae_train.sinks import Artifact, Background, TensorBoardSink, WandbSink, upload_s

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
FINISH_TIMEOUT_S = 30.0
"""The longest that the end of a run waits for wandb and TensorBoard together."""


@dataclass
class LoggerConfig:
    """Where the numbers of a run go besides metrics.jsonl, which is always written."""

    every: int = 10
    """Steps between writes. Each one reads scalars from the device, which waits for it."""
    wandb: bool = False
    """Also log to Weights & Biases."""
    wandb_mode: str = "offline"
    """offline (files under RUN/wandb; `wandb sync` uploads them) or online."""
    wandb_project: str = "sae-train"
    tensorboard: bool = False
    """Also write TensorBoard event files to RUN/tensorboard."""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise InputError("logger.every", self.every, "a number of steps of at least 1")
        if self.wandb_mode not in ("offline", "online"):
            raise InputError("logger.wandb_mode", self.wandb_mode, "offline or online")
        if not re.fullmatch(r"[^/\\#?%:\x00-\x1f]{1,128}", self.wandb_project):
            raise InputError(
                "logger.wandb_project", self.wandb_project, r"1-128 characters, none of / \ # ? % :"
            )


def new_wandb_id() -> str:
    """The id of a run at wandb: that of its environment, which a sweep's agent sets, or a new one."""
    return os.environ.get("WANDB_RUN_ID") or uuid.uuid4().hex[:12]


class MetricLog:
    """The numbers of a run: always to metrics.jsonl, and to wandb and TensorBoard when asked."""

    def __init__(
        self,
        folder: Path,
        config: LoggerConfig,
        run_config: dict[str, Any],
        resume_state: dict[str, Any] | None = None,
        check: Callable[[], None] = lambda: None,
        wandb_id: str | None = None,
    ) -> None:
        """Open the record; a run without `resume_state` starts an empty one.

        Args:
            folder: the run folder, which exists.
            config: where to log.
            run_config: plain values shown beside the numbers; secrets are redacted here.
            resume_state: `state_dict()` of the checkpoint that the run continues from.
            check: asked before each write; raises if the run folder is not ours any more.
            wandb_id: of the run there, the same in every leg; a new one where the state has none either.

        Raises:
            InputError: wandb or TensorBoard was asked for and is not installed.
            OSError: the file cannot be opened, or is a symbolic link.
        """
        for wanted, package in ((config.wandb, "wandb"), (config.tensorboard, "tensorboard")):
            if wanted and importlib.util.find_spec(package) is None:
                raise InputError(f"logger.{package}", True, f"false, or the package: pip install {package}")
        state = resume_state or {}
        self._check = check
        self.lost = 0
        """Writes that the disk refused."""
        self._step = int(state.get("step", 0))
        self._torn = False
        self._open(folder / METRICS_FILE, int(state.get("bytes", 0)))
        self._wandb_id: str | None = state.get("wandb_id") or wandb_id
        self._sinks: list[Background] = []
        self._online = config.wandb and config.wandb_mode == "online"
        self._upload_s = 0.0
        if config.wandb:
            self._wandb_id = self._wandb_id or new_wandb_id()
            shown = redact(run_config)
            wandb = WandbSink(folder, self._wandb_id, config.wandb_project, config.wandb_mode, shown)
            self._sinks.append(Background(wandb))
        if config.tensorboard:
            purge_step = self._step + 1 if resume_state else None
            self._sinks.append(Background(TensorBoardSink(folder, purge_step)))

    def _open(self, path: Path, size_bytes: int) -> None:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        found = os.fstat(handle).st_size
        if found < size_bytes:
            logger.warning("%s is shorter than the checkpoint remembers: steps are missing", path.name)
        self._bytes = min(size_bytes, found)
        os.ftruncate(handle, self._bytes)
        os.lseek(handle, self._bytes, os.SEEK_SET)
        self._file = os.fdopen(handle, "r+b", buffering=0)

    def write(self, step: int, tokens: int, scalars: dict[str, float]) -> None:
        """Record numbers of one step; on disk when this returns.

        Args:
            step: optimizer steps done.
            tokens: tokens trained on.
            scalars: name -> value; "step", "tokens", "time" and "nonfinite" are taken.

        Raises:
            StoppedEarly: the run folder is not ours any more; nothing is written over the new owner's lines.
        """
        self._check()
        scalars = redact({name: float(value) for name, value in scalars.items()})
        head = {"step": step, "tokens": tokens, "time": round(time.time(), 3)}
        assert not {*head, "nonfinite"} & scalars.keys(), "a scalar has the name of a fixed field"
        nonfinite = sorted(name for name, value in scalars.items() if not math.isfinite(value))
        record: dict[str, Any] = head | scalars | dict.fromkeys(nonfinite)
        if nonfinite:
            record["nonfinite"] = nonfinite
        self._append(json.dumps(record, allow_nan=False).encode() + b"\n")
        self._step = step
        for sink in self._sinks:
            sink.put(step, {"tokens": float(tokens)} | scalars)

    def _append(self, line: bytes) -> None:
        """One whole line or none: what a full disk took of a line is cut off before the next one."""
        try:
            self._mend()
            self._torn = True
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self.lost += 1
            if self.lost == 1:
                logger.warning("cannot write %s (%s); the run goes on without it", METRICS_FILE, error)
            return
        self._torn = False
        self._bytes += len(line)

    def _mend(self) -> None:
        if self._torn:
            self._file.truncate(self._bytes)
            self._file.seek(self._bytes)
            self._torn = False

    def keep(self, artifacts: Sequence[Artifact]) -> None:
        """Hand files to the services that keep files; the end of the run waits longer for them."""
        if self._sinks and artifacts:
            self._upload_s = upload_s(artifacts) if self._online else 0.0
            for sink in self._sinks:
                sink.keep(artifacts)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps. The lines it counts are on the device before it says so."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            logger.warning("cannot flush %s (%s)", METRICS_FILE, error)
        return {"bytes": self._bytes, "step": self._step, "wandb_id": self._wandb_id}

    def close(self, exit_code: int = 0) -> None:
        """Finish wandb and TensorBoard, waiting at most 30 s and what files take, and close the file."""
        deadline = time.monotonic() + FINISH_TIMEOUT_S + self._upload_s
        for sink in self._sinks:
            sink.close(max(0.0, deadline - time.monotonic()), exit_code)
        if self.lost:
            logger.warning("%d writes to %s were lost", self.lost, METRICS_FILE)
        try:
            self._mend()
        except OSError as error:
            logger.warning("%s ends in half a line (%s)", METRICS_FILE, error)
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(exit_code=0 if kind is None else getattr(error, "exit_code", 1))


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of a run's metrics.jsonl in order; half a last line (a run that goes on) is left out.

    Raises:
        InputError: there is no such file, or a whole line is not JSON.
    """
    path = folder / METRICS_FILE
    if not path.is_file():
        raise InputError("run", str(folder), f"a run folder, with {METRICS_FILE}")
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    records = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            records.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            start = line[:40].decode(errors="replace")
            raise InputError(f"{path}:{number}", start, f"JSON ({error})") from error
    return records


class _FileHandler(logging.FileHandler):
    """train.log. A disk that refuses it is reported once, and not with a traceback per message."""

    refused = False

    def handleError(self, record: logging.LogRecord) -> None:
        if not self.refused:
            self.refused = True
            print(f"cannot write {self.baseFilename} ({sys.exc_info()[1]}); the run goes on", file=sys.stderr)


class _StderrHandler(logging.StreamHandler[Any]):
    """Warnings to whatever sys.stderr is at that moment: a live display puts itself in its place."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


class _Formatter(logging.Formatter):
    """One line per message, whatever is in it; tracebacks below it, in the file only."""

    def __init__(self, tracebacks: bool) -> None:
        super().__init__()
        self.tracebacks = tracebacks

    def format(self, record: logging.LogRecord) -> str:
        message = printable(redact(record.getMessage()))
        if not self.tracebacks:
            return f"{record.levelname.lower()}: {message}"
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created))
        line = f"{when} {record.levelname} {printable(record.name)}: {message}"
        if record.exc_info:
            line += "\n" + printable(redact(self.formatException(record.exc_info)), keep="\n")
        return line


def setup_logging(run_dir: Path | None) -> None:
    """Send messages to RUN/train.log, warnings also to stderr. A second call replaces the first.

    Args:
        run_dir: the run folder, which exists; None for commands without one, which only warn on stderr.
    """
    root = logging.getLogger()
    for old in [handler for handler in root.handlers if isinstance(handler, _FileHandler | _StderrHandler)]:
        root.removeHandler(old)
        old.close()
    stderr = _StderrHandler()
    stderr.setLevel(logging.WARNING)
    stderr.setFormatter(_Formatter(tracebacks=False))
    root.addHandler(stderr)
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    if run_dir is not None:
        file = _FileHandler(run_dir / "train.log", encoding="utf-8")
        file.setFormatter(_Formatter(tracebacks=True))
        root.addHandler(file)
