"""Copies of the metrics for people: Weights & Biases and TensorBoard, each in a thread of its own.

metrics.jsonl is the record; these are copies, and a copy may be late, partial or absent without the
run noticing. Numbers go into a bounded queue that one daemon thread empties. A service that blocks
fills the queue and further numbers are dropped and counted; one that raises is reported once and
left alone; at the end it gets a few seconds to finish and is then left behind. A wandb server that
does not answer at the start costs nothing either: the numbers go to an offline run of the same id,
which `wandb sync` uploads whenever there is a server.
"""

import contextlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol

from sae_train.errors import StoppedEarly

logger = logging.getLogger(__name__)

QUEUE_WRITES = 1024
"""Writes that may wait: 10,000 steps at the default of one write every 10 steps."""

WANDB_TIMEOUT_S = 10.0
"""For wandb to connect, and again to upload the rest at the end. It takes up to twice as long to give up
(wandb 0.31, at a port where nobody listens); with the offline start after that it is ready in 20 s of the
30 that the end of a run waits."""

UPLOAD_BYTES_PER_S = 4e6
"""Files are given as long as a connection of this speed would take, at most MAX_UPLOAD_S."""
MAX_UPLOAD_S = 900.0
HAND_OVER_S = 5.0
"""How long the run waits to hand files over to a sink that is behind."""


@dataclass(frozen=True)
class Artifact:
    """Files that belong together, for a service that keeps files.

    Attributes:
        name: letters, digits, dots, dashes and underscores.
        type: "model" and the like, by which the service groups them.
        files: name in the artifact -> where it lies; stays there, unchanged, until it is uploaded.
        alias: a further name of this version.
    """

    name: str
    type: str
    files: dict[str, Path]
    alias: str | None = None


def upload_s(artifacts: Sequence[Artifact]) -> float:
    """How long an upload may take."""
    size_bytes = sum(path.stat().st_size for artifact in artifacts for path in artifact.files.values())
    return min(WANDB_TIMEOUT_S + size_bytes / UPLOAD_BYTES_PER_S, MAX_UPLOAD_S)


class Sink(Protocol):
    name: str

    def open(self) -> None: ...

    def write(self, step: int, scalars: dict[str, float]) -> None: ...

    def keep(self, artifacts: Sequence[Artifact]) -> None: ...

    def close(self, exit_code: int) -> None: ...


class WandbSink:
    """Weights & Biases. Offline it needs no network and no account: `wandb sync` uploads the folder later.

    Every leg of a run has the same wandb id, so they are one run there. Online with no server to be had, this
    leg is kept offline.

    Only the scalars, the redacted configuration and, at the end, what the run has published are handed over:
    no code, git state, command line, package list, machine facts or console output, any of which may hold
    what the user did not mean to publish.
    """

    name = "wandb"

    def __init__(
        self, folder: Path, run_id: str, project: str, mode: str, run_config: dict[str, Any]
    ) -> None:
        self.folder, self.run_id, self.project, self.mode = folder, run_id, project, mode
        self.run_config = run_config
        self._run: Any = None

    def open(self) -> None:
        # wandb's reports on itself, also to its server: nobody asked for them, and a server that hangs would
        # hold up the end of the process for half a minute.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        if self.mode == "online":
            try:
                self._start("online")
                return
            except (wandb.Error, OSError) as error:
                reason = str(error).partition("\n")[0]
            wandb.teardown()  # the run that did not start would keep its id in use
            self.mode = "offline"
            self._start("offline")
            logger.warning("wandb: %s; what follows is kept offline: %s", reason, self._how_to_upload())
        else:
            self._start("offline")

    def _start(self, mode: Literal["online", "offline"]) -> None:
        import wandb

        if mode == "online" and not wandb.login(prompt=False, verify=False):
            raise wandb.Error(
                "no credentials: set WANDB_API_KEY, run `wandb login` or use logger.wandb_mode=offline"
            )
        settings = wandb.Settings(
            silent=True,
            console="off",
            save_code=False,
            disable_code=True,
            disable_git=True,
            disable_job_creation=True,
            x_disable_meta=True,
            x_disable_machine_info=True,
            x_disable_stats=True,
            x_save_requirements=False,
            init_timeout=WANDB_TIMEOUT_S,
            finish_timeout=WANDB_TIMEOUT_S,
            finish_timeout_raises=True,
        )
        self._run = wandb.init(
            project=self.project,
            id=self.run_id,
            resume="allow",
            mode=mode,
            dir=str(self.folder),
            config=self.run_config,
            settings=settings,
        )

    def _how_to_upload(self) -> str:
        also = "--include-online " if self.mode == "online" else ""
        return f"`wandb sync {also}{Path(self._run.dir).parent}` uploads it"

    def write(self, step: int, scalars: dict[str, float]) -> None:
        self._run.log(scalars, step=step)

    def keep(self, artifacts: Sequence[Artifact]) -> None:
        """Weights, statistics and the report. Offline the record says where they lie: nothing is copied."""
        import wandb

        logged = []
        for artifact in artifacts:
            made = wandb.Artifact(artifact.name, type=artifact.type)
            for name, path in artifact.files.items():
                made.add_file(str(path), name=name, skip_cache=True, policy="immutable")
            logged.append(self._run.log_artifact(made, aliases=[artifact.alias] if artifact.alias else None))
        if self.mode == "online":
            deadline = time.monotonic() + upload_s(artifacts)
            for one in logged:
                one.wait(timeout=max(1, int(deadline - time.monotonic())))

    def close(self, exit_code: int) -> None:
        if exit_code == StoppedEarly.exit_code:
            self._run.mark_preempting()  # to a server that is a run to be continued, not one that failed
        try:
            self._run.finish(exit_code=exit_code)
        except TimeoutError:
            logger.warning(
                "wandb did not take everything within %.0f s: %s", WANDB_TIMEOUT_S, self._how_to_upload()
            )


class TensorBoardSink:
    """TensorBoard event files under RUN/tensorboard. A resumed run hides the steps that it writes again."""

    name = "tensorboard"

    def __init__(self, folder: Path, purge_step: int | None) -> None:
        self.folder, self.purge_step = folder / "tensorboard", purge_step
        self._writer: Any = None

    def open(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self.folder), purge_step=self.purge_step)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def keep(self, artifacts: Sequence[Artifact]) -> None:
        """TensorBoard keeps no files."""

    def close(self, exit_code: int) -> None:
        self._writer.close()


class _Reported:
    """Ends a thread's error here: logged with its traceback, never raised into a thread that nobody joins.

    This is the one place that stops every kind of error: what a third-party service may raise has no list
    (wandb raises bare `Exception` subclasses of its own), and none of it may end a run.
    """

    def __init__(self, name: str, what: str = "stopped") -> None:
        self.name, self.what = name, what

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if error is None:
            return False
        logger.warning(
            "%s %s (%s: %s); the run goes on and metrics.jsonl keeps every step",
            self.name,
            self.what,
            type(error).__name__,
            error,
            exc_info=error,
        )
        return isinstance(error, Exception)


class Background:
    """A sink behind a bounded queue: `put` and `close` never raise, and only `close` ever waits."""

    def __init__(self, sink: Sink, queue_writes: int = QUEUE_WRITES) -> None:
        self.sink = sink
        self.dropped = 0
        self._exit_code = 0
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue(queue_writes)
        self._thread = threading.Thread(target=self._work, name=sink.name, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        with _Reported(self.sink.name):
            self.sink.open()
            done = False
            with _Reported(self.sink.name):
                while (work := self._queue.get()) is not None:
                    work()
                done = True
            self.sink.close(self._exit_code if done else 1)  # what it has got is worth keeping

    def put(self, step: int, scalars: dict[str, float]) -> None:
        """Hand over numbers without waiting. Dropped once the sink has stopped or is 1,024 writes behind."""
        try:
            if self._thread.is_alive():
                self._queue.put_nowait(lambda: self.sink.write(step, scalars))
        except queue.Full:
            self.dropped += 1
            if self.dropped == 1:
                logger.warning(
                    "%s does not keep up: steps from %d on may be missing there; metrics.jsonl has them all",
                    self.sink.name,
                    step,
                )

    def keep(self, artifacts: Sequence[Artifact]) -> None:
        """Hand over files, waiting a few seconds where the sink is behind; then they stay where they are."""
        names = ", ".join(artifact.name for artifact in artifacts)

        def hand_over() -> None:
            with _Reported(self.sink.name, f"may not have got {names}"):  # numbers it may still take
                self.sink.keep(artifacts)

        try:
            if self._thread.is_alive():
                self._queue.put(hand_over, timeout=HAND_OVER_S)
        except queue.Full:
            logger.warning("%s does not keep up: it did not get %s", self.sink.name, names)

    def close(self, timeout_s: float, exit_code: int = 0) -> None:
        """Let the sink write what is queued and finish, for at most `timeout_s`; then leave it behind."""
        deadline = time.monotonic() + timeout_s
        self._exit_code = exit_code
        asked = False
        while not asked and self._thread.is_alive() and time.monotonic() < deadline:
            with contextlib.suppress(
                queue.Full
            ):  # there is room once the sink writes, and none ever if it died
                self._queue.put(None, timeout=min(0.1, timeout_s))
                asked = True
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            logger.warning("%s did not finish within %.0f s and is left behind", self.sink.name, timeout_s)
