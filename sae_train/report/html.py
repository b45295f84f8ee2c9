"""One HTML page that tells what a run did: numbers, what they mean, plots, time, configuration."""

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sae_train.files import write_bytes
from sae_train.report.page import clean, rendered
from sae_train.report.table import HEADLINE, METRICS, Shown, about, complete, ordered, shown

CAPTIONS = {
    "fvu": "Variance unexplained: the line is single training batches, the dots are held-out documents.",
    "loss": "Terms of the training loss and their sum.",
    "density": "How often latents fire. A healthy dictionary is one hump; the red bar is unused capacity.",
    "l0": "Active latents per token.",
    "lr": "Learning rate.",
    "scatter": "How often and how strongly latents fire.",
    "shares": "Whose latents are whose: near a half stands for both hooks, near an end for one of them.",
    "pareto": "What the SAEs of this run trade: variance unexplained against active latents per token.",
    "time": "Wall time by what was really being done.",
}
FILTERS = {
    "seen": "tokens the model read",
    "kept": "rows kept",
    "padding": "padding",
    "special": "special tokens (BOS, EOS ...)",
    "nonfinite": "rows with NaN or infinity",
    "sink": "attention sinks (norm far above the median)",
    "tail": "left over at the end, less than a batch",
}
LEVELS = 9
"""Shades of a token's activation in the feature tables."""


@dataclass(frozen=True)
class FeatureReport:
    """One latent with the texts that activate it most.

    Attributes:
        latent: its number.
        density: share of tokens on which it fires.
        max_activation: largest activation seen.
        examples: texts as lists of (token, activation).
    """

    latent: int
    density: float
    max_activation: float
    examples: Sequence[Sequence[tuple[str, float]]] = ()


@dataclass(frozen=True)
class MemberReport:
    """One SAE of the run: metrics by name, PNG files of its plots by kind (fvu, loss, density, l0, lr)."""

    name: str
    description: str
    metrics: Mapping[str, float]
    plots: Mapping[str, Path] = field(default_factory=dict)
    features: Sequence[FeatureReport] = ()


@dataclass(frozen=True)
class ReportData:
    """What a page shows.

    Attributes:
        title: name of the run.
        run: its configuration as plain values.
        members: its SAEs; the first gives the headline.
        time: rows of `time_table`: activity, seconds, share.
        filters: tokens seen, kept and dropped per rule.
        command: the command line that repeats it.
        versions: package -> version.
        warnings: what a reader should know before believing the numbers.
        summary: tokens, wall_s, waited_s, tokens_per_s, peak_rss_bytes, each optional; the rest is not shown.
        plots: PNG files about the whole run by kind (pareto, time).
    """

    title: str
    run: Mapping[str, Any]
    members: Sequence[MemberReport]
    time: Sequence[tuple[str, float, float]] = ()
    filters: Mapping[str, int] = field(default_factory=dict)
    command: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    warnings: Sequence[str] = ()
    summary: Mapping[str, Any] = field(default_factory=dict)
    plots: Mapping[str, Path] = field(default_factory=dict)


def write_report(path: Path, data: ReportData) -> Path:
    """Write the page; an older one stays whole until the new one is on disk.

    Args:
        path: HTML file to write.
        data: what to show. A plot whose file is missing is an error: FileNotFoundError.
    """
    page = rendered(
        "sae_train.report",
        "template.html",
        title=clean(data.title),
        headline=_headline(data),
        warnings=[clean(line) for line in data.warnings],
        members=[_member(member) for member in data.members],
        plots=_images(data.plots),
        time=[
            (clean(name), f"{spent:,.1f}", f"{100 * share:.1f}", 100 * share)
            for name, spent, share in data.time
        ],
        waited=f"{data.summary['waited_s']:,.1f} s" if data.summary.get("waited_s") else "",
        filters=_filters(data.filters),
        command=clean(data.command),
        config=clean(
            yaml.safe_dump(_plain(data.run), sort_keys=False, allow_unicode=True, width=100), keep="\n"
        ),
        versions={clean(name): clean(version) for name, version in data.versions.items()},
    )
    write_bytes(path, page.encode("utf-8"))
    return path


def _plain(value: Any) -> Any:
    """Values that safe YAML can hold; whatever is not one becomes its text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, str | bool | int | float) else str(value)


def _headline(data: ReportData) -> list[dict[str, str]]:
    """Cards: the first member's main metrics, then what the run cost."""
    cards = []
    if data.members:
        numbers = complete(data.members[0].metrics)
        cards = [
            {
                "label": METRICS[name].label,
                "value": shown(name, numbers[name]),
                "meaning": METRICS[name].meaning,
            }
            for name in HEADLINE
            if name in numbers
        ]
    costs: tuple[tuple[str, str, Callable[[float], str], str], ...] = (
        ("tokens", "tokens", lambda v: f"{v:,.0f}", "Rows of activations trained on, after filtering."),
        (
            "tokens_per_s",
            "tokens/s",
            lambda v: f"{v:,.0f}",
            "Over the whole run, evaluation and checkpoints included.",
        ),
        ("wall_s", "wall time", lambda v: f"{v / 60:.1f} min" if v >= 100 else f"{v:.1f} s", "Start to end."),
        (
            "peak_rss_bytes",
            "peak memory",
            lambda v: f"{v / 2**30:.2f} GiB",
            "Largest resident size of the process.",
        ),
    )
    for name, label, form, meaning in costs:
        if name in data.summary:
            cards.append({"label": label, "value": form(data.summary[name]), "meaning": meaning})
    return cards


def _member(member: MemberReport) -> dict[str, Any]:
    numbers = complete(member.metrics)
    known = {name: about(name) or Shown(name, str, "") for name in ordered(numbers)}
    rows = [(clean(m.label), shown(name, numbers[name]), m.better, m.meaning) for name, m in known.items()]
    return {
        "name": clean(member.name),
        "description": clean(member.description),
        "metrics": rows,
        "plots": _images(member.plots),
        "features": [_feature(feature) for feature in member.features],
    }


def _feature(feature: FeatureReport) -> dict[str, Any]:
    top = max(feature.max_activation, 1e-30)
    return {
        "latent": int(feature.latent),
        "density": f"{100 * feature.density:.3g} %",
        "max_activation": f"{feature.max_activation:.3g}",
        "examples": [
            [(clean(token), min(LEVELS, max(0, round(LEVELS * value / top)))) for token, value in example]
            for example in feature.examples
        ],
    }


def _images(plots: Mapping[str, Path]) -> list[dict[str, str]]:
    """PNG files as base64, known kinds first and in the order of `CAPTIONS`."""
    ordered = {kind: plots[kind] for kind in CAPTIONS if kind in plots} | dict(plots)
    return [
        {
            "kind": clean(kind),
            "caption": CAPTIONS.get(kind, clean(kind)),
            "data": base64.b64encode(Path(file).read_bytes()).decode("ascii"),
        }
        for kind, file in ordered.items()
    ]


def _filters(counts: Mapping[str, int]) -> list[tuple[str, str, str]]:
    """(what, how many, share of tokens seen)."""
    seen = counts.get("seen", 0)
    rows = []
    for name in [
        *(name for name in FILTERS if name in counts),
        *(name for name in counts if name not in FILTERS),
    ]:
        share = f"{100 * counts[name] / seen:.2f} %" if seen and name != "seen" else ""
        rows.append((FILTERS.get(name) or clean(name), f"{counts[name]:,}", share))
    return rows
