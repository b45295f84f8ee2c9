"""What the SAEs of a sweep came to, read from their runs: one row for each, and which of them is the best."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sae_train.errors import InputError
from sae_train.files import CorruptFile, read_json
from sae_train.report.table import complete
from sae_train.sweep.drive import run_folder
from sae_train.sweep.options import SweepConfig
from sae_train.sweep.runs import GRID, ONLY, Run
from sae_train.train.record import RunRecord

BATCH = re.compile(r"t\d{4,}(-t\d{4,})?")
"""What `study` calls a run of trials, which have names that are theirs alone."""


@dataclass(frozen=True)
class Row:
    """One SAE.

    Attributes:
        run, member: where it is: SWEEP/runs/RUN/saes/MEMBER.
        values: of the axes.
        status: done, pruned, failed, stopped, running or waiting.
        metrics: of held-out rows; empty unless done.
        legend: what kind of SAE it is, as a plot names it.
        note: why it is not done, in the words of its run.
    """

    run: str
    member: str
    values: tuple[str, ...]
    status: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    legend: str = ""
    note: str = ""

    @property
    def name(self) -> str:
        """What it is called in tables: by its run, by its own name, or by both where it needs both."""
        if self.member == ONLY:
            return self.run
        return self.member if self.run == GRID or BATCH.fullmatch(self.run) else f"{self.run}/{self.member}"


def read_rows(folder: Path, runs: Sequence[Run], said: Mapping[str, tuple[str, str]]) -> list[Row]:
    """A row for every SAE of some runs.

    Args:
        folder: of the sweep.
        said: of runs that are not done: (status, note).
    """
    rows: list[Row] = []
    places: set[str] = set()
    for run in runs:
        own = run_folder(folder, run.name)
        record = RunRecord.read(own)
        done = record is not None and record.status == "done"
        numbers = members_of(own / "summary.json") if done else {}
        status, note = said.get(run.name, ("waiting", ""))
        known = record.config["members"] if record is not None and done else {}
        for member, values in run.members.items():
            if member not in known:
                rows.append(Row(run.name, member, values, "failed" if done else status, note=note))
                continue
            kind, place = kind_of(known[member])
            places.add(place)
            metrics = complete(numbers.get(member, {}))
            rows.append(Row(run.name, member, values, "done", metrics, f"{kind}|{place}"))
    several = len(places) > 1
    return [_named(row, several) for row in rows]


def _named(row: Row, several: bool) -> Row:
    kind, _, place = row.legend.partition("|")
    return replace(row, legend=f"{kind}, {place}" if several else kind)


def members_of(path: Path) -> dict[str, dict[str, float]]:
    """The final numbers of a run's SAEs; those that are not finite are NaN."""
    try:
        told = read_json(path)
    except (CorruptFile, OSError) as error:
        raise InputError(str(path), "damaged", f"a summary written by this release ({error})") from None
    return {
        str(name): {str(key): math.nan if value is None else float(value) for key, value in numbers.items()}
        for name, numbers in told["members"].items()
    }


def kind_of(member: Mapping[str, Any]) -> tuple[str, str]:
    """(what kind of SAE a member is, where it is), from the record of its run."""
    sae = member["sae"]
    width = f"{sae['d_sae']:,} latents" if sae["d_sae"] else f"expansion {sae['expansion']:g}"
    hook, target = member["hook"], member.get("target")
    return f"{sae['name']}, {sae['activation']['name']}, {width}", f"{hook} to {target}" if target else hook


def off_target(metrics: Mapping[str, float], config: SweepConfig) -> float:
    """How far L0 is beyond what is tolerated, as a share of the wanted one; 0 or less is well."""
    if config.l0 is None:
        return 0.0
    l0 = metrics.get("l0", math.nan)
    return abs(l0 / config.l0 - 1) - config.l0_tolerance if math.isfinite(l0) else math.inf


def ranked(rows: Sequence[Row], config: SweepConfig) -> list[Row]:
    """The rows that can be the best, the best first: done, with a finite objective, and of the wanted L0."""
    sign = 1 if config.lower_is_better else -1
    known = [
        row
        for row in rows
        if row.status == "done"
        and math.isfinite(row.metrics.get(config.objective, math.nan))
        and off_target(row.metrics, config) <= 0
    ]
    return sorted(known, key=lambda row: sign * row.metrics[config.objective])


def warnings(rows: Sequence[Row], config: SweepConfig) -> list[str]:
    """What a reader should know before believing which is the best."""
    out = []
    for status in ("failed", "stopped", "pruned", "running", "waiting"):
        if count := sum(row.status == status for row in rows):
            out.append(f"{count} of {len(rows)} SAEs: {status}.")
    done = [row for row in rows if row.status == "done"]
    levels = [row.metrics["l0"] for row in done if row.metrics.get("l0", 0) > 0]
    if config.l0 is None and config.objective != "l0" and levels and max(levels) > 1.2 * min(levels):
        out.append(
            f"The SAEs have different L0 ({min(levels):.3g} to {max(levels):.3g}), and a larger one lowers "
            "FVU by itself: sweep.l0=N picks the best of those with about N active latents."
        )
    if config.l0 is not None and done and not ranked(rows, config):
        out.append(f"No SAE has an L0 within {config.l0_tolerance:.0%} of sweep.l0={config.l0:g}.")
    if done and not any("ce_increase" in row.metrics for row in done):
        out.append(
            "Cross-entropy was not measured: eval.ce_tokens=0, or rows of shards or of no language model."
        )
    return out
