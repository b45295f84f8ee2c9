"""The libraries themselves load what we write, and we load what they write; codes and rows agree to 1e-4.

    make test-interop

Each library runs in an environment of its own, for their requirements conflict; where one is not installed
its tests are skipped and say so.
"""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from format_cases import CASES, KINDS, about, built, rows
from interop.environments import TOLERANCE, agree, do, python_of
from safetensors.torch import load_file, save_file
from torch.nn import functional

from sae_train import load_sae
from sae_train.formats.base import FORMATS, About, FormatConfig, Place
from sae_train.formats.plain import of_sae
from sae_train.sae.base import SAE

pytestmark = [pytest.mark.interop, pytest.mark.timeout(900), pytest.mark.usefixtures("one_thread")]

READS = {
    "saelens": ["saelens", "merged"],
    "sparsify": ["sparsify", "merged"],
    "delphi": ["sparsify", "merged"],
    "dictionary_learning": ["dictionary_learning"],
    "circuit_tracer": ["circuit_tracer", "gemma_scope"],
    "llamascopium": ["openmoss"],
    "sae_dashboard": ["saelens"],
    "sae_bench": ["saelens"],
}
SAVES: dict[str, list[str]] = {
    "llamascopium": [
        *("relu", "topk", "jumprelu", "jumprelu by-norm", "relu by-norm", "jumprelu folded"),
        "relu crosscoder",
    ],
    "saelens": [
        *("standard", "topk", "topk-rescaled", "jumprelu", "gated", "transcoder", "skip_transcoder"),
        *("jumprelu_transcoder", "jumprelu_skip_transcoder"),
        *("standard of before 6", "topk of before 6", "jumprelu of before 6", "gated of before 6"),
    ],
    "sparsify": ["topk", "groupmax", "transcoder", "skip transcoder", "groupmax skip transcoder"],
    "dictionary_learning": [
        *("AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "AutoEncoderTopK", "BatchTopKSAE"),
        *("MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder"),
    ],
}


ON_A_MODEL = ("sae_dashboard", "sae_bench")
"""They read activations off a model's residual stream, and take autoencoders only."""
RESIDUAL = Place("resid_post.0", "blocks.0.hook_resid_post", "transformer.h.0")


def writable(format_name: str, peer: str | None = None) -> list[tuple[str, str, str]]:
    """Cases that a format holds as they are, and a peer takes."""
    format_ = FORMATS.build(FormatConfig(format_name))
    cases = [case for case in CASES if format_.refusal(of_sae(built(*case))) is None]
    if peer in ON_A_MODEL:
        cases = [case for case in cases if case[1] == "autoencoder"]
    return [case for case in cases if not (format_.thresholds_only and case[2] in ("topk", "group_max"))]


def said_of(peer: str, kind: str, layer: int) -> About:
    told = about(kind, layer)
    return replace(told, inputs=(RESIDUAL,), outputs=(RESIDUAL,)) if peer in ON_A_MODEL else told


def asked(peer: str, folder: Path) -> list[dict[str, Any]]:
    """Every job of one peer: what it shall load, and what it shall save for us."""
    save_file({"rows": 0.5 * torch.randn(64, 12)}, folder / "random.safetensors")
    jobs = []
    for format_name in READS[peer]:
        format_ = FORMATS.build(FormatConfig(format_name))
        for case in writable(format_name, peer):
            x = folder / f"{case[1]}.safetensors"
            save_file({"rows": rows(KINDS[case[1]], seed=5)}, x)
            ways = [format_name] + (["dashboard"] if peer == "saelens" and format_name == "saelens" else [])
            for way in ways:
                place = folder / way / "-".join(case)
                place.mkdir(parents=True)
                layers = range(2 if format_.whole_set else 1)
                saes = [(of_sae(built(*case)), said_of(peer, case[1], layer)) for layer in layers]
                format_.write(saes, place, torch.float32)
                jobs.append({"do": "load", "folder": str(place), "rows": str(x), "out": f"{place}.out"})
    for name in SAVES.get(peer, []):
        place = folder / "saved" / name
        jobs.append({"do": "save", "name": name, "folder": str(place), "out": f"{place}.out"})
        jobs[-1]["rows"] = str(folder / "random.safetensors")
    return jobs


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """peer -> the folder in which all its jobs are done; one process each."""

    @cache
    def run(peer: str) -> Path:
        python_of(peer)
        folder = tmp_path_factory.mktemp(peer)
        torch.manual_seed(0)
        do(peer, asked(peer, folder), folder, HF_HUB_OFFLINE="1")
        return folder

    return run


def reports_what_we_measure(sae: SAE, x: torch.Tensor, answer: dict[str, torch.Tensor]) -> None:
    """Its numbers are those of our codes and rows, on a model that predicts by `residual @ x.T`."""
    codes, y = sae.encode(x).dense(), sae(x)

    def surprise(residual: torch.Tensor) -> torch.Tensor:
        """Nats per token; a row is a token, in prompts of 8."""
        logits = (residual @ x.T).view(-1, 8, len(x))
        wanted = torch.arange(len(x)).view(-1, 8)
        return functional.cross_entropy(logits[:, :-1].flatten(0, 1), wanted[:, 1:].flatten())

    ours = {
        "l0": (codes != 0).sum(dim=1).float().mean(),
        "l1": codes.sum(dim=1).mean(),
        "l2_norm_in": x.norm(dim=1).mean(),
        "l2_norm_out": y.norm(dim=1).mean(),
        "l2_ratio": (y.norm(dim=1) / x.norm(dim=1)).mean(),
        "relative_reconstruction_bias": y.square().sum() / (x * y).sum(),
        "cossim": functional.cosine_similarity(x, y).mean(),
        "ce_loss_without_sae": surprise(x),
        "ce_loss_with_sae": surprise(y),
        "ce_loss_with_ablation": surprise(torch.zeros_like(x)),
    }
    for name, value in ours.items():
        torch.testing.assert_close(answer[f"measured.{name}"], value, rtol=TOLERANCE, atol=1e-5, msg=name)


LOADS = [(peer, way) for peer, ways in READS.items() for way in ways] + [("saelens", "dashboard")]


@pytest.mark.parametrize(("peer", "way"), LOADS)
def test_a_library_computes_with_our_export_what_we_do(peer, way, answers, record_property):
    folder, cases, worst = answers(peer), writable("saelens" if way == "dashboard" else way, peer), (0.0, 0.0)
    for case in cases:
        answer = load_file(folder / way / f"{'-'.join(case)}.out")
        x = rows(KINDS[case[1]], seed=5)
        apart = agree(built(*case), x, answer)
        if peer == "sae_bench":
            reports_what_we_measure(built(*case), x, answer)
        worst = max(worst[0], apart[0]), max(worst[1], apart[1])
    record_property("cases", len(cases))
    print(f"{peer} reads {way}: {len(cases)} SAEs, codes {worst[0]:.1e}, reconstruction {worst[1]:.1e}")
    assert len(cases) >= 2


SAVED = [(peer, name) for peer, names in SAVES.items() for name in names]


@pytest.mark.parametrize(("peer", "name"), SAVED)
def test_we_compute_with_a_library_s_own_save_what_it_does(peer, name, answers):
    folder = answers(peer)
    x = load_file(folder / "random.safetensors")["rows"]
    answer = load_file(folder / "saved" / f"{name}.out")
    assert (answer["codes"] != 0).any(dim=0).sum() > 20, "most latents are put to use"
    apart = agree(load_sae(folder / "saved" / name), x, answer)
    print(f"{peer} {name}: codes {apart[0]:.1e}, reconstruction {apart[1]:.1e}")
