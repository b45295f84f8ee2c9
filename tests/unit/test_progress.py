"""Progress: a live table that gives the terminal back, plain lines elsewhere, honest rates."""

import io
import os
import pty
import subprocess
import sys

import pytest
from rich.console import Console

from sae_train.train.progress import Progress, duration

FOUR = {"loss": 0.5, "fvu": 0.25, "l0": 32.0, "dead": 0.012}


def plain(total: int = 1000, **options: object) -> tuple[Progress, io.StringIO]:
    out = io.StringIO()
    return Progress(total, console=Console(file=out, width=200), **options), out


def test_without_a_terminal_a_line_says_how_far_how_fast_and_how_good() -> None:
    progress, out = plain(every_s=0.0)
    with progress:
        progress.update(5, 250, FOUR, "training")
    line = out.getvalue().splitlines()[0]
    for part in (
        "25 %",
        "250 of 1,000 tokens",
        "tokens/s",
        "left",
        "training",
        "loss 0.5",
        "FVU 0.2500",
        "L0 32.0",
    ):
        assert part in line
    assert "dead 1.2 %" in line
    assert "\x1b" not in out.getvalue()


def test_lines_are_far_apart_and_the_last_state_is_always_printed() -> None:
    progress, out = plain(every_s=3600.0)
    with progress:
        for step in range(1, 101):
            progress.update(step, step * 10, {"loss": 1.0 / step})
    lines = out.getvalue().splitlines()
    assert len(lines) == 2
    assert [part for part in ("100 %", "done", "loss 0.01") if part not in lines[-1]] == []


def test_each_member_has_its_own_line_and_its_name_cannot_drive_the_terminal() -> None:
    progress, out = plain(every_s=0.0)
    with progress:
        progress.update(1, 10, {"narrow": FOUR, "wi\x1b[2J[red]de\n": FOUR | {"fvu": float("nan")}})
    lines = out.getvalue().splitlines()
    assert lines[1].startswith("  narrow: loss 0.5")
    assert lines[2].startswith(r"  wi\x1b[2J[red]de\n: loss 0.5, FVU not finite")


def test_quiet_shows_nothing() -> None:
    progress, out = plain(quiet=True, every_s=0.0)
    with progress:
        progress.update(1, 10, FOUR)
        progress.phase("saving")
    assert out.getvalue() == ""


def test_the_rate_leaves_out_earlier_legs_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("sae_train.train.progress.time.monotonic", lambda: now[0])
    progress, _ = plain(total=2000, start_tokens=1000)
    with progress:
        now[0] += 10
        progress.update(11, 1100, FOUR)
        assert progress.tokens_per_s() == pytest.approx(10.0)
        assert progress.seconds_left() == pytest.approx(90.0)
        now[0] += 10  # nothing arrives: the rate falls
        assert progress.tokens_per_s() == pytest.approx(5.0)
        for _ in range(100):  # later the slow beginning is forgotten
            now[0] += 10
            progress.update(12, progress._tokens + 5, FOUR)
        assert progress.tokens_per_s() == pytest.approx(0.5)


def test_before_the_first_tokens_the_time_left_is_not_known() -> None:
    progress, _ = plain()
    assert duration(progress.seconds_left()) == "--"


def test_durations_are_minutes_or_hours() -> None:
    assert [duration(s) for s in (5, 65, 3725)] == ["0:05", "1:05", "1:02:05"]


def test_a_phase_said_between_updates_is_kept() -> None:
    progress, out = plain(every_s=0.0)
    with progress:
        progress.phase("harvesting")
        progress.update(1, 10, {})
    assert out.getvalue().splitlines()[1].endswith("harvesting")


TERMINAL = """
import logging, sys, time
from sae_train.log import setup_logging
from sae_train.train.progress import Progress
setup_logging(None)
with Progress(1000) as progress:
    progress.update(1, 100, {"narrow": {"loss": 0.5}, "wi\\x1b]0;evil\\x07de": {"loss": 0.25}})
    logging.getLogger("x").warning("in the middle")
    time.sleep(0.7)
    raise RuntimeError("broke")
"""


def test_on_a_terminal_the_cursor_comes_back_after_an_exception() -> None:
    controller, terminal = pty.openpty()
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TERM": "xterm-256color", "COLUMNS": "120"}
    env["PYTHON_COLORS"] = "0"  # of tracebacks
    run = subprocess.Popen(
        [sys.executable, "-c", TERMINAL], stdin=terminal, stdout=terminal, stderr=terminal, env=env
    )
    os.close(terminal)
    shown = b""
    try:
        while chunk := os.read(controller, 65536):
            shown += chunk
    except OSError:  # Linux says EIO when the other side is closed
        pass
    finally:
        os.close(controller)
    assert run.wait(30) == 1
    text = shown.decode()
    assert text.count("\x1b[?25l") == 1, "the live display hides the cursor"
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l"), "and shows it again"
    told = ("narrow", "100 of 1,000 tokens", "stopped", "warning: in the middle", r"wi\x1b]0;evil\x07de")
    assert [part for part in told if part not in text] == []
    assert "\x1b]0;evil" not in text
    assert text.rstrip().endswith("RuntimeError: broke")
