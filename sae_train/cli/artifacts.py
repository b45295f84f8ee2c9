"""What a finished run gives to wandb: weights, statistics and the report, under the names that SAELens uses.

    sae_MODEL_HOOK_WIDTH                        "model": the published folder, without its plots
    sae_MODEL_HOOK_WIDTH_log_feature_sparsity   log10 of the firing rates, in SAELens' file
    NAME_report                                 "report": report.html

Slashes become "__", as there. SAEs of one run that share a name are versions of it, told apart by an alias.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sae_train.config import Config
from sae_train.files import read_json, read_tensors, write_tensors
from sae_train.hub.public import hub_id, public_name
from sae_train.sae.io import CONFIG, MAX_CONFIG_BYTES, WEIGHTS
from sae_train.sinks import Artifact

FILES = (WEIGHTS, CONFIG, "features.safetensors", "metrics.json", "README.md")
MAX_NAME = 120
LEAST_RATE = 1e-10
"""Added to a firing rate before its logarithm, as SAELens does."""


def artifacts(config: Config, run: Path, names: Sequence[str]) -> list[Artifact]:
    """The files of a finished run.

    Args:
        config: of the run.
        run: its folder.
        names: of its SAEs.
    """
    out = []
    for name in names:
        folder = run / "saes" / name
        title = artifact_name(read_json(folder / CONFIG, MAX_CONFIG_BYTES))
        out.append(Artifact(title, "model", {file: folder / file for file in FILES}, name))
        sparsity = run / "wandb" / "sparsity" / f"{name}.safetensors"
        sparsity.parent.mkdir(parents=True, exist_ok=True)
        rate = read_tensors(folder / "features.safetensors")["train_density"].double()
        write_tensors(sparsity, {"sparsity": (rate + LEAST_RATE).log10().clamp(max=0).float()})
        files = {"sparsity.safetensors": sparsity}
        out.append(Artifact(f"{title}_log_feature_sparsity", "log_feature_sparsity", files, name))
    report = {"report.html": run / "report.html"}
    return [*out, Artifact(f"{_allowed(config.run.name)}_report", "report", report)]


def artifact_name(data: dict[str, Any]) -> str:
    """By SAELens' rule, from a published config.json."""
    meta = data["meta"]
    model = meta.get("model") or meta.get("source") or "unknown"
    model = model if hub_id(model) else public_name(model).partition(":")[2]
    site = (meta.get("hooks") or {}).get(meta["hook"]) or {}
    return _allowed(f"sae_{model}_{site.get('transformer_lens') or meta['hook']}_{data['sae']['d_sae']}")


def _allowed(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "_", name.replace("/", "__"))[:MAX_NAME]
