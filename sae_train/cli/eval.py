"""sae-train eval: held-out metrics of a run, or of one published SAE, as a table and JSON.

The run's own configuration says where held-out rows come from; nothing is trained or changed.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sae_train.cli.compose import compose, run_composed
from sae_train.cli.finish import finite, print_results
from sae_train.cli.wire import Wired, wire
from sae_train.config import Config, to_config
from sae_train.devices import pick_device
from sae_train.errors import InputError
from sae_train.evaluate import evaluate
from sae_train.files import read_json, write_json
from sae_train.places import Places
from sae_train.sae.io import CONFIG, MAX_CONFIG_BYTES, load_sae, sae_config
from sae_train.train.record import RunRecord
from sae_train.train.resume import check_judged, flatten

COMMIT = re.compile("[0-9a-f]{40}")


def run(args: list[str]) -> int:
    return run_composed("eval", args, judge)


def judge(composed: DictConfig) -> int:
    """Evaluate; prints a table and writes eval.json beside each SAE. Returns 0."""
    request = to_config(composed)
    folder = Path(request.run).expanduser().resolve()
    run_dir = folder.parent.parent if (folder / "sae.safetensors").is_file() else folder
    record = RunRecord.read(run_dir)
    if record is None:
        raise InputError("run", request.run, "a run folder, or RUN/saes/NAME inside one")
    folders = (
        [folder] if run_dir != folder else sorted(p.parent for p in folder.glob("saes/*/sae.safetensors"))
    )
    if not folders:
        raise InputError("run", request.run, "a finished run: it has published no SAE yet")
    config = saved_config(run_dir, record.config)
    if config.model.trust_remote_code and not request.trust_remote_code:
        names = " and ".join(filter(None, (config.model.name, config.model.other)))
        asked = f"true, to run the Python code of {names} as the run says it did"
        raise InputError("trust_remote_code", False, asked)
    config.eval = replace(
        config.eval,
        tokens=request.tokens if request.tokens is not None else config.eval.tokens,
        ce_tokens=request.ce_tokens if request.ce_tokens is not None else config.eval.ce_tokens,
    )
    places = {path: places_of(path) for path in folders}
    wired = wire_again(config, record, places.values())
    device = pick_device(config.model.device)
    try:
        heldout = wired.heldout()
        results: dict[str, dict[str, float]] = {}
        for path, spelt in places.items():
            sae = load_sae(path, device)
            read = Places(tuple(map(wired.key, spelt.inputs)), tuple(map(wired.key, spelt.targets)))
            widths = read.widths(wired.source.dims)
            if sae.widths != widths:
                raise InputError("run", str(path), f"an SAE of {widths}, not {sae.widths}")
            [(numbers, _)] = evaluate(
                [(sae, read)], heldout, config.eval, wired.splice, config.eval.ce_tokens
            )
            results[path.name] = numbers
            write_json(path / "eval.json", finite(numbers))
    finally:
        wired.source.close()
    print_results(results)
    print(json.dumps({name: finite(numbers) for name, numbers in results.items()}))
    return 0


def wire_again(config: Config, record: RunRecord, places: Iterable[Places]) -> Wired:
    """What a finished run was wired to, with as many threads: of its hooks those that are in use.

    Raises:
        InputError: the run's model or data cannot be had, or changed since it was trained.
    """
    torch.set_num_threads(min(record.chosen["threads"], 4 * (os.cpu_count() or 1)))
    hooks = list(dict.fromkeys(hook for read in places for hook in read.hooks))
    config = at_commits(config, record.fingerprint)
    wired = wire(config, hooks, pick_device(config.model.device), dict(record.chosen), lambda dims: None)
    try:
        check_judged(record.fingerprint, wired.source.fingerprint, config.source.name == "stream")
    except InputError:
        wired.source.close()
        raise
    return wired


def at_commits(config: Config, trained_on: Mapping[str, str]) -> Config:
    """The configuration with what it reads from the hub as it was when the run was trained."""
    model, corpus = (trained_on.get(key, "") for key in ("model_revision", "corpus.0.revision"))
    if COMMIT.fullmatch(model):
        config = replace(config, model=replace(config.model, revision=model))
    if COMMIT.fullmatch(corpus) and not config.corpus.sources:
        config = replace(config, corpus=replace(config.corpus, revision=corpus))
    return config


def saved_config(run_dir: Path, tree: dict[str, Any]) -> Config:
    """The typed configuration that a run was started with.

    Raises:
        InputError: it is none, or refers to something: a value such as ${oc.env:NAME} was replaced by what
            it stood for when the run began, so one in the record can only have been put there.
    """
    keep = {key: value for key, value in tree.items() if key != "members"}
    expected = "the configuration of a run, as `sae-train train` writes it"
    if any("${" in str(part) for item in flatten(keep).items() for part in item):
        raise InputError(str(run_dir / "run.json"), "${...}", f"{expected}, without references")
    sae = sae_config(keep.get("sae"))
    schema = compose("train", [f"sae={sae.name}", f"sae/activation={sae.activation.name}"])
    try:
        merged = OmegaConf.merge(schema, OmegaConf.create(keep))
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise InputError(str(run_dir / "run.json"), "config", f"{expected} ({reason})") from None
    assert isinstance(merged, DictConfig)
    config: Config = to_config(merged)
    return config


def places_of(folder: Path) -> Places:
    """Which hooks a published SAE reads and reconstructs, from its config.json."""
    data = read_json(folder / CONFIG, MAX_CONFIG_BYTES)
    meta = data.get("meta") if isinstance(data, dict) else None
    hook = meta.get("hook") if isinstance(meta, dict) else None
    if not isinstance(hook, str):
        raise InputError("run", str(folder), "a published SAE whose config.json names its hook")
    target = meta.get("target") if isinstance(meta, dict) else None
    if not (target is None or isinstance(target, str)):
        raise InputError("run", str(folder), "a published SAE whose config.json names its target")
    return Places.parse(hook, target)
