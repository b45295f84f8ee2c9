"""README.md of a published SAE: what it is, how good it is, how to load it."""

from pathlib import Path
from typing import Any

from sae_train.files import write_bytes
from sae_train.redact import redact
from sae_train.report.table import about, complete, ordered, shown


def write_card(path: Path, description: str, numbers: dict[str, float], meta: dict[str, Any]) -> None:
    """Write the card. Texts from outside lose the characters that mean something to Markdown or HTML."""
    numbers = complete(numbers)

    def known(key: str) -> str:
        return escape(str(meta.get(key, "unknown")))

    rows = [
        f"| {escape(metric.label)} | {shown(name, numbers[name])} | {metric.meaning} |"
        for name in ordered(numbers)
        if (metric := about(name)) is not None
    ]
    models = f"Model `{known('model')}`, revision `{known('model_revision')}`"
    if "other_model" in meta:
        models += f", and model `{known('other_model')}`, revision `{known('other_model_revision')}`"
    lines = [
        f"# {escape(description)}",
        "",
        f"{models}, trained on {meta['tokens']:,} tokens, seed {meta['seed']}.",
        "",
        "| held-out | value | meaning |",
        "|---|---|---|",
        *rows,
        "",
        "```python",
        "from sae_train import load_sae",
        'sae = load_sae("path/to/this/folder")',
        "codes = sae.encode(x)        # x: [n, d] raw activations",
        "x_hat = sae.decode(codes)",
        "```",
        "",
        "`features.safetensors` holds firing counts, densities, mean and maximum activations,",
        "and the lists of dead and dense latents.",
        "",
    ]
    write_bytes(path, "\n".join(lines).encode())


def escape(text: str) -> str:
    """Text without secrets, or characters that mean something to Markdown, HTML or a terminal."""
    return "".join(c if c.isprintable() and c not in "`<>|\\[]*#" else " " for c in str(redact(text)))
