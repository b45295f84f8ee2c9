"""The record of a run: each step once, whatever happens to the disk, to wandb, or to the run."""

import json
import logging
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sae_train.errors import InputError
from sae_train.log import LoggerConfig, MetricLog, read_metrics, setup_logging
from sae_train.redact import printable, redact
from sae_train.sinks import Background

CANARY = "canary-5f3e9a7b1c"


@pytest.fixture
def secret(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("SOME_HUB_TOKEN", CANARY)
    return CANARY


@pytest.fixture
def clean_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    for handler in set(root.handlers) - set(handlers):
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)
    logging.captureWarnings(False)


def steps(folder: Path) -> list[int]:
    return [record["step"] for record in read_metrics(folder)]


def test_each_write_is_one_line_on_disk_at_once(tmp_path: Path) -> None:
    log = MetricLog(tmp_path, LoggerConfig(), {})
    log.write(10, 2048, {"a/fvu": 0.5})
    (record,) = read_metrics(tmp_path)
    assert (record["step"], record["tokens"], record["a/fvu"]) == (10, 2048, 0.5)
    log.close()


def test_what_is_not_finite_becomes_null_and_is_named(tmp_path: Path) -> None:
    with MetricLog(tmp_path, LoggerConfig(), {}) as log:
        log.write(1, 1, {"nan": float("nan"), "up": float("inf"), "fine": 1.0})
    (record,) = read_metrics(tmp_path)
    assert (record["nan"], record["up"], record["fine"]) == (None, None, 1.0)
    assert record["nonfinite"] == ["nan", "up"]
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_resumed_three_times_each_step_appears_once(tmp_path: Path) -> None:
    state = None
    for leg in range(3):
        log = MetricLog(tmp_path, LoggerConfig(), {}, state)
        for step in range(leg * 10 + 1, leg * 10 + 11):
            log.write(step, step, {"loss": float(leg)})
        state = json.loads(json.dumps(log.state_dict()))
        for step in range(leg * 10 + 11, leg * 10 + 15):
            log.write(step, step, {"loss": -1.0})  # done after the checkpoint, and again by the next leg
        (tmp_path / "metrics.jsonl").open("ab").write(b'{"step": 99, "to')  # killed in the middle of a line
    MetricLog(tmp_path, LoggerConfig(), {}, state).close()
    assert steps(tmp_path) == list(range(1, 31))
    assert all(record["loss"] >= 0 for record in read_metrics(tmp_path))


def test_a_run_killed_before_its_first_checkpoint_starts_an_empty_record(tmp_path: Path) -> None:
    for _ in range(2):
        log = MetricLog(tmp_path, LoggerConfig(), {})
        log.write(1, 1, {})
    assert steps(tmp_path) == [1]


def test_a_record_shorter_than_the_checkpoint_says_so_and_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with MetricLog(tmp_path, LoggerConfig(), {}, {"bytes": 5000, "step": 7, "wandb_id": None}) as log:
        log.write(8, 8, {})
    assert steps(tmp_path) == [8]
    assert "steps are missing" in caplog.text


def test_a_symbolic_link_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "metrics.jsonl").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"):
        MetricLog(tmp_path, LoggerConfig(), {})
    assert victim.read_text() == "precious"


FULL_DISK = """
import resource, sys
from pathlib import Path
from sae_train.log import LoggerConfig, MetricLog, setup_logging
folder = Path(sys.argv[1])
setup_logging(folder)
log = MetricLog(folder, LoggerConfig(), {})
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # the kernel takes part of a line, then refuses
for step in range(100):
    log.write(step, step, {"loss": 1.0})
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
log.write(100, 100, {"loss": 1.0})
log.close()
print(log.lost)
"""


def test_a_full_disk_is_reported_once_and_leaves_only_whole_lines(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    kept = steps(tmp_path)
    lost = int(done.stdout)
    assert lost > 0
    assert len(kept) + lost == 101
    assert kept == [*range(len(kept) - 1), 100]
    assert done.stderr.count("cannot write metrics.jsonl") == 1


class Stuck:
    """A service that never answers."""

    name = "stuck"

    def __init__(self) -> None:
        self.release = threading.Event()

    def open(self) -> None:
        self.release.wait(60)

    def write(self, step: int, scalars: dict[str, float]) -> None: ...

    def close(self, exit_code: int) -> None: ...


class Broken:
    """A service that fails at the third write, with an error that no list would name."""

    name = "broken"

    def __init__(self) -> None:
        self.seen: list[int] = []

    def open(self) -> None: ...

    def write(self, step: int, scalars: dict[str, float]) -> None:
        if step == 3:
            raise KeyError("surprise")
        self.seen.append(step)

    def close(self, exit_code: int) -> None: ...


def test_a_service_that_blocks_costs_the_run_no_time_and_is_left_behind(
    caplog: pytest.LogCaptureFixture,
) -> None:
    stuck = Stuck()
    sink = Background(stuck, queue_writes=8)
    began = time.monotonic()
    for step in range(1000):
        sink.put(step, {"loss": 1.0})
    assert time.monotonic() - began < 1.0
    assert sink.dropped == 1000 - 8
    sink.close(timeout_s=0.2)
    assert time.monotonic() - began < 2.0
    assert caplog.text.count("does not keep up") == 1
    assert "left behind" in caplog.text
    stuck.release.set()


def test_a_service_that_raises_is_reported_once_and_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    broken = Broken()
    sink = Background(broken)
    for step in range(10):
        sink.put(step, {})
        time.sleep(0.01)
    sink.close(timeout_s=5)
    assert broken.seen == [0, 1, 2]
    assert caplog.text.count("broken stopped (KeyError: 'surprise')") == 1


def test_closing_does_not_wait_for_a_service_that_died_with_its_queue_full() -> None:
    stuck = Stuck()
    sink = Background(stuck, queue_writes=2)
    for step in range(3, 8):
        sink.put(step, {})
    stuck.write = Broken().write  # type: ignore[method-assign]
    threading.Timer(0.3, stuck.release.set).start()
    began = time.monotonic()
    sink.close(timeout_s=30)
    assert time.monotonic() - began < 5.0


def wandb_records(path: Path) -> list:
    """Records of a .wandb file: LevelDB's log format behind a 7-byte header."""
    from wandb.proto import wandb_internal_pb2

    raw, at, buffer, out = path.read_bytes(), 7, b"", []
    while at + 7 <= len(raw):
        room = 32768 - at % 32768
        if room < 7:
            at += room
            continue
        _, length, kind = struct.unpack("<IHB", raw[at : at + 7])
        data = raw[at + 7 : at + 7 + length]
        at += 7 + length
        buffer = data if kind in (1, 2) else buffer + data
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(buffer)
            out.append(record)
    return out


WANDB_RUN = """
import sys
from pathlib import Path
from sae_train.log import LoggerConfig, MetricLog
folder = Path(sys.argv[1])
config = LoggerConfig(wandb=True)
with MetricLog(folder, config, {"model": {"name": "https://user:" + sys.argv[2] + "@hub/x"}, "k": 32}) as log:
    for step in range(1, 51):
        log.write(step, step * 100, {"a/fvu": step / 50})
    print(log.state_dict()["wandb_id"])
"""


def test_wandb_offline_holds_every_step_and_no_secret_anywhere(tmp_path: Path, secret: str) -> None:
    pytest.importorskip("wandb")
    home = tmp_path / "home"
    run = tmp_path / "run"
    home.mkdir()
    run.mkdir()
    paths = {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "HOME": str(home),
        "XDG_CACHE_HOME": str(home / "cache"),
    }
    done = subprocess.run(
        [sys.executable, "-c", WANDB_RUN, str(run), secret],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | paths,
    )
    assert done.returncode == 0, done.stderr
    (file,) = run.glob("wandb/offline-run-*/*.wandb")
    records = wandb_records(file)
    history = [record.history for record in records if record.WhichOneof("record_type") == "history"]
    rows = [
        {(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in row.item} for row in history
    ]
    assert [row["_step"] for row in rows] == list(range(1, 51))
    assert [row["a/fvu"] for row in rows] == [step / 50 for step in range(1, 51)]
    (started,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert started.run_id == done.stdout.strip()
    config = {item.key: json.loads(item.value_json) for item in started.config.update}
    assert config["model"] == {"name": "https://user:***@hub/x"}
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 2
    assert not [path for path in written if secret.encode() in path.read_bytes()]


def test_a_resumed_run_keeps_its_wandb_run(tmp_path: Path) -> None:
    state = {"bytes": 0, "step": 0, "wandb_id": "abc123"}
    log = MetricLog(tmp_path, LoggerConfig(), {}, state)
    assert log.state_dict()["wandb_id"] == "abc123"
    log.close()


def test_tensorboard_has_the_scalars_and_a_resume_hides_what_is_done_again(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = LoggerConfig(tensorboard=True)
    log = MetricLog(tmp_path, config, {})
    for step in (1, 2):
        log.write(step, step, {"fvu": 0.5})
    state = log.state_dict()
    log.write(3, 3, {"fvu": 9.0})
    log.close()
    time.sleep(1.1)  # event files are ordered by the second in their names
    with MetricLog(tmp_path, config, {}, state) as log:
        log.write(3, 3, {"fvu": 0.25})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("fvu")] == [(1, 0.5), (2, 0.5), (3, 0.25)]


@pytest.mark.parametrize(
    ("field", "value"),
    [("every", 0), ("wandb_mode", "sometimes"), ("wandb_project", "a/b"), ("wandb_project", "")],
)
def test_a_wrong_option_is_named_with_what_is_accepted(field: str, value: object) -> None:
    with pytest.raises(InputError, match=rf"^logger\.{field}="):
        LoggerConfig(**{field: value})


def test_secrets_are_found_by_value_inside_nested_values(
    secret: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHORT_KEY", "us")
    value = {
        "url": f"https://x:{secret}@h",
        secret: [(secret, 3), Path("a") / secret],
        "layout": "us",
        "n": None,
    }
    assert redact(value) == {
        "url": "https://x:***@h",
        "***": [["***", 3], "a/***"],
        "layout": "us",
        "n": None,
    }


def test_control_characters_become_visible() -> None:
    assert printable("a\x1b[2J\nb\u202ec\x9bd\ud800é\t") == r"a\x1b[2J\nb\u202ec\x9bd\ud800é\t"
    assert printable("a\nb\x07", keep="\n") == "a\nb\\x07"


@pytest.mark.usefixtures("clean_logging")
def test_messages_go_to_the_file_and_warnings_also_to_stderr(
    tmp_path: Path, secret: str, capsys: pytest.CaptureFixture[str]
) -> None:
    setup_logging(tmp_path)
    log = logging.getLogger("sae_train.test")
    log.info("started with %s", secret)
    log.warning("document named %s", "x\n2026-01-01T00:00:00Z ERROR forged: \x1b]0;title\x07")
    try:
        raise ValueError(f"\x1b[31m{secret}")
    except ValueError:
        log.exception("failed")
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert lines[0].endswith("INFO sae_train.test: started with ***")
    assert lines[1].endswith(r"document named x\n2026-01-01T00:00:00Z ERROR forged: \x1b]0;title\x07")
    assert lines[-1] == r"ValueError: \x1b[31m***"
    assert capsys.readouterr().err.splitlines() == [
        r"warning: document named x\n2026-01-01T00:00:00Z ERROR forged: \x1b]0;title\x07",
        "error: failed",
    ]


@pytest.mark.usefixtures("clean_logging")
def test_a_second_run_in_one_process_does_not_write_into_the_first_ones_log(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        setup_logging(tmp_path / name)
        logging.getLogger("sae_train.test").info("this is %s", name)
    assert "second" not in (tmp_path / "first" / "train.log").read_text()
    assert "this is second" in (tmp_path / "second" / "train.log").read_text()
    assert sum("train.log" in repr(handler) for handler in logging.getLogger().handlers) == 1


def test_reading_a_folder_without_a_record_names_the_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a run folder, with metrics\.jsonl"):
        read_metrics(tmp_path)
