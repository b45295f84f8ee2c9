"""One HTML page about a sweep: which SAE is the best, all of them in a table, where each one's own report is.

As the page of a run it holds everything it shows but for the links.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sae_train.files import write_bytes
from sae_train.report.page import clean, rendered
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
    columns = [name for name in TERMINAL if any(name in row.metrics for row in page.rows)]
    place = {(row.run, row.member): i for i, row in enumerate(page.ranking)}
    order = sorted(page.rows, key=lambda row: place.get((row.run, row.member), len(place)))
    best = page.ranking[0] if page.ranking else None
    text = rendered(
        "sae_train.sweep",
        "page.html",
        title=clean(page.title),
        count=len(page.rows),
        done=sum(row.status == "done" for row in page.rows),
        axes=[clean(axis) for axis in page.axes],
        columns=[METRICS[name].label for name in columns],
        rows=[_row(row, columns, row is best) for row in order if row.status == "done"],
        others=[_row(row, columns, False) for row in order if row.status != "done"],
        best=_row(best, columns, True) if best is not None else None,
        cards=_cards(best),
        objective=_objective(page.config),
        warnings=[clean(line) for line in page.warnings],
        plot=base64.b64encode(page.plot.read_bytes()).decode("ascii") if page.plot is not None else "",
        experiment=clean(page.best, keep="\n") if page.best is not None else "",
        command=clean(page.command),
    )
    write_bytes(path, text.encode("utf-8"))
    return path


def _row(row: Row, columns: Sequence[str], best: bool) -> dict[str, Any]:
    folder = f"runs/{quote(row.run)}"
    return {
        "name": clean(row.name),
        "values": [clean(value) for value in row.values],
        "numbers": [shown(name, row.metrics.get(name)) for name in columns],
        "status": clean(row.status),
        "note": clean(row.note),
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
