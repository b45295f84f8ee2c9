"""One folder that SAELens, sparsify and delphi read alike, at twice the disk.

Their configurations share a name, `cfg.json`, and no key that means two things; their weights lie side by
side as `sae_weights.safetensors` and `sae.safetensors`. It holds what both hold: autoencoders with top-k.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from sae_train.errors import InputError
from sae_train.files import write_json
from sae_train.formats import saelens, sparsify
from sae_train.formats.base import FORMATS, About, Format, FormatConfig, Found
from sae_train.formats.plain import Plain


@FORMATS.register("merged", FormatConfig)
class Merged(Format):
    files = (saelens.CFG, saelens.WEIGHTS, sparsify.WEIGHTS)

    def refusal(self, plain: Plain) -> str | None:
        reasons = [saelens.refusal(plain), sparsify.refusal(plain)]
        found = [reason for reason in reasons if reason]
        return found[0] if found else None

    def write(self, saes: Sequence[tuple[Plain, About]], folder: Path, dtype: torch.dtype) -> None:
        ((plain, about),) = saes
        one = saelens.write_weights(plain, about, folder, dtype)
        two = sparsify.write_weights(plain, about, folder, dtype)
        assert all(one[key] == two[key] for key in one.keys() & two.keys())
        write_json(folder / saelens.CFG, two | one)

    def read(self, folder: Path) -> list[Found]:
        """Both halves, which have to agree in size and rule; the export compares each with the original."""
        one, two = saelens.read(folder), sparsify.read(folder)
        same = [(p.kind, p.widths, p.d_sae, p.rule) for p in (one.plain, two.plain)]
        if same[0] != same[1]:
            raise InputError("path", str(folder), "two SAEs that are the same, one for each library")
        return [one, Found("sparsify", two.plain, one.hook, one.target, one.model)]
