"""The SAEs of finished runs, as they lie in RUN/saes/NAME, and the folder each gets in a repository.

resid_post.12/width_16k/k_32        hook, latents, and what sets the sparsity
resid_post.12/width_16k/k_32__seed_1    where two would have the same name: what they differ in
"""

import hashlib
import json
import logging
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_train.errors import InputError
from sae_train.files import CorruptFile, read_json
from sae_train.hub.public import LocalNames
from sae_train.report.card import describe
from sae_train.sae.io import CONFIG, MAX_CONFIG_BYTES, WEIGHTS, sae_config
from sae_train.train.optim import OptimConfig
from sae_train.train.record import RunRecord
from sae_train.train.resume import classify, flatten

logger = logging.getLogger(__name__)


@dataclass
class TrainedSAE:
    """One SAE of a run, and what is known of it.

    Attributes:
        run: the run folder.
        name: of the member.
        record: run.json.
        data: config.json without names of local files; `meta` is in it.
        numbers: metrics.json; None is one that was not finite.
        id: its folder in the repository.
    """

    run: Path
    name: str
    record: RunRecord
    data: dict[str, Any]
    numbers: dict[str, float | None]
    id: str = ""

    @property
    def folder(self) -> Path:
        return self.run / "saes" / self.name

    @property
    def meta(self) -> dict[str, Any]:
        meta: dict[str, Any] = self.data["meta"]
        return meta

    @property
    def sae(self) -> dict[str, Any]:
        sae: dict[str, Any] = self.data["sae"]
        return sae

    @property
    def description(self) -> str:
        widths = self.data["widths"]
        return describe(self.sae, self.meta, self.data["d_in"], sum(widths["targets"] or widths["inputs"]))

    @property
    def member(self) -> dict[str, Any]:
        """What the run's configuration says of it."""
        member: dict[str, Any] = (self.record.config.get("members") or {}).get(self.name) or {}
        return member

    @property
    def lr(self) -> float | None:
        """Peak learning rate."""
        optim = self.member.get("optim")
        keys = ("lr", "lr_base", "budget_power")
        known = {key: optim[key] for key in keys if key in optim} if isinstance(optim, dict) else {}
        return OptimConfig(**known).peak_lr(self.sae["d_sae"], self.record.steps) if known else None

    @property
    def config_hash(self) -> str:
        """sha256 of the keys that decide the result; its first 8 digits end the name of a run folder."""
        tree = {key: value for key, value in self.record.config.items() if key != "members"}
        decisive = {key: value for key, value in flatten(tree).items() if classify(key) == "refused"}
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()

    @property
    def data_fingerprint(self) -> str:
        """sha256 of everything that the rows are a function of."""
        return hashlib.sha256(json.dumps(self.record.fingerprint, sort_keys=True).encode()).hexdigest()


def trained_saes(runs: list[str], name: str | None, base_model: str | None) -> list[TrainedSAE]:
    """What runs have published into their folders, with the folder of each in a repository.

    Args:
        runs: run folders.
        name: the one member to take, or all.
        base_model: Hub id to write in the place of a model that lay in a folder.

    Raises:
        InputError: no finished run, no such member, damaged files, or two that cannot be told apart.
    """
    found: list[TrainedSAE] = []
    for run in dict.fromkeys(Path(text).expanduser().resolve() for text in runs):
        record = RunRecord.read(run)
        folders = sorted(path.parent for path in run.glob(f"saes/*/{WEIGHTS}"))
        if record is None:
            raise InputError("run", str(run), "a run folder (it holds run.json)")
        if record.status != "done" or not folders:
            wanted = f"a finished run; this one is {record.status}, and its train command goes on with it"
            raise InputError("run", str(run), wanted)
        mine = {folder.name: record.trained(folder.name) for folder in folders}
        members = [member for member in mine if mine[member]]
        if name is not None and name not in members:
            told = f": {name} is there, but was not trained in it" if name in mine else ""
            raise InputError("sae", name, f"one of {', '.join(members)}, which {run.name} has{told}")
        others = [member for member in mine if not mine[member]]
        if others and name is None:
            logger.warning("%s of %s was not trained there and is left out", ", ".join(others), run.name)
        found += [_read(run, member, record, base_model) for member in members if name in (None, member)]
    _name(found)
    return found


def _read(run: Path, name: str, record: RunRecord, base_model: str | None) -> TrainedSAE:
    folder = run / "saes" / name
    try:
        data = read_json(folder / CONFIG, MAX_CONFIG_BYTES)
        numbers = read_json(folder / "metrics.json", MAX_CONFIG_BYTES)
        sae_config(data["sae"])
        meta, members = data["meta"], record.config.get("members") or {}
        known = isinstance(meta["hook"], str) and type(meta["tokens"]) is int and type(meta["seed"]) is int
        known = known and all(value is None or isinstance(value, int | float) for value in numbers.values())
        known = known and all(isinstance(site, dict) for site in (meta.get("hooks") or {}).values())
        known = known and all(isinstance(member, dict) for member in members.values())
        if not (known and data["widths"]["inputs"]):
            raise InputError("run", str(folder), "an SAE as training writes it")
        names = LocalNames(record.config, _models(record, meta, base_model))
        return TrainedSAE(run, name, record, data | {"meta": names.replaced(meta)}, numbers)
    except (CorruptFile, OSError, LookupError, TypeError, AttributeError) as error:
        raise InputError("run", str(folder), f"an SAE as training writes it ({error!r})") from error


def _models(record: RunRecord, meta: dict[str, Any], base_model: str | None) -> dict[str, str]:
    """What to write in the place of models that lay in folders."""
    model, more = record.config.get("model") or {}, dict[str, str]()
    for key, asked in (("model", "name"), ("other_model", "other")):
        known, lay = model.get(asked), meta.get(key)
        if (record.config.get("source") or {}).get("name") == "shards":
            known = lay  # as the harvest was told; the run's own key has no effect
        if isinstance(known, str) and isinstance(lay, str):
            # The folder that a name such as demo:smollm2 stands for says less than the name.
            named = LocalNames({"model": {"name": known}}).replaced(known)
            if key == "model" and base_model is not None:
                named = base_model
            more |= {lay: named, known: named}
    return more


def _name(saes: list[TrainedSAE]) -> None:
    """Give each its folder."""
    groups: dict[str, list[TrainedSAE]] = defaultdict(list)
    for sae in saes:
        groups[_base_id(sae)].append(sae)
    for base, same in groups.items():
        facts = [_facts(sae) for sae in same]
        told: list[str] = []
        for key in facts[0]:
            shown = {tuple(fact[k] for k in told) for fact in facts}
            if len(shown) < len(same) and len({fact[key] for fact in facts}) > 1:
                told.append(key)
        for sae, fact in zip(same, facts, strict=True):
            sae.id = "__".join([base, *(_plain(f"{key}_{fact[key]}") for key in told)])
    seen: dict[str, TrainedSAE] = {}
    for sae in saes:
        if (other := seen.setdefault(sae.id, sae)) is not sae:
            both = f"{sae.run.name}/{sae.name} and {other.run.name}/{other.name}"
            raise InputError("run", both, "SAEs of different places, sizes, recipes or names")


def _base_id(sae: TrainedSAE) -> str:
    hook = _plain(sae.meta["hook"])
    if sae.meta.get("target"):
        hook += f"_to_{_plain(sae.meta['target'])}"
    width = sae.sae["d_sae"]
    size = f"width_{width // 1024}k" if width % 1024 == 0 else f"width_{width}"
    activation = sae.sae["activation"]
    if isinstance(activation.get("k"), int):
        sparsity = f"k_{activation['k']}"
    elif activation.get("target_l0") is not None:
        sparsity = f"l0_{activation['target_l0']:g}"
    else:
        sparsity = f"l0_{sae.numbers.get('l0') or 0:.0f}"
    return f"{hook}/{size}/{sparsity}"


def _facts(sae: TrainedSAE) -> dict[str, str]:
    """What two SAEs of one place and size may differ in, the most telling first."""
    return {
        "activation": sae.sae["activation"]["name"],
        "architecture": sae.sae["name"],
        "seed": str(sae.meta["seed"]),
        "lr": f"{sae.lr:.3g}" if sae.lr is not None else "unknown",
        "tokens": str(sae.meta["tokens"]),
        "name": sae.name,
        "run": sae.run.name,
    }


def _plain(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "_", text)
