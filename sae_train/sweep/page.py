"""One HTML page about a sweep: which SAE is the best, all of them in a table, where each one's own report is.

As the page of a run it holds everything it shows but for the links: no script, nothing fetched, every text
escaped, cleared of secrets, and its control characters made visible.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sae_train.files import write_bytes
from sae_train.redact import printable, redact
from sae_train.report.table import METRICS, TERMINAL, shown
from sae_train.sweep.options import SweepConfig
from sae_train.sweep.results import Row

CARDS = ("fvu", "ce_increase", "recovered_mean", "l0", "dead")


@dataclass(frozen=True)
class Page:
    """What the page shows.

    Attributes:
        axes: what varies. rows: of all SAEs. ranking: those that can be the best, the best first.
        plot: PNG. best: the best configuration, as an experiment file.
    """

    title: str
    command: str
    config: SweepConfig
    axes: Sequence[str]
    rows: Sequence[Row]
    ranking: Sequence[Row]
    warnings: Sequence[str]
    plot: Path | None
    best: str | None


def write_page(path: Path, page: Page) -> Path:
    """Write the page; an older one stays whole until the new one is on disk."""
    from jinja2 import Environment, StrictUndefined

    template = resources.files("sae_train.sweep").joinpath("page.html").read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    columns = [name for name in TERMINAL if any(name in row.metrics for row in page.rows)]
    place = {(row.run, row.member): i for i, row in enumerate(page.ranking)}
    order = sorted(page.rows, key=lambda row: place.get((row.run, row.member), len(place)))
    best = page.ranking[0] if page.ranking else None
    text = environment.from_string(template).render(
        title=_text(page.title),
        count=len(page.rows),
        done=sum(row.status == "done" for row in page.rows),
        axes=[_text(axis) for axis in page.axes],
        columns=[METRICS[name].label for name in columns],
        rows=[_row(row, columns, row is best) for row in order if row.status == "done"],
        others=[_row(row, columns, False) for row in order if row.status != "done"],
        best=_row(best, columns, True) if best is not None else None,
        cards=_cards(best),
        objective=_objective(page.config),
        warnings=[_text(line) for line in page.warnings],
        plot=base64.b64encode(page.plot.read_bytes()).decode("ascii") if page.plot is not None else "",
        experiment=_text(page.best, keep="\n") if page.best is not None else "",
        command=_text(page.command),
    )
    write_bytes(path, text.encode("utf-8"))
    return path


def _row(row: Row, columns: Sequence[str], best: bool) -> dict[str, Any]:
    folder = f"runs/{quote(row.run)}"
    return {
        "name": _text(row.name),
        "values": [_text(value) for value in row.values],
        "numbers": [shown(name, row.metrics.get(name)) for name in columns],
        "status": _text(row.status),
        "note": _text(row.note),
        "report": f"{folder}/report.html",
        "sae": f"{folder}/saes/{quote(row.member)}/",
        "plots": f"{folder}/saes/{quote(row.member)}/plots/",
        "best": best,
    }


def _cards(best: Row | None) -> list[dict[str, str]]:
    if best is None:
        return []
    return [
        {
            "label": METRICS[name].label,
            "value": shown(name, best.metrics[name]),
            "meaning": METRICS[name].meaning,
        }
        for name in CARDS
        if name in best.metrics
    ]


def _objective(config: SweepConfig) -> str:
    least = "least" if config.lower_is_better else "most"
    at = (
        f", of those with an L0 within {config.l0_tolerance:.0%} of {config.l0:g}"
        if config.l0 is not None
        else ""
    )
    return f"{least} {METRICS[config.objective].label}{at}"


def _text(value: Any, keep: str = "") -> str:
    return printable(str(redact(str(value))), keep)
