"""What a sweep leaves: a table, a Pareto plot, a page, and the best configuration as an experiment.

SWEEP/table.csv       a row for every SAE: what it is, what it came to, where it lies
SWEEP/pareto.png      FVU against L0
SWEEP/report.html     both, with a link to each run's own report
SWEEP/best.yaml       sae-train train experiment=SWEEP/best.yaml trains the best SAE, alone
"""

import csv
import io
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf
from rich.console import Console

from sae_train.config import Config, as_tree, to_config
from sae_train.files import write_bytes
from sae_train.member_set import members
from sae_train.redact import printable, redact
from sae_train.report import plots
from sae_train.report.table import final_table, final_text, ordered
from sae_train.sweep.axes import Axis, spelt
from sae_train.sweep.options import SweepConfig
from sae_train.sweep.page import Page, write_page
from sae_train.sweep.points import Compose, Point
from sae_train.sweep.results import Row, ranked, warnings

MOST_SHOWN = 40
"""Rows that the terminal shows; the page and the table have them all."""


@dataclass(frozen=True)
class Sweep:
    """What a summary is of.

    Attributes:
        title: name of the runs. command: that continues or repeats the sweep.
    """

    folder: Path
    title: str
    command: str
    config: SweepConfig
    axes: Sequence[Axis]


def summarise(
    sweep: Sweep, rows: Sequence[Row], best: Point | None, compose: Compose, table: bool = True
) -> None:
    """Write all of it, and print the table and which is the best.

    Args:
        rows: of all SAEs, done or not.
        best: the point of the best of them, if there is one.
        table: False where it was printed just now.
    """
    folder = sweep.folder
    write_table(folder / "table.csv", rows, sweep.axes)
    ranking = ranked(rows, sweep.config)
    drawn = plots.pareto(series(rows), folder / "pareto.png") if any(row.metrics for row in rows) else None
    text = None
    if best is not None:
        text = experiment(best, compose, f"The best of {folder}: {ranking[0].name}")
        write_bytes(folder / "best.yaml", text.encode())
        check_experiment(folder / "best.yaml", best, compose)
    told = warnings(rows, sweep.config)
    write_page(
        folder / "report.html",
        Page(
            sweep.title,
            sweep.command,
            sweep.config,
            [axis.label for axis in sweep.axes],
            rows,
            ranking,
            told,
            drawn,
            text,
        ),
    )
    if table:
        show(rows, ranking)
    for line in told:
        print(line)
    if ranking:
        print(f"best: {printable(ranking[0].name)}; sae-train train experiment={folder / 'best.yaml'}")
    print(f"report: {folder / 'report.html'}")


def write_table(path: Path, rows: Sequence[Row], axes: Sequence[Axis]) -> None:
    """CSV: the axes by their keys, then every number that any SAE has; what was not measured is empty."""
    names = ordered({name for row in rows for name in row.metrics})
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["name", *(axis.key for axis in axes), "status", *names, "folder", "note"])
    for row in rows:
        numbers = [row.metrics.get(name, math.nan) for name in names]
        shown = [repr(number) if math.isfinite(number) else "" for number in numbers]
        folder = f"runs/{row.run}/saes/{row.member}" if row.status == "done" else f"runs/{row.run}"
        writer.writerow([row.name, *row.values, row.status, *shown, folder, row.note])
    write_bytes(path, str(redact(out.getvalue())).encode())


def series(rows: Sequence[Row]) -> dict[str, dict[str, tuple[float, float]]]:
    """What a Pareto plot draws: SAEs of one kind are in a line."""
    out: dict[str, dict[str, tuple[float, float]]] = {}
    for row in rows:
        if row.metrics:
            point = (row.metrics.get("l0", math.nan), row.metrics.get("fvu", math.nan))
            out.setdefault(row.legend, {})[row.name] = point
    return out


def show(rows: Sequence[Row], ranking: Sequence[Row]) -> None:
    """The table on the terminal: the best first, where there are more than it can show."""
    done = [row for row in rows if row.metrics]
    if not done:
        return
    shown = done if len(done) <= MOST_SHOWN else list(ranking[:MOST_SHOWN]) or done[:MOST_SHOWN]
    numbers = {row.name: row.metrics for row in shown}
    more = f", the best {len(shown)} of {len(done)}" if len(shown) < len(done) else ""
    console = Console(file=sys.stdout)
    title = f"Held-out documents{more}"
    if console.is_terminal:
        console.print(final_table(numbers, title))
    else:
        print(final_text(numbers, title))


def experiment(point: Point, compose: Compose, says: str) -> str:
    """A file that `experiment=FILE` reads and that composes to exactly what a point is.

    Only what differs from the defaults is in it, as in the presets. Where its run has several SAEs (several
    hooks, `saes`) they are all in it.
    """
    config = point.config
    files = {"sae": config.sae.name, "sae/activation": config.sae.activation.name}
    default = OmegaConf.to_container(compose([f"{group}={name}" for group, name in files.items()]))
    own = as_tree(config)
    own["run"]["dir"] = None
    del own["launch"]
    told = {"defaults": [{f"override /{group}": name} for group, name in files.items()]}
    told |= _otherwise(own, default)
    return f"# @package _global_\n# {printable(says)}\n{OmegaConf.to_yaml(OmegaConf.create(told))}"


def _otherwise(own: dict[str, Any], default: Any) -> dict[str, Any]:
    """What one tree has and another has not, or has otherwise."""
    out: dict[str, Any] = {}
    for key, value in own.items():
        theirs = default.get(key, MISSING)
        if isinstance(value, dict) and isinstance(theirs, dict):
            if inner := _otherwise(value, theirs):
                out[key] = inner
        elif value != theirs or type(value) is not type(theirs):
            out[key] = value
    return out


def check_experiment(path: Path, point: Point, compose: Compose) -> None:
    """See that a written experiment is what its point is. An AssertionError is a bug of ours."""
    composed = compose([f"experiment={spelt(str(path))}"])
    config: Config = to_config(composed)
    config.run.dir, config.launch = point.config.run.dir, point.config.launch
    assert config == point.config, f"{path} composes to something else"
    assert tuple(members(config, composed)) == point.members, f"{path} composes to other SAEs"
