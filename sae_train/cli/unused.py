"""Keys that say how rows are made, in a command whose rows were made before: they are named, once."""

import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sae_train.config import Config
from sae_train.harvest.corpus import CorpusConfig
from sae_train.harvest.filters import FilterConfig
from sae_train.harvest.model import ModelConfig
from sae_train.shards.harvest import Harvest
from sae_train.train.resume import flatten

logger = logging.getLogger("sae_train.harvest")

USED = ("model.device", "model.trust_remote_code", "corpus.allow_short")
"""Read wherever the rows come from."""
GROUPS = ("model", "corpus", "filter")


def row_keys(config: Config) -> dict[str, Any]:
    """The groups of keys that rows of a model are made with."""
    return {group: asdict(getattr(config, group)) for group in GROUPS}


def warn_of_unused(config: Config, rows: str, harvest: Harvest | None = None) -> None:
    """Warn of keys that were set and have no effect.

    Args:
        rows: what they are, as the end of a sentence.
        harvest: what they were harvested with, if they were: keys that say the same are not named.
    """
    defaults = flatten({"model": asdict(ModelConfig()), "corpus": asdict(CorpusConfig())})
    defaults |= flatten({"filter": asdict(FilterConfig())}) | {"model.name": "none"}
    told = None if harvest is None else _told(harvest, defaults)
    unused: dict[str, Any] = {}
    for key, value in flatten(row_keys(config)).items():
        default = value == defaults[key] or (key == "model.name" and value == "???")
        same = told is not None and (key not in told or value == told[key] or str(value) == told[key])
        if not (default or same or key in USED):
            unused[key] = value
    if not unused:
        return
    verb = "has" if len(unused) == 1 else "have"
    if told is not None:
        rows += f" {', '.join(f'{key}={told[key]}' for key in unused)}"
    logger.warning("%s %s no effect: %s", ", ".join(f"{k}={v}" for k, v in unused.items()), verb, rows)


def shards_in(folder: Path) -> str:
    return f"the rows in {folder} were harvested with"


def _told(harvest: Harvest, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """key -> what the harvest says of it: as configured, or as text where an older release wrote it."""
    if "config" in harvest.about:
        told = flatten(harvest.about["config"])
        return {key: value for key, value in told.items() if key in defaults}
    facts = harvest.fingerprint
    found = {key: facts[key] for key in defaults if key in facts and key != "corpus.bos"}
    found |= {f"filter.{key}": value for key, _, value in _pairs(facts.get("filter", ""))}
    return found | {"model.name": facts.get("model", "none")} | _dtype(facts)


def _pairs(text: str) -> list[tuple[str, str, str]]:
    return [part.partition("=") for part in text.split()]


def _dtype(facts: Mapping[str, str]) -> dict[str, str]:
    return {"model.dtype": facts["dtype"]} if "dtype" in facts else {}
