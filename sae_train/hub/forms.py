"""Other libraries' forms of an SAE, for a publication: written, read back and compared before they go."""

from pathlib import Path
from typing import Any

import torch

from sae_train.errors import InputError
from sae_train.files import write_json
from sae_train.formats.about import about_of
from sae_train.formats.base import FORMATS, FormatConfig
from sae_train.formats.plain import open_sae
from sae_train.formats.proof import PROOF, Proof, as_record, compare, require
from sae_train.formats.reference import rows_for
from sae_train.hub.runs import TrainedSAE
from sae_train.registry import discover, nearest

OWN = "own"
ROWS = 256
"""Made-up rows that an exported SAE is compared on; `sae-train export` uses held-out ones."""


def known_formats() -> list[str]:
    """Every form that a publication can have."""
    discover("sae_train.formats")
    return [OWN, *(name for name in FORMATS if not FORMATS.build(FormatConfig(name)).whole_set)]


def check_formats(names: list[str]) -> None:
    """Raises InputError for a form that is unknown or named twice."""
    known = known_formats()
    for name in names:
        if name not in known:
            raise InputError("formats", name, nearest(name, known))
    if not names or len(set(names)) < len(names):
        raise InputError("formats", names, f"each form once, of {', '.join(known)}")


def write_form(name: str, sae: TrainedSAE, model: str | None, folder: Path) -> str | None:
    """Write one SAE in another library's form into an empty folder, with the proof that it is the same.

    Args:
        name: the form.
        sae: as it lies in its run's folder; weights are read in blocks.
        model: Hub id of its model, where the run used a folder.
        folder: receives the files.

    Returns:
        Why that form cannot hold it, or None if it was written.

    Raises:
        InputError: what was written does not compute what the original does.
    """
    discover("sae_train.formats")
    form = FORMATS.build(FormatConfig(name))
    plain = open_sae(sae.folder)
    reason = form.refusal(plain)
    if reason is None and form.thresholds_only and plain.rule.name in ("topk", "group_max"):
        reason = "thresholds in the place of its top-k are found on rows, which `sae-train export` reads"
    if reason is not None:
        return reason
    form.write([(plain, about_of(sae.folder, model))], folder, torch.float32)
    rows, proofs = rows_for(plain, ROWS), dict[str, dict[str, Any]]()
    for found in form.read(folder):
        proof = compare(plain, found.plain, rows, torch.float32)
        require(proof, str(folder), name)
        proofs[found.name] = _rounded(proof)
    write_json(folder / PROOF, as_record(name, torch.float32, "random", proofs))
    return None


def _rounded(proof: Proof) -> dict[str, Any]:
    """Relative differences to one digit: the others change with the number of threads, and would make every
    publication of the same SAE another one."""
    apart = {key: float(f"{getattr(proof, key):.0e}") for key in ("codes", "reconstruction")}
    return proof.as_json() | apart
