"""README.md of a published SAE: what it is, how good it is, how to load it.

The card of a repository on a hub (`sae_train.hub.card`) is made of the same pieces. Texts from outside lose
the characters that mean something to Markdown or HTML.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sae_train.files import write_bytes
from sae_train.redact import redact
from sae_train.report.table import about, complete, ordered, shown

HERE = "path/to/this/folder"


def write_card(
    path: Path, description: str, numbers: Mapping[str, float | None], meta: dict[str, Any]
) -> None:
    """Write the card of one SAE.

    Args:
        path: README.md.
        description: one line, from `describe`.
        numbers: held-out metrics; None is one that is not finite.
        meta: that of its config.json.
    """
    write_bytes(path, card(description, numbers, meta).encode())


def card(
    description: str, numbers: Mapping[str, float | None], meta: Mapping[str, Any], address: str = HERE
) -> str:
    """The card of one SAE; `address` is what `load_sae` is given in the example."""
    lines = [
        f"# {escape(description)}",
        "",
        f"{models(meta)}, trained on {meta['tokens']:,} tokens, seed {meta['seed']}.",
        "",
        "| held-out | value | meaning |",
        "|---|---|---|",
        *metric_rows(numbers),
        "",
        *loading(address),
        "",
        "`features.safetensors` holds firing counts, densities, mean and maximum activations,",
        "and the lists of dead and dense latents.",
        "",
    ]
    return "\n".join(lines)


def describe(sae: Mapping[str, Any], meta: Mapping[str, Any], d_in: int, d_out: int) -> str:
    """One line: architecture, activation, size and place.

    Args:
        sae: the `sae` of config.json.
        meta: the `meta` of config.json.
        d_in, d_out: widths of what it reads and reconstructs.
    """
    where = f"{meta['hook']} (width {d_in})"
    if meta.get("target"):
        where += f" to {meta['target']} (width {d_out})"
    kind = "SAE" if sae["kind"] == "autoencoder" else sae["kind"]
    return f"{sae['name']} {kind}, {sae['activation']['name']}, {sae['d_sae']:,} latents on {where}"


def models(meta: Mapping[str, Any]) -> str:
    """Which model or models the rows come from, as the beginning of a sentence."""

    def known(key: str) -> str:
        return escape(str(meta.get(key, "unknown")))

    text = f"Model `{known('model')}`, revision `{known('model_revision')}`"
    if "other_model" in meta:
        text += f", and model `{known('other_model')}`, revision `{known('other_model_revision')}`"
    return text


def metric_rows(numbers: Mapping[str, float | None]) -> list[str]:
    """Rows of a table: every known metric with its value and what it means."""
    finite = complete({name: value for name, value in numbers.items() if value is not None})
    return [
        f"| {escape(metric.label)} | {shown(name, finite.get(name, math.nan))} | {_cell(metric.meaning)} |"
        for name in ordered({*numbers, *finite})
        if (metric := about(name)) is not None
    ]


def _cell(text: str) -> str:
    """Our own words in a table: formulas in them hold what Markdown and HTML would read otherwise."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def number_table(
    rows: Mapping[str, Mapping[str, float | None]],
    names: Sequence[str],
    more: Mapping[str, Mapping[str, str]] | None = None,
) -> list[str]:
    """A table of several SAEs.

    Args:
        rows: what stands in the first column -> metrics.
        names: metrics in order; one that no SAE has gets no column.
        more: further columns: heading -> what stands in the first column -> text.
    """
    full = {
        row: complete({name: value for name, value in numbers.items() if value is not None})
        for row, numbers in rows.items()
    }
    columns = [name for name in names if any(name in numbers for numbers in full.values())]
    heads = [metric.label if (metric := about(name)) is not None else name for name in columns]
    more = more or {}
    lines = ["| " + " | ".join(["SAE", *map(escape, heads), *more]) + " |"]
    lines.append("|---|" + "---:|" * (len(columns) + len(more)))
    for row, numbers in full.items():
        cells = [shown(name, numbers.get(name)) for name in columns]
        lines.append("| " + " | ".join([row, *cells, *(texts[row] for texts in more.values())]) + " |")
    return lines


def loading(address: str) -> list[str]:
    """How to load an SAE with this project."""
    return [
        "```python",
        "from sae_train import load_sae",
        f'sae = load_sae("{address}")',
        "codes = sae.encode(x)        # x: [n, d] raw activations",
        "x_hat = sae.decode(codes)",
        "```",
    ]


def escape(text: str) -> str:
    """Text without secrets, or characters that mean something to Markdown, HTML or a terminal."""
    return "".join(c if c.isprintable() and c not in "`<>|\\[]*#" else " " for c in str(redact(text)))
