"""Plots of a run as PNG files, from plain numbers: no figure state is kept and no display is needed.

Light background and the Okabe-Ito colours (Okabe and Ito 2008, "Color Universal Design"), which people
with any common colour blindness tell apart; held-out values are also told from training by their markers.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sae_train.redact import printable, redact
from sae_train.report.table import time_table

BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, BLACK = "#CC79A7", "#56B4E9", "#333333"
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK)
SIZE_INCHES = (8.0, 4.0)
DPI = 120
HELDOUT = "/heldout/"
"""What the key of a held-out number holds: `member/heldout/fvu` beside the training `member/fvu`."""
MAX_NAMED = 16
"""Points of a scatter that carry their names; more would cover each other."""
MAX_POINTS = 600
"""Points per line: about one per pixel of the axes' width; longer records are averaged in runs."""


def _figure(title: str, x_label: str, y_label: str) -> tuple[Any, Any]:
    """A figure and its axes, outside pyplot, which would keep every figure alive."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
    figure = Figure(figsize=SIZE_INCHES, dpi=DPI, facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(_plain(title), loc="left", fontsize=13, fontweight="bold", color=BLACK)
    axes.set_xlabel(x_label, fontsize=11)
    axes.set_ylabel(y_label, fontsize=11)
    axes.grid(True, color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=10)
    return figure, axes


def _plain(text: str) -> str:
    """Text as it is: matplotlib reads $...$ as mathematics and hides a legend's _name."""
    text = printable(str(redact(text))).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, format="png", metadata={"Software": None})
    return path


def _count_axis(axis: Any) -> None:
    from matplotlib.ticker import EngFormatter

    axis.set_major_formatter(EngFormatter(sep=""))


def density_histogram(
    density: Sequence[float] | Any, path: Path, title: str = "How often latents fire"
) -> Path:
    """Histogram of firing densities on a log axis, with those that never fired as a bar of their own.

    Args:
        density: [F] share of tokens on which each latent fires, in [0, 1]; list, array or CPU tensor.
        path: PNG to write.
        title: heading.
    """
    values = np.asarray(density, dtype=np.float64)
    fired = np.log10(values[values > 0])
    silent = int((values == 0).sum())
    figure, axes = _figure(title, "firing density: share of tokens on which the latent is active", "latents")
    low = min(-1, math.floor(float(fired.min()))) if len(fired) else -6
    axes.hist(fired, bins=np.linspace(low, 0, 1 - 10 * low), color=BLUE, edgecolor="white", lw=0.4)
    ticks: list[float] = list(range(low, 1))
    labels = [f"$10^{{{tick}}}$" for tick in ticks[:-1]] + ["1"]
    if silent:
        axes.bar(low - 0.5, silent, width=0.35, color=VERMILION)
        share = f"{silent:,}\n({100 * silent / len(values):.1f} %)"
        axes.annotate(share, (low - 0.5, silent), ha="center", va="bottom", fontsize=10, color=VERMILION)
        ticks, labels = [low - 0.5, *ticks], ["never", *labels]
    if len(fired):
        middle = float(np.median(fired))
        axes.axvline(middle, color=BLACK, linestyle="--", linewidth=1.2)
        axes.annotate(
            f" median {10**middle:.2g}",
            (middle, 0.97),
            xycoords=("data", "axes fraction"),
            va="top",
            fontsize=10,
        )
    axes.set_xticks(ticks, labels)
    axes.margins(y=0.15)
    return _save(figure, path)


def curves(
    records: Sequence[Mapping[str, Any]],
    keys: Mapping[str, str] | Sequence[str],
    path: Path,
    y_label: str = "",
    title: str | None = None,
    log_y: bool = False,
) -> Path:
    """Numbers of a run against the tokens it has trained on.

    Args:
        records: lines of metrics.jsonl; one without a key, or with null, is left out of that key's line.
        keys: legend -> record key, or just record keys. `a/heldout/fvu` is drawn as markers, in the colour of
            `a/fvu`, which is a line.
        path: PNG to write.
        y_label: axis label, with its unit.
        title: heading; the axis label by default.
        log_y: logarithmic axis; zero and negative values are left out.
    """
    figure, axes = _figure(y_label if title is None else title, "tokens", y_label)
    named = dict(keys) if isinstance(keys, Mapping) else {key: key for key in keys}
    colours: dict[str, str] = {}
    for label, key in named.items():
        tokens, values = _series(records, key, log_y)
        colour = colours.setdefault(key.replace(HELDOUT, "/"), COLOURS[len(colours) % len(COLOURS)])
        if HELDOUT in key:
            axes.plot(
                tokens, values, "o:", ms=7, mec="white", color=colour, lw=1, label=_plain(label), zorder=3
            )
        else:
            marker = "." if len(tokens) == 1 else ""
            axes.plot(*_thinned(tokens, values), color=colour, lw=1.8, marker=marker, label=_plain(label))
    if log_y:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    _count_axis(axes.xaxis)
    axes.set_xlim(left=0)
    if len(axes.lines) > 1:
        axes.legend(frameon=False, fontsize=10, ncols=2 if len(axes.lines) > 6 else 1)
    return _save(figure, path)


def _series(records: Sequence[Mapping[str, Any]], key: str, positive: bool) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(record["tokens"], record[key]) for record in records if record.get(key) is not None]
    pairs = [pair for pair in pairs if not positive or pair[1] > 0]
    both = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def _thinned(tokens: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most MAX_POINTS points: means over equal runs of neighbours."""
    if len(tokens) <= MAX_POINTS:
        return tokens, values
    starts = np.linspace(0, len(tokens), MAX_POINTS, endpoint=False).astype(int)
    sizes = np.diff(np.append(starts, len(tokens)))
    return np.add.reduceat(tokens, starts) / sizes, np.add.reduceat(values, starts) / sizes


def lr_curve(
    records: Sequence[Mapping[str, Any]], path: Path, keys: Mapping[str, str] | Sequence[str] = ("lr",)
) -> Path:
    """The learning rate of each member against tokens."""
    return curves(records, keys, path, "learning rate", title="Learning rate")


def l0_distribution(counts: Sequence[int] | Any, path: Path, title: str = "Active latents per token") -> Path:
    """How many latents are active on a token.

    Args:
        counts: [K + 1] number of tokens with 0, 1 ... K active latents; list, array or CPU tensor.
        path: PNG to write.
        title: heading.
    """
    tokens = np.asarray(counts, dtype=np.float64)
    figure, axes = _figure(title, "L0: latents active on a token", "share of tokens (%)")
    present = np.flatnonzero(tokens)
    if len(present):
        low, high = int(present[0]), int(present[-1])
        width = max(1, math.ceil((high - low + 1) / 100))
        edges = np.arange(low, high + width + 1, width)
        share, _ = np.histogram(np.arange(len(tokens)), bins=edges, weights=100 * tokens / tokens.sum())
        axes.bar(edges[:-1] + (width - 1) / 2, share, width=0.9 * width, color=BLUE)
        mean = float((np.arange(len(tokens)) * tokens).sum() / tokens.sum())
        axes.axvline(mean, color=BLACK, linestyle="--", linewidth=1.2)
        axes.annotate(
            f" mean {mean:.1f}", (mean, 0.97), xycoords=("data", "axes fraction"), va="top", fontsize=10
        )
        room = max(3.0, 0.05 * (high - low))
        axes.set_xlim(max(-1.0, low - room), high + room)
        axes.set_ylim(0, 1.15 * float(share.max()))
    axes.xaxis.get_major_locator().set_params(integer=True)
    return _save(figure, path)


def _apart(numbers: Iterable[float]) -> list[float]:
    """Those of some numbers, from the least, whose labels do not touch on an axis of their logarithms."""
    rising = sorted(numbers)
    apart, out = (rising[-1] / rising[0]) ** 0.08, rising[:1]
    for x in rising:
        if x > out[-1] * apart:
            out.append(x)
    return out


def pareto(
    series: Mapping[str, Mapping[str, tuple[float, float]]],
    path: Path,
    title: str = "Reconstruction against sparsity",
) -> Path:
    """What several SAEs trade: the error of each against its active latents.

    Args:
        series: legend -> name of an SAE -> (L0, FVU); SAEs of one series are joined by a line. A pair with a
            number that is not finite, or no positive L0, is left out.
        path: PNG to write.
        title: heading.
    """
    figure, axes = _figure(title, "L0: active latents per token", "fraction of variance unexplained")
    drawn: list[tuple[float, float]] = []
    for (legend, members), colour in zip(series.items(), itertools.cycle(COLOURS), strict=False):
        known = {
            name: (x, y)
            for name, (x, y) in members.items()
            if math.isfinite(x) and math.isfinite(y) and x > 0
        }
        pairs = sorted(known.values())
        drawn += pairs
        axes.plot(*zip(*pairs, strict=True) if pairs else ([], []), "o-", color=colour, lw=1.4, ms=6)
        axes.lines[-1].set_label(_plain(legend))
        if sum(map(len, series.values())) <= MAX_NAMED:
            for name, point in known.items():
                spot = {"textcoords": "offset points", "xytext": (6, 4), "fontsize": 9, "color": BLACK}
                axes.annotate(_plain(name), point, **spot)
    if len({x for x, _ in drawn}) > 1:
        axes.set_xscale("log")
        axes.set_xticks(_apart(x for x, _ in drawn))
        axes.minorticks_off()
        axes.xaxis.set_major_formatter("{x:.3g}")
    axes.margins(x=0.12, y=0.15)
    axes.set_ylim(bottom=0)
    if len(series) > 1:
        axes.legend(frameon=False, fontsize=10)
    return _save(figure, path)


def share_histogram(
    share: Sequence[float] | Any, hooks: tuple[str, str], path: Path, title: str = "Whose latents are whose"
) -> Path:
    """How latents are shared between two hooks.

    Args:
        share: [F] each latent's share of decoder norm at the second hook; list, array or CPU tensor.
        hooks: their names.
        path: PNG to write.
        title: heading.
    """
    values = np.asarray(share, dtype=np.float64)
    figure, axes = _figure(title, "share of decoder norm", "latents")
    axes.hist(values, bins=np.linspace(0, 1, 51), color=BLUE, edgecolor="white", lw=0.4)
    axes.set_xlim(0, 1)
    ends = [f"only\n{_plain(hooks[0])}", "both alike", f"only\n{_plain(hooks[1])}"]
    axes.set_xticks([0, 0.5, 1], ends)
    return _save(figure, path)


def time_share(seconds: Mapping[str, float], path: Path, title: str = "Where the time went") -> Path:
    """Activity -> seconds of wall time as horizontal bars, the longest first."""
    rows = time_table(seconds)
    figure, axes = _figure(title, "share of wall time (%)", "")
    figure.set_size_inches(SIZE_INCHES[0], 1.3 + 0.36 * max(len(rows), 1))
    places = np.arange(len(rows))[::-1]
    shares = [100 * share for _, _, share in rows]
    axes.barh(places, shares, height=0.65, color=BLUE)
    for place, (_, spent, share) in zip(places, rows, strict=True):
        axes.annotate(
            f" {100 * share:.1f} %  ({spent:,.1f} s)", (100 * share, place), va="center", fontsize=10
        )
    axes.set_yticks(places, [_plain(name) for name, _, _ in rows])
    axes.set_xlim(0, 1.3 * max([*shares, 1e-9]))
    axes.grid(False, axis="y")
    return _save(figure, path)


def density_vs_activation(
    density: Sequence[float] | Any,
    mean_activation: Sequence[float] | Any,
    path: Path,
    title: str = "How often and how strongly latents fire",
) -> Path:
    """Latents that fire by density [F] and mean activation when active [F]; shade is latents per cell."""
    x, y = np.asarray(density, dtype=np.float64), np.asarray(mean_activation, dtype=np.float64)
    here = (x > 0) & (y > 0) & np.isfinite(x) & np.isfinite(y)
    figure, axes = _figure(title, "firing density: share of tokens", "mean activation when active")
    axes.set_xscale("log")
    axes.set_yscale("log")
    if here.any():
        cells = axes.hexbin(
            x[here],
            y[here],
            xscale="log",
            yscale="log",
            gridsize=60,
            mincnt=1,
            bins="log",
            cmap="cividis_r",
            lw=0,
        )
        figure.colorbar(cells, ax=axes, label="latents per cell")
    return _save(figure, path)
