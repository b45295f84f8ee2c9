"""SAEs of every architecture, kind and activation, and what each format makes of them.

For tests, and for the table in docs/publishing.md: `python tests/format_cases.py` prints it.
"""

import re
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from sae_train.activations.base import ACTIVATIONS
from sae_train.errors import InputError
from sae_train.formats.base import FORMATS, About, FormatConfig, Place, check
from sae_train.formats.plain import Plain, as_thresholds, of_sae, to_sae
from sae_train.formats.proof import Proof, compare
from sae_train.formats.reference import calibrated
from sae_train.formats.saelens import SAELens
from sae_train.places import Widths
from sae_train.registry import discover
from sae_train.sae.base import SAE, SAES

discover("sae_train.activations")
discover("sae_train.sae")
discover("sae_train.formats")

F, K, N, D = 40, 4, 64, 12
ARCHITECTURES = ("linear", "gated", "matryoshka")
KINDS = {
    "autoencoder": Widths((D,)),
    "transcoder": Widths((D,), (D,)),
    "skip transcoder": Widths((D,), (D,)),
    "crosscoder": Widths((D, D)),
}
RULES = ("topk", "batch_topk", "group_max", "jumprelu", "relu")
CASES = list(product(ARCHITECTURES, KINDS, RULES))
OPTIONS = {"k": K, "target_l0": float(K)}


def rows(widths: Widths, n: int = N, seed: int = 0) -> torch.Tensor:
    """[n, d_in] rows of a few shared features, with an offset of their own."""
    g, fixed = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(99)
    strengths = torch.rand(n, 24, generator=g) * (torch.rand(n, 24, generator=g) < 0.15)
    directions = functional.normalize(torch.randn(24, sum(widths.inputs), generator=fixed), dim=-1)
    return 7 * (strengths @ directions) + 3 + 0.05 * torch.randn(n, sum(widths.inputs), generator=g)


@cache
def built(architecture: str, kind: str, rule: str) -> SAE:
    """A published SAE with weights that differ in every respect, so that no term can be left out."""
    widths = KINDS[kind]
    activation = ACTIVATIONS.config(rule)
    told = {key: value for key, value in OPTIONS.items() if hasattr(activation(), key)}
    options = {"skip": True} if kind.startswith("skip") else {}
    config = SAES.config(architecture)(
        kind=kind.removeprefix("skip "), d_sae=F, activation=activation(**told), **options
    )
    sae = SAES.build(config, widths)
    x = rows(widths, 256)
    g = torch.Generator().manual_seed(3)
    targets = x.roll(1, dims=-1) * 2 + 1
    sae.initialise(x, g, targets if widths.targets else None)
    with torch.no_grad():
        for name in ("b_enc", "b_mag", "r_mag", "w_skip"):
            if hasattr(sae, name):
                getattr(sae, name).add_(0.2 * torch.randn(getattr(sae, name).shape, generator=g))
        if rule == "jumprelu":
            sae.activation.threshold.mul_(0.5 + torch.rand(F, generator=g))
        if rule == "batch_topk":
            sae.activation.encode_training(*encoder(sae, x))
    published = sae.folded().eval().requires_grad_(False)
    assert 1 < float(published.encode(x).l0().double().mean()) < F / 2
    return published


def encoder(sae: SAE, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return sae._read(x), sae.w_enc, sae.b_enc  # what an activation sees


def about(kind: str, layer: int = 0) -> About:
    """Of SAEs on GPT-2, as a run would say it."""
    one = Place(f"mlp_in.{layer}", f"blocks.{layer}.mlp.hook_in", f"transformer.h.{layer}.mlp", "in")
    two = Place(f"mlp_out.{layer}", f"blocks.{layer}.hook_mlp_out", f"transformer.h.{layer}.mlp")
    inputs = (one, two) if kind == "crosscoder" else (one,)
    return About(
        "openai-community/gpt2",
        inputs,
        (two,) if "transcoder" in kind else inputs,
        128,
        "monology/pile-uncopyrighted",
        4.0,
        torch.linspace(0, 1, F),
        {"tokens": 1000, "seed": 0},
    )


@dataclass(frozen=True)
class Verdict:
    """What a format makes of an SAE: a refusal, or the largest relative difference of what it gives back."""

    refused: str | None
    apart: float = 0.0
    thresholds: bool = False
    proofs: tuple[Proof, ...] = ()


def verdict(case: tuple[str, str, str], format_name: str, folder: Path) -> Verdict:
    """Write an SAE, read it back, and compare it twice: as it is read from disk block by block, and as an SAE
    of ours with its own encoders."""
    sae = built(*case)
    plain, x = of_sae(sae), rows(KINDS[case[1]], seed=5)
    format_ = FORMATS.build(FormatConfig(format_name))
    try:
        check(format_, plain)
    except InputError as error:
        return Verdict(str(error))
    original: SAE | Plain = sae
    changes = format_.thresholds_only and plain.rule.name in ("topk", "group_max")
    if changes:
        plain = as_thresholds(calibrated(plain, x))
        original = plain
    format_.write([(plain, about(case[1]))], folder, torch.float32)
    found = format_.read(folder)
    assert found
    proofs = []
    for one in found:
        proofs.append(compare(original, one.plain, x, torch.float32))
        loaded = to_sae(one.plain)
        proofs.append(compare(loaded, plain, x, torch.float32))
        assert loaded.widths == sae.widths and not any(p.requires_grad for p in loaded.parameters())
    apart = max(max(proof.codes, proof.reconstruction) for proof in proofs)
    return Verdict(None, apart, changes, tuple(proofs))


def table() -> str:
    """The table of architectures and formats, in Markdown."""
    reasons: list[str] = []
    lines = [
        "| SAE | rule | " + " | ".join(sorted(FORMATS)) + " |",
        "|---|---|" + "---|" * len(list(FORMATS)),
    ]
    for kind, names in product(KINDS, (("linear", "matryoshka"), ("gated",))):
        for rule in RULES:
            cells = []
            for format_name in sorted(FORMATS):
                said = {cell((name, kind, rule), format_name, reasons) for name in names}
                worst = max(said, key=apart)
                assert len({re.sub(r"\(.*?\)", "", text) for text in said}) == 1, "prefixes change nothing"
                cells.append(worst)
            label = kind if names[0] == "linear" else f"gated {kind}"
            lines.append(f"| {label} | {rule} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n\n" + "\n".join(f"{i}. {text}" for i, text in enumerate(reasons, 1)) + "\n"


def apart(text: str) -> float:
    """The number in a cell."""
    found = re.search(r"\((.*?)\)", text)
    return float(found[1]) if found else 0.0


def cell(case: tuple[str, str, str], format_name: str, reasons: list[str]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        found = verdict(case, format_name, Path(folder))
    if found.refused is not None:
        reason = found.refused.rpartition("): ")[2]
        if reason not in reasons:
            reasons.append(reason)
        return f"refused: {reasons.index(reason) + 1}"
    assert all(proof.holds for proof in found.proofs), (case, format_name, found)
    return f"same ({found.apart:.0e})" + (" with thresholds" if found.thresholds else "")


if __name__ == "__main__":
    sys.stdout.write(table())


def write_slightly_wrong(monkeypatch: Any) -> None:
    """From now on what is written for SAELens is not the SAE: its bias is moved."""
    write = SAELens.write

    def moved(self: SAELens, saes: Any, folder: Path, dtype: torch.dtype) -> None:
        write(self, saes, folder, dtype)
        tensors = load_file(folder / "sae_weights.safetensors")
        tensors["b_dec"] += 0.01
        save_file(tensors, folder / "sae_weights.safetensors")

    monkeypatch.setattr(SAELens, "write", moved)
