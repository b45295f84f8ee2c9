"""The numbers of a finished run as tables, and what each of them means.

`METRICS` is the one list of what is shown, in which order, in what form and with which words: the
terminal, the HTML page and any other reader of a run's numbers use it.
"""

import io
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sae_train.redact import printable, redact


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _fixed(digits: int) -> Callable[[float], str]:
    return lambda value: f"{value:.{digits}f}"


@dataclass(frozen=True)
class Shown:
    """How one number is shown.

    Attributes:
        label: heading.
        form: value -> text, for finite values.
        meaning: one line for a reader who does not know the field.
        better: "lower", "higher" or "" when neither is.
    """

    label: str
    form: Callable[[float], str]
    meaning: str
    better: str = ""


METRICS: dict[str, Shown] = {
    "fvu": Shown(
        "FVU",
        _fixed(4),
        "Fraction of the held-out variance that the reconstruction misses, attention sinks left out. "
        "0 is perfect, 1 is no better than the mean.",
        "lower",
    ),
    "ce_increase": Shown(
        "CE increase",
        _fixed(3),
        "Nats per token by which the language model's cross-entropy rises when it runs on reconstructions.",
        "lower",
    ),
    "recovered_mean": Shown(
        "CE recovered",
        _fixed(3),
        "Share of the damage of replacing the layer by its mean that the SAE undoes. "
        "1 means the model does not notice; nan, that replacing it does no damage.",
        "higher",
    ),
    "l0": Shown(
        "L0", _fixed(1), "Latents active on a token, on average. Fewer is sparser and easier to read."
    ),
    "dead": Shown(
        "dead",
        _percent,
        "Share of latents that have not fired for the last stretch of training: capacity that is not used.",
        "lower",
    ),
    "silent": Shown(
        "silent", _percent, "Share of latents that never fire on the held-out rows, which are few."
    ),
    "dense": Shown(
        "dense", _percent, "Share of latents active on more than a tenth of tokens: rarely interpretable."
    ),
    "fvu_all": Shown(
        "FVU, sinks included",
        _fixed(4),
        "The same over all tokens. A few sinks carry most of the variance, so this flatters every SAE.",
        "lower",
    ),
    "nmse_median": Shown(
        "median error",
        _fixed(4),
        "Squared error over squared norm of the median token, not centred.",
        "lower",
    ),
    "cosine": Shown("cosine", _fixed(4), "Mean cosine between a row and its reconstruction.", "higher"),
    "l2_ratio": Shown(
        "length ratio",
        _fixed(4),
        "Mean length of a reconstruction over that of its row. 1 is as long as it should be.",
    ),
    "relative_reconstruction_bias": Shown(
        "reconstruction bias",
        _fixed(4),
        "E|y^|^2 / E<y, y^>: 1 is unbiased, below 1 the reconstruction is shrunk.",
    ),
    "ce_clean": Shown("CE clean", _fixed(3), "Cross-entropy of the model as it is, nats per token."),
    "ce_sae": Shown(
        "CE with SAE", _fixed(3), "Cross-entropy with reconstructions in place of the layer's rows."
    ),
    "ce_mean": Shown("CE mean-ablated", _fixed(3), "Cross-entropy with the layer's mean row everywhere."),
    "ce_zero": Shown("CE zero-ablated", _fixed(3), "Cross-entropy with zeros in place of the layer's rows."),
    "recovered_zero": Shown(
        "CE recovered, zero",
        _fixed(3),
        "Recovered against zeros, as most papers print it: easier than against the mean.",
    ),
    "tokens": Shown(
        "CE tokens", lambda value: f"{value:,.0f}", "Held-out predictions that the cross-entropies average."
    ),
    "kl_sae": Shown(
        "KL",
        _fixed(4),
        "KL divergence of the predictions with the SAE from the model's own, nats per token.",
        "lower",
    ),
    "recovery/mcc": Shown(
        "true features matched",
        _fixed(3),
        "Mean cosine of the best one-to-one match of latents with the true features of synthetic rows.",
        "higher",
    ),
    "recovery/mmcs": Shown(
        "nearest latent",
        _fixed(3),
        "Mean over true features of the largest cosine with any latent.",
        "higher",
    ),
    "recovery/above_0.9": Shown(
        "recovered", _percent, "Share of true features with a latent at a cosine above 0.9.", "higher"
    ),
    "recovery/rare": Shown(
        "recovered, rare", _percent, "The same over the third of features that fire least.", "higher"
    ),
    "recovery/common": Shown(
        "recovered, common", _percent, "The same over the third of features that fire most.", "higher"
    ),
    "recovery/f1": Shown(
        "detection F1",
        _fixed(3),
        "How well the matched latent's firing tells that its true feature is on, mean over features.",
        "higher",
    ),
    "recovery/duplicates": Shown(
        "duplicates",
        _percent,
        "Share of firing latents whose nearest true feature has a nearer latent already.",
        "lower",
    ),
    "recovery/silent": Shown(
        "features never on",
        lambda value: f"{value:,.0f}",
        "True features that are off in all held-out rows: their F1 is not counted.",
    ),
}

SECOND = "other/"
"""Begins the name of a number that is the second model's."""


def about(name: str) -> Shown | None:
    """What is known of a number: `other/NAME` is NAME of the second model, `fvu/HOOK` the FVU of one hook.

    `fvu_first/COUNT` is the FVU with the first latents alone.
    """
    if name in METRICS:
        return METRICS[name]
    if name.startswith(SECOND) and (first := METRICS.get(name.removeprefix(SECOND))):
        return replace(first, label=f"{first.label}, second model")
    base, _, part = name.partition("/")
    if base == "fvu" and part:
        return replace(METRICS["fvu"], label=f"FVU of {part}", meaning="The same for one of several hooks.")
    if base == "fvu_first" and part:
        meaning = "The same with the other latents left out."
        return replace(METRICS["fvu"], label=f"FVU of the first {part}", meaning=meaning)
    return None


def ordered(names: Iterable[str]) -> list[str]:
    """Known numbers in the order of `METRICS`, each with those of its hooks and models; then the others."""
    place = {name: i for i, name in enumerate(METRICS)}

    def key(name: str) -> int:
        own = name.removeprefix(SECOND)
        base = own.partition("/")[0].removesuffix("_first")
        return place.get(own, place.get(base, len(place)))

    return sorted(names, key=key)


HEADLINE = ("fvu", "ce_increase", "recovered_mean", "l0", "dead")
TERMINAL = (*HEADLINE, "fvu_all", "cosine", "ce_clean", "ce_sae")
"""What fits a terminal of 100 columns."""


def complete(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics with what follows from them: `ce_increase` is `ce_sae - ce_clean`."""
    out = dict(metrics)
    if "ce_sae" in out and "ce_clean" in out:
        out.setdefault("ce_increase", out["ce_sae"] - out["ce_clean"])
    return out


def shown(name: str, value: float | None) -> str:
    """One number as text: a dash when it was not measured, words when it is not finite."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return "not finite"
    known = about(name)
    return known.form(value) if known else f"{value:.4g}"


def final_table(members: Mapping[str, Mapping[str, float]], title: str = "Held-out documents") -> Table:
    """A row per SAE with the numbers that matter most.

    Args:
        members: name -> metric -> value, as evaluation gives them and with `dead` from training.
        title: heading.
    """
    table = Table(title=Text(printable(title)), title_justify="left", title_style="bold")
    table.add_column("SAE", style="bold")
    columns = [name for name in TERMINAL if any(name in complete(metrics) for metrics in members.values())]
    for name in columns:
        table.add_column(METRICS[name].label, justify="right")
    for member, metrics in members.items():
        numbers = complete(metrics)
        table.add_row(
            Text(printable(str(redact(member)))), *(Text(shown(name, numbers.get(name))) for name in columns)
        )
    return table


def final_text(members: Mapping[str, Mapping[str, float]], title: str = "Held-out documents") -> str:
    """The same table as plain text, without colours, as wide as it needs to be."""
    console = Console(file=io.StringIO(), width=200, force_terminal=False, color_system=None)
    with console.capture() as capture:
        console.print(final_table(members, title))
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def time_table(seconds: Mapping[str, float], wall_s: float | None = None) -> list[tuple[str, float, float]]:
    """Where the time went, the largest part first.

    Args:
        seconds: activity -> seconds of wall time, not overlapping.
        wall_s: the whole; what the activities do not account for is "unaccounted". Their sum by default.

    Returns:
        (activity, seconds, share of the whole); the shares add up to 1.

    Raises:
        ValueError: a negative time, or activities longer than the whole by more than a thousandth.
    """
    spent = sum(seconds.values())
    whole = spent if wall_s is None else wall_s
    if min(seconds.values(), default=0.0) < 0 or spent > whole * 1.001:
        raise ValueError(f"seconds {dict(seconds)} do not fit into {whole} s")
    rows = dict(seconds)
    if whole > spent:
        rows["unaccounted"] = whole - spent
    whole = max(whole, spent)
    ordered = sorted(rows.items(), key=lambda row: row[1], reverse=True)
    return [(name, spent_s, spent_s / whole if whole else 0.0) for name, spent_s in ordered]
