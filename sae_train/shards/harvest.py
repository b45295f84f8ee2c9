"""harvest.json: what the shards of a folder have in common, and what they were harvested from."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sae_train.errors import InputError
from sae_train.files import CorruptFile, read_json

MAX_HARVEST_BYTES = 2 << 20
"""Of harvest.json; ours has kilobytes."""
MAX_WIDTH = 1 << 24


@dataclass(frozen=True)
class Harvest:
    """harvest.json: what the shards of a folder have in common."""

    dims: dict[str, int]
    """hook -> D"""
    lanes: int
    fingerprint: dict[str, str]
    """Everything rows and their order are a function of."""
    format: int = 1
    complete: bool = False
    """Whether the data was harvested to its end or to the asked number of tokens."""
    shards: int = 0
    rows: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    """`description`: facts about model and hooks; `config`: the keys of model, corpus and filter. Harvests of
    older releases have none."""

    @staticmethod
    def read(folder: Path) -> "Harvest | None":
        """The folder's harvest.json, or None if there is none. Raises InputError if it is not one."""
        path = folder / "harvest.json"
        if not path.exists():
            return None
        try:
            data = read_json(path, MAX_HARVEST_BYTES)
            if isinstance(data, dict) and type(data.get("format")) is int and data["format"] > 1:
                raise InputError(
                    "source.path", str(folder), f"harvest format 1 or older, it has format {data['format']}"
                )
            found = Harvest(**data)
        except (CorruptFile, TypeError) as error:
            raise InputError(
                "source.path", str(path), f"a harvest.json of sae-train harvest ({error})"
            ) from error
        if wrong := found.misfits():
            raise InputError(
                "source.path", str(path), f"a harvest.json of sae-train harvest, with its {wrong}"
            )
        return found

    def misfits(self) -> str | None:
        """What in it is not as this package writes it, or None. A harvest may come from anyone."""
        whole = (self.format, self.lanes, self.shards, self.rows)
        sound: dict[str, Any] = {
            "dims": is_table(self.dims, int)
            and self.dims
            and all(0 < d <= MAX_WIDTH for d in self.dims.values()),
            "fingerprint": is_table(self.fingerprint, str),
            "counts": is_table(self.counts, int),
            "numbers": all(type(n) is int and n >= 0 for n in whole) and self.lanes > 0,
            "complete": type(self.complete) is bool,
            "about": is_table(self.about, dict),
        }
        return next((name for name, good in sound.items() if not good), None)

    def describe(self, hooks: Iterable[str]) -> dict[str, Any]:
        """Facts about the model behind these hooks, as a live run says them; empty where there was none."""
        told = self.fingerprint
        keys = ("model", "model_revision", "dtype", "other_model", "other_model_revision")
        out: dict[str, Any] = {key: told[key] for key in keys if key in told}
        if (length := told.get("corpus.context_length", "")).isdecimal():
            out["context_length"] = int(length)
        sites = self.about.get("description", {}).get("hooks")
        sites = sites if is_table(sites, dict) else {}
        known = {hook: sites[hook] for hook in hooks if hook in sites}
        return out | ({"hooks": known} if known else {})


def is_table(value: Any, kind: type) -> bool:
    return isinstance(value, dict) and all(type(item) is kind for item in value.values())
