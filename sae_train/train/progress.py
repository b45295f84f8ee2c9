"""What a person sees while a run goes: a live table on a terminal, a line now and then elsewhere.

It draws on stderr, so that stdout stays free for results. The rate is that of the last two minutes,
long enough to span a harvest and the training on it, and it keeps falling while nothing arrives.
"""

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sae_train.redact import printable

WINDOW_S = 120.0
REDRAWS_PER_S = 2.0
"""A redraw took 1.7 ms for one member and 6.4 ms for twelve (busy 2-core CPU): a hundredth of a core."""

COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("loss", "loss", lambda value: f"{value:.4g}"),
    ("fvu", "FVU", lambda value: f"{value:.4f}"),
    ("l0", "L0", lambda value: f"{value:.1f}"),
    ("dead", "dead", lambda value: f"{100 * value:.1f} %"),
)
"""Scalar, heading, format. `dead` is a share."""


def duration(seconds: float) -> str:
    """h:mm:ss, or m:ss below an hour; -- when it is not known."""
    if not math.isfinite(seconds):
        return "--"
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


def _shown(scalars: Mapping[str, float], key: str, form: Callable[[float], str]) -> str:
    value = scalars.get(key)
    if value is None:
        return "-"
    return form(value) if math.isfinite(value) else "not finite"


class Progress:
    """Use as a context manager: it gives the terminal back however the block ends."""

    def __init__(
        self,
        total_tokens: int,
        quiet: bool = False,
        start_tokens: int = 0,
        every_s: float = 10.0,
        console: Console | None = None,
    ) -> None:
        """
        Args:
            total_tokens: tokens of the whole run.
            quiet: show nothing.
            start_tokens: tokens done by earlier legs of the run, which the rate must not count.
            every_s: at least this long between two lines where there is no terminal.
            console: where to draw; stderr by default.
        """
        self.total_tokens, self.quiet, self.every_s = total_tokens, quiet, every_s
        self.console = console or Console(stderr=True)
        self._step, self._tokens, self._phase = 0, start_tokens, "starting"
        self._members: dict[str, Mapping[str, float]] = {}
        self._samples: deque[tuple[float, int]] = deque([(time.monotonic(), start_tokens)])
        self._printed_at = -math.inf
        self._printed: str | None = None
        self._live: Live | None = None

    def __enter__(self) -> Self:
        self._samples = deque([(time.monotonic(), self._tokens)])
        if not self.quiet and self.console.is_terminal and not self.console.is_dumb_terminal:
            self._live = Live(
                console=self.console,
                get_renderable=self._draw,
                refresh_per_second=REDRAWS_PER_S,
                redirect_stdout=sys.stdout.isatty(),
            )
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._phase = "done" if kind is None else "stopped"
        if self._live is not None:
            self._live.stop()
            self._live = None
        elif not self.quiet:
            self._print()

    def update(
        self,
        step: int,
        tokens: int,
        scalars: Mapping[str, float] | Mapping[str, Mapping[str, float]],
        phase: str | None = None,
    ) -> None:
        """New numbers.

        Args:
            step: optimizer steps done.
            tokens: tokens done, of `total_tokens`.
            scalars: name -> value of the one SAE, or member -> name -> value. `loss`, `fvu`, `l0` and `dead`
                (a share) are shown; a missing one is a dash.
            phase: what the run is doing now (harvest, training, evaluating, saving); as before when left out.
        """
        now = time.monotonic()
        flat = {name: value for name, value in scalars.items() if not isinstance(value, Mapping)}
        members = {name: value for name, value in scalars.items() if isinstance(value, Mapping)}
        self._members = members | ({"": flat} if flat else {})
        self._step, self._tokens = step, tokens
        self._samples.append((now, tokens))
        while len(self._samples) > 2 and now - self._samples[0][0] > WINDOW_S:
            self._samples.popleft()
        self.phase(phase or self._phase)

    def phase(self, name: str) -> None:
        """Say what the run is doing now."""
        self._phase = name
        if not self.quiet and self._live is None and time.monotonic() - self._printed_at >= self.every_s:
            self._print()

    def tokens_per_s(self) -> float:
        """Tokens per second over the last two minutes, the time since the last update included."""
        began, tokens = self._samples[0]
        return (self._tokens - tokens) / max(time.monotonic() - began, 1e-9)

    def seconds_left(self) -> float:
        """Seconds to the end at the present rate; infinite before there is one."""
        rate = self.tokens_per_s()
        return max(0, self.total_tokens - self._tokens) / rate if rate > 0 else math.inf

    def _facts(self) -> list[str]:
        share = self._tokens / max(self.total_tokens, 1)
        facts = [
            f"{100 * share:.0f} %",
            f"{self._tokens:,} of {self.total_tokens:,} tokens",
            f"{self.tokens_per_s():,.0f} tokens/s",
        ]
        if self._tokens < self.total_tokens and self._phase != "done":  # data may end before
            facts.append(f"{duration(self.seconds_left())} left")
        return [*facts, f"step {self._step:,}", printable(self._phase)]

    def _print(self) -> None:
        """Plain lines: one, or with several members one more for each."""
        self._printed_at = time.monotonic()
        rows = {
            printable(name): ", ".join(
                f"{label} {_shown(scalars, key, form)}" for key, label, form in COLUMNS if key in scalars
            )
            for name, scalars in self._members.items()
        }
        facts = " | ".join(self._facts())
        if len(rows) == 1:
            lines = [" | ".join(filter(None, [facts, *rows.values()]))]
        else:
            lines = [facts, *(f"  {name}: {numbers}" for name, numbers in rows.items())]
        text = "\n".join(lines)
        if text != self._printed:
            self.console.print(Text(text), soft_wrap=True)
            self._printed = text

    def _draw(self) -> Group:
        """The live picture. Drawn from a thread of rich's: reads each attribute once, changes none."""
        members = dict(self._members)
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        heading = "SAE" if any(members) else ""
        table.add_column(heading, no_wrap=True, overflow="ellipsis", max_width=32, style="bold")
        for _, label, _ in COLUMNS:
            table.add_column(label, justify="right", no_wrap=True, header_style="dim")
        room = max(1, self.console.size.height - 6)
        for name, scalars in list(members.items())[:room]:
            cells = [Text(_shown(scalars, key, form)) for key, _, form in COLUMNS]
            for cell in cells:
                cell.stylize("bold red" if cell.plain == "not finite" else "")
            table.add_row(Text(printable(name)), *cells)
        parts: list[Table | Text] = [table] if members else []
        if len(members) > room:
            parts.append(Text(f"and {len(members) - room} more", style="dim"))
        share, *facts, phase = self._facts()
        line = Table.grid(padding=(0, 2, 0, 0))
        line.add_row(
            ProgressBar(total=max(self.total_tokens, 1), completed=self._tokens, width=16),
            Text(share, style="bold"),
            Text("  ".join(facts), style="dim", no_wrap=True, overflow="ellipsis"),
            Text(phase, style="cyan", no_wrap=True),
        )
        return Group(*parts, line)
