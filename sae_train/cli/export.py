"""sae-train export: an SAE in another library's format, with proof that what was written does the same.

Everything is written into a hidden folder, read back by that format's own reader and compared with the
original on rows; only then it gets its name. Where anything differs there is an error and no folder.
"""

import json
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from sae_train.cli.compose import run_composed
from sae_train.cli.held_out import config_of, held_out, num_layers, run_of
from sae_train.config import ExportConfig, to_config
from sae_train.errors import InputError
from sae_train.files import committed_folder, is_name, write_json
from sae_train.formats.about import about_of
from sae_train.formats.base import FORMATS, About, Format, FormatConfig, check
from sae_train.formats.circuit_tracer import in_layers
from sae_train.formats.plain import IN_WORDS, Plain, as_thresholds, open_sae
from sae_train.formats.proof import PROOF, Proof, as_record, compare, require
from sae_train.formats.reference import calibrated, encode, rows_for
from sae_train.registry import discover
from sae_train.sae.base import SAE
from sae_train.sae.io import WEIGHTS, load_sae
from sae_train.train.record import RunRecord

IN_MEMORY = 1 << 28
"""Weights up to which an SAE encodes with its own code in the proof: 1 GiB. Larger ones do in blocks."""
FEWER_ROWS = 256
"""For the proof of what is larger."""


def run(args: list[str]) -> int:
    return run_composed("export", args, export)


def export(composed: DictConfig) -> int:
    """Export, prove, and print one line for each SAE. Returns 0."""
    discover("sae_train.formats")
    request: ExportConfig = to_config(composed)
    format_ = FORMATS.build(FormatConfig(request.format))
    dtype = getattr(torch, request.dtype)
    out = free_folder(request.out)
    folders = published(request, format_)
    saes = {folder: open_sae(folder) for folder in folders}
    for plain in saes.values():
        check(format_, plain)
    abouts = {folder: about_of(folder, request.model) for folder in folders}
    rows, source = rows_of(request, format_, saes, abouts)
    written: dict[Path, Plain] = {}
    changed: dict[Path, dict[str, Any]] = {}
    for folder, plain in saes.items():
        written[folder], changed[folder] = plain, learned_for(plain)
        learned = plain.rule.name == "threshold" and plain.rule.k is not None
        replaced = format_.thresholds_only and plain.rule.name in ("topk", "group_max")
        if request.calibrate and not (learned or replaced):
            wanted = f"false: only a threshold is found on rows, and this is {plain.describe()}"
            raise InputError("calibrate", request.calibrate, wanted)
        if replaced or request.calibrate:
            if source != "held-out":
                raise without_held_out(request, plain)
            written[folder], changed[folder] = with_thresholds(plain, rows[folder])
            abouts[folder] = replace(abouts[folder], l0=changed[folder]["l0_with_thresholds"])
    started = time.perf_counter()
    out.parent.mkdir(parents=True, exist_ok=True)
    with committed_folder(out, "export", {"format": request.format}) as temp:
        format_.write([(written[folder], abouts[folder]) for folder in folders], temp, dtype)
        wrote_s = time.perf_counter() - started
        proofs = prove(request, format_, written, rows, temp, dtype)
        found = {name: proof.as_json() | changed[folder] for name, (folder, proof) in proofs.items()}
        told = as_record(request.format, dtype, source, found)
        write_json(temp / PROOF, told)
    size_bytes = sum(path.stat().st_size for path in out.iterdir())
    for name, (folder, proof) in proofs.items():
        print(line(name, proof, changed[folder], source))
    print(f"{request.format}: {out} ({size_bytes / 1e6:,.1f} MB, written in {wrote_s:.1f} s)")
    print(json.dumps(told))
    return 0


def learned_for(plain: Plain) -> dict[str, Any]:
    """The L0 that BatchTopK learned its threshold for; the proof has the one that it has on the rows."""
    return {"l0_in_training": plain.rule.k} if plain.rule.name == "threshold" and plain.rule.k else {}


def line(name: str, proof: Proof, more: dict[str, Any], source: str) -> str:
    text = (
        f"{name}: same on {proof.rows} {source} rows (codes {proof.codes:.1e}, reconstruction "
        f"{proof.reconstruction:.1e}, {proof.ties} of {proof.active} active latents on their edge)"
    )
    if "l0_with_thresholds" in more:
        told = (
            "learned threshold was found anew"
            if more["rule"] == "thresholds"
            else f"{more['rule']} became thresholds"
        )
        text += (
            f"; its {told}: L0 {more['l0_in_training']:.1f} in training, "
            f"{more['l0_with_thresholds']:.1f} with them, {more['shared']:.0%} of active latents shared"
        )
    elif "l0_in_training" in more and source == "held-out":
        text += f"; its threshold was learned for L0 {more['l0_in_training']}, here it is {proof.l0:.1f}"
    return text


def free_folder(name: str) -> Path:
    """Where the export goes: nothing may be there.

    Raises:
        InputError: something is, or it is no name for a folder.
    """
    out = Path(name).expanduser().absolute()
    if not is_name(out.name) or out.name.startswith("."):
        raise InputError("out", name, "a folder's name of letters, digits, dots, dashes and underscores")
    if out.exists() or out.is_symlink():
        raise InputError("out", name, "a folder that is not there yet")
    return out


def published(request: ExportConfig, format_: Format) -> list[Path]:
    """Folders of the published SAEs that go into one export.

    Raises:
        InputError: there is none, none of that name, or several where the format holds one.
    """
    folder = Path(request.run).expanduser().resolve()
    if (folder / WEIGHTS).is_file():
        return [folder]
    found = sorted(path.parent for path in folder.glob(f"saes/*/{WEIGHTS}"))
    if not found:
        wanted = "a run that has published an SAE, or a published SAE's folder (RUN/saes/NAME)"
        raise InputError("run", request.run, wanted)
    names = ", ".join(path.name for path in found)
    if request.sae is not None:
        found = [path for path in found if path.name == request.sae]
        if not found:
            raise InputError("sae", request.sae, f"one of {names}")
    elif (record := RunRecord.read(folder)) is not None:
        found = [path for path in found if record.trained(path.name)] or found
    if len(found) > 1 and not format_.whole_set:
        raise InputError("sae", None, f"one of {names}: {format_.name} holds one in a folder")
    return found


def rows_of(
    request: ExportConfig, format_: Format, saes: dict[Path, Plain], abouts: dict[Path, About]
) -> tuple[dict[Path, Tensor], str]:
    """Rows of each SAE to compare on, and whether they are "held-out" or "random".

    A set is checked for completeness here, where the model's number of layers is known.

    Raises:
        InputError: the run's model or data cannot be had, or a set is not complete.
    """
    folders = list(saes)
    record = run_of(Path(request.run).expanduser().resolve()) if request.tokens > 0 else None
    layers = None
    if record is not None:
        config = config_of(folders[0], record, request.trust_remote_code)
        layers = num_layers(config) if format_.whole_set else None
    if format_.whole_set:
        in_layers([(saes[folder], abouts[folder]) for folder in folders], layers)
    if record is None:
        return {folder: rows_for(plain, FEWER_ROWS) for folder, plain in saes.items()}, "random"
    return held_out(config, record, folders, request.tokens), "held-out"


def without_held_out(request: ExportConfig, plain: Plain) -> InputError:
    """What to say where thresholds are to be found and there are no rows to find them on."""
    why = f"the format has no {IN_WORDS[plain.rule.name]}, and thresholds in its place are found on such rows"
    if request.calibrate:
        why = "thresholds are found on such rows"
    if request.tokens == 0:
        return InputError("tokens", 0, f"above 0, and a run with held-out rows: {why}")
    return InputError("run", request.run, f"a run folder, or RUN/saes/NAME in one, with held-out rows: {why}")


def with_thresholds(plain: Plain, x: Tensor) -> tuple[Plain, dict[str, Any]]:
    """An SAE with thresholds found on held-out rows x, and what that changes on them."""
    found = calibrated(plain, x)
    before, after = encode(plain, x).keys, encode(found, x).keys
    shared = torch.isin(before, after).double().mean()
    facts = {
        "rule": IN_WORDS[plain.rule.name],
        "l0_in_training": plain.rule.k if plain.rule.name == "threshold" else len(before) / len(x),
        "l0_with_thresholds": len(after) / len(x),
        "shared": float(shared),
    }
    return as_thresholds(found), facts


def prove(
    request: ExportConfig,
    format_: Format,
    written: dict[Path, Plain],
    rows: dict[Path, Tensor],
    temp: Path,
    dtype: torch.dtype,
) -> dict[str, tuple[Path, Proof]]:
    """Read everything back and compare; name -> the SAE it is of and the proof.

    Raises:
        InputError: it does not do the same.
    """
    back = format_.read(temp)
    folders = list(written)
    if format_.whole_set:
        layers = {one.name: re.sub(r"\D", "", one.name) for one in back}
        by_layer = {str(about_of(folder).place.layer): folder for folder in folders}
        pairs = [(by_layer[layers[one.name]], one) for one in back]
        assert len(pairs) == len(folders), "a set is read back whole"
    else:
        pairs = [(folders[0], one) for one in back]
    proofs = {}
    for folder, found in pairs:
        plain, x = written[folder], rows[folder]
        original: SAE | Plain = plain
        if plain.d_sae * (plain.d_in + plain.d_out) > IN_MEMORY:
            x = x[:FEWER_ROWS]
        elif plain.rule.name == open_sae(folder).rule.name and not request.calibrate:
            original = load_sae(folder)
        proof = compare(original, found.plain, x, dtype)
        require(proof, str(folder), request.format)
        proofs[folder.name if len(back) == len(folders) else f"{folder.name}/{found.name}"] = (folder, proof)
    return proofs
