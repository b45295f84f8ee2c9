"""The card of a repository of SAEs: front matter for the hub's filters, and what a reader has to know.

Everything in it is made of the runs' own records, so publishing the same runs again gives the same bytes.
Names that others chose (models, text, hooks) are escaped: they cannot end the front matter, a table or a
fence.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sae_train.hub.public import LocalNames, hub_id
from sae_train.hub.runs import TrainedSAE
from sae_train.redact import redact
from sae_train.report import plots
from sae_train.report.card import escape, loading, models, number_table

COLUMNS = ("l0", "fvu", "ce_clean", "ce_sae", "ce_zero", "kl_sae", "recovered_mean", "dead", "dense")
MODEL_INDEX = {"fvu": "fraction of variance unexplained", "l0": "L0", "ce_increase": "cross-entropy increase"}
TAGS = ["sparse-autoencoder", "sae", "mechanistic-interpretability"]
COMMIT = re.compile(r"[0-9a-f]{40}")
MOST_PICTURES = 8
"""Density histograms that the card shows; every SAE has its own beside its weights."""
RECIPE = ("sae", "optim", "train", "filter", "kernels")
CORPUS_KEYS = ("name", "subset", "split", "revision", "sources", "context_length", "bos", "epochs", "seed")


@dataclass
class Publication:
    """What a repository is made of.

    Attributes:
        repo: USER/NAME.
        saes: the SAEs, each with its folder.
        license: the hub's name of a licence, or None if none was stated.
        commit: of this project that trained them, where it ran out of a checkout; "" where none is known.
        base_model: Hub id to name instead of a folder.
        datasets: Hub ids to name instead of what the runs name.
        forms: format -> SAE id -> folder in the repository, for forms beside our own.
        refused: SAE id -> why a form was left out.
    """

    repo: str
    saes: list[TrainedSAE]
    license: str | None = None
    commit: str = ""
    base_model: str | None = None
    datasets: list[str] | None = None
    forms: dict[str, dict[str, str]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


def draw_pareto(saes: Sequence[TrainedSAE], path: Path) -> None:
    """FVU against L0, a line for each architecture and place."""
    series: dict[str, dict[str, tuple[float, float]]] = {}
    for sae in saes:
        legend = f"{sae.sae['name']} {sae.sae['activation']['name']}, {sae.id.rpartition('/')[0]}"
        l0, fvu = sae.numbers.get("l0"), sae.numbers.get("fvu")
        if l0 is not None and fvu is not None:
            series.setdefault(legend, {})[sae.id.rpartition("/")[2]] = (l0, fvu)
    plots.pareto(series, path)


def repo_card(what: Publication) -> str:
    """README.md of the repository."""
    first = what.saes[0]
    many = f"{len(what.saes)} sparse autoencoders" if len(what.saes) > 1 else "A sparse autoencoder"
    hooks = sorted({escape(sae.meta["hook"]) for sae in what.saes})
    of = f"{escape(str(first.meta['model']))} " if hub_id(first.meta.get("model")) else ""
    lines = [
        f"# {escape(what.repo.rpartition('/')[2])}",
        "",
        f"{many} on activations of {of}at {', '.join(f'`{hook}`' for hook in hooks)}, "
        "trained and published with sae-train.",
        "",
        *_places(what),
        "",
        "## SAEs",
        "",
        *_table(what),
        "",
        "FVU is the sum of squared errors over the sum of squares around the mean, on held-out documents,",
        "attention sinks left out. Cross-entropies are in nats per token, with the reconstruction in the",
        "layer's place (CE with SAE) and with zeros there. Dead latents did not fire for the last stretch of",
        "training; dense ones fire on more than a tenth of the tokens.",
        "",
        "![FVU against L0](plots/pareto.png)",
        "",
        "## Density",
        "",
        *(f"![{sae.id}]({sae.id}/plots/density.png)" for sae in what.saes[:MOST_PICTURES]),
        "",
        "## Loading",
        "",
        *_snippets(what),
        "",
        "## Recipe",
        "",
        *_recipe(what),
        "",
        "## Provenance",
        "",
        *_provenance(what),
        "",
        "## Limits",
        "",
        "The metrics above are of held-out text from the same source as the training text; on other text",
        "they are worse. That a latent is active on related tokens does not show that the model uses it so.",
        "",
        "## Citation",
        "",
        "Please cite this repository with the commit that you used, and the model's authors.",
        "",
    ]
    return front_matter(what) + "\n".join(lines)


def front_matter(what: Publication) -> str:
    """The YAML that the hub reads."""
    from huggingface_hub import ModelCardData

    found = (hub_id(sae.meta.get(key)) for sae in what.saes for key in ("model", "other_model"))
    bases = list(dict.fromkeys(name for name in found if name is not None))
    revisions = {sae.meta.get("model_revision") for sae in what.saes}
    more: dict[str, Any] = {}
    if bases:
        more = {"base_model": bases[0] if len(bases) == 1 else bases, "base_model_relation": "adapter"}
        if len(revisions) == 1 and COMMIT.fullmatch(revision := str(revisions.pop())):
            more["base_model_revision"] = revision
    if datasets := _datasets(what):
        more["datasets"] = datasets
    saelens = "saelens" in what.forms
    results = _results(what)
    data = ModelCardData(
        library_name="saelens" if saelens else "sae-train",
        license=what.license,
        tags=TAGS + ["sae-train"] + (["saelens"] if saelens else []),
        model_name=what.repo.rpartition("/")[2] if results else None,
        eval_results=results or None,
        **more,
    )
    return f"---\n{data.to_yaml()}\n---\n\n"


def _datasets(what: Publication) -> list[str]:
    if what.datasets is not None:
        return what.datasets
    names: list[Any] = []
    for sae in what.saes:
        corpus = sae.record.config.get("corpus") or {}
        if sae.meta.get("corpus") is not None or corpus.get("sources"):
            names += [corpus.get("name"), *(item.get("name") for item in corpus.get("sources") or [])]
    return list(dict.fromkeys(name for name in map(hub_id, names) if name is not None and "/" in name))


def _results(what: Publication) -> list[Any]:
    """Held-out metrics in the hub's form; what was not finite is left out."""
    from huggingface_hub import EvalResult

    datasets = _datasets(what)
    out = []
    for sae in what.saes:
        numbers = dict(sae.numbers)
        clean, spliced = numbers.get("ce_clean"), numbers.get("ce_sae")
        if clean is not None and spliced is not None:
            numbers["ce_increase"] = spliced - clean
        for name, words in MODEL_INDEX.items():
            value = numbers.get(name)
            if value is not None and math.isfinite(value):
                result = EvalResult(
                    task_type="feature-extraction",
                    dataset_type=datasets[0] if datasets else "text",
                    dataset_name=f"held-out documents of {datasets[0] if datasets else 'the training text'}",
                    metric_type=name,
                    metric_name=f"{words}, {sae.id}",
                    metric_value=round(value, 6),
                )
                out.append(result)
    return out


def _places(what: Publication) -> list[str]:
    """Which model, and each hook in both namings."""
    lines = [f"{text}." for text in dict.fromkeys(models(sae.meta) for sae in what.saes)]
    hooks: dict[str, Any] = {}
    for sae in what.saes:
        hooks |= sae.meta.get("hooks") or {}
    if hooks:
        lines += ["", "| hook | module of the Hugging Face model | TransformerLens |", "|---|---|---|"]
        for key, site in hooks.items():
            module = f"{site.get('module')}, {site.get('side')}put"
            lens = site.get("transformer_lens") or "-"
            lines.append(f"| `{escape(key)}` | `{escape(module)}` | `{escape(str(lens))}` |")
    return lines


def _table(what: Publication) -> list[str]:
    rows = {f"`{sae.id}`": sae.numbers for sae in what.saes}
    more = {
        "latents": {f"`{sae.id}`": f"{sae.sae['d_sae']:,}" for sae in what.saes},
        "tokens": {f"`{sae.id}`": f"{sae.meta['tokens']:,}" for sae in what.saes},
        "lr": {f"`{sae.id}`": "-" if sae.lr is None else f"{sae.lr:.3g}" for sae in what.saes},
        "seed": {f"`{sae.id}`": str(sae.meta["seed"]) for sae in what.saes},
    }
    return number_table(rows, COLUMNS, more)


def _snippets(what: Publication) -> list[str]:
    first = what.saes[0].id
    lines = loading(f"hf://{what.repo}/{first}")
    if folders := what.forms.get("saelens"):
        sae = next(iter(folders.values()))
        call = f'sae = SAE.from_pretrained("{what.repo}", "{sae}")'
        lines += ["", "With SAELens:", "", "```python", "from sae_lens import SAE", call, "```"]
    if folders := what.forms.get("sparsify"):
        sae = next(iter(folders.values()))
        call = f'sae = SparseCoder.load_from_hub("{what.repo}", hookpoint="{sae}")'
        lines += ["", "With sparsify:", "", "```python", "from sparsify import SparseCoder", call, "```"]
    for name in sorted(what.forms.keys() - {"saelens", "sparsify"}):
        folders = what.forms[name]
        lines += ["", f"For {name}: " + ", ".join(f"`{folder}`" for folder in folders.values()) + "."]
    if what.forms:
        lines += ["", "Each of these forms was read back and compared with the SAE: `export.json` beside it."]
    if what.refused:
        lines += ["", "Forms that cannot hold an SAE:", ""]
        lines += [f"- `{sae}`: {escape(reason)}" for sae, reason in what.refused.items()]
    return lines


def _recipe(what: Publication) -> list[str]:
    """What the runs were configured with: whole for one, for several only once what is the same."""
    trees = [recipe(sae) for sae in what.saes]
    same = {key: value for key, value in trees[0].items() if all(tree.get(key) == value for tree in trees)}
    lines = _yaml(same)
    for sae, tree in zip(what.saes, trees, strict=True):
        differs = {key: value for key, value in tree.items() if key not in same}
        if differs:
            lines += ["", f"`{sae.id}` besides:", "", *_yaml(differs)]
    return lines


def recipe(sae: TrainedSAE) -> dict[str, Any]:
    """The keys of a run that a repetition needs, without names of local files."""
    config = sae.record.config
    tree = {key: config[key] for key in RECIPE if key in config}
    tree |= {key: sae.member[key] for key in ("sae", "optim", "hook", "target", "seed") if key in sae.member}
    if sae.meta.get("corpus") is not None:
        corpus = config.get("corpus") or {}
        tree["corpus"] = {key: corpus[key] for key in CORPUS_KEYS if key in corpus}
    tree["source"] = {"name": (config.get("source") or {}).get("name")}
    replaced: dict[str, Any] = LocalNames(config).replaced(tree)
    return replaced


def _yaml(tree: Mapping[str, Any]) -> list[str]:
    text = yaml.safe_dump(redact(dict(tree)), sort_keys=True, allow_unicode=False)
    return ["```yaml", text.replace("`", "'").rstrip(), "```"]


def _provenance(what: Publication) -> list[str]:
    """A row for each run."""
    lines = [
        f"Licence: {what.license or 'none was stated'}. "
        + (f"Trained with commit `{what.commit}` of sae-train." if what.commit else ""),
        "",
        "| SAE | sae-train | torch | configuration | data | tokens | steps | machine |",
        "|---|---|---|---|---|---:|---:|---|",
    ]
    for sae in what.saes:
        versions = sae.record.versions
        cells = [
            f"`{sae.id}`",
            escape(str(versions.get("sae-train", "unknown"))),
            escape(str(versions.get("torch", "unknown"))),
            f"`{sae.config_hash[:16]}`",
            f"`{sae.data_fingerprint[:16]}`",
            f"{sae.record.tokens:,}",
            f"{sae.record.step:,}",
            escape(str(versions.get("machine", "unknown"))),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "`configuration` is the sha256 of the keys that decide the result (its first 8 digits end the name",
        "of a run folder that was given no other), `data` that of everything the rows are a function of; the",
        "parts of it are in `fingerprint` of each config.json.",
    ]
    return lines
