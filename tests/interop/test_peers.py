"""The libraries themselves load what we write, and we load what they write; codes and rows agree to 1e-4.

    make test-interop

Each library runs in an environment of its own, for their requirements conflict; where one is not installed
its tests are skipped and say so.
"""

import json
import os
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from format_cases import CASES, KINDS, about, built, rows
from safetensors.torch import load_file, save_file

from sae_train import load_sae
from sae_train.formats.base import FORMATS, FormatConfig
from sae_train.formats.plain import of_sae
from sae_train.sae.base import SAE

pytestmark = [pytest.mark.interop, pytest.mark.timeout(900), pytest.mark.usefixtures("one_thread")]

ROOT = Path(__file__).resolve().parents[2]
PEERS = Path(__file__).resolve().parent / "peers"
TOLERANCE = 1e-4
READS = {
    "saelens": ["saelens", "merged"],
    "sparsify": ["sparsify", "merged"],
    "dictionary_learning": ["dictionary_learning"],
    "circuit_tracer": ["circuit_tracer", "gemma_scope"],
}
SAVES: dict[str, list[str]] = {
    "circuit_tracer": [],
    "saelens": [
        *("standard", "topk", "topk-rescaled", "jumprelu", "gated", "transcoder", "skip_transcoder"),
        *("jumprelu_transcoder", "jumprelu_skip_transcoder"),
    ],
    "sparsify": ["topk", "groupmax", "transcoder", "skip transcoder", "groupmax skip transcoder"],
    "dictionary_learning": [
        *("AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "AutoEncoderTopK", "BatchTopKSAE"),
        *("MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder"),
    ],
}


BENCH = ROOT / ".venv-bench"
CIRCUIT_TRACER = BENCH / "circuit_tracer"
"""The package alone: its readers need nothing that SAELens' environment has not."""


def python_of(peer: str) -> Path:
    apart = peer == "circuit_tracer"
    found = BENCH / ("saelens" if apart else peer) / "bin" / "python"
    if not found.exists() or (apart and not (CIRCUIT_TRACER / "circuit_tracer").exists()):
        pytest.skip(f"{peer} is not installed: make test-interop does that")
    return found


def writable(format_name: str) -> list[tuple[str, str, str]]:
    """Cases that a format holds as they are."""
    format_ = FORMATS.build(FormatConfig(format_name))
    cases = [case for case in CASES if format_.refusal(of_sae(built(*case))) is None]
    return [case for case in cases if not (format_.thresholds_only and case[2] in ("topk", "group_max"))]


def asked(peer: str, folder: Path) -> list[dict[str, Any]]:
    """Every job of one peer: what it shall load, and what it shall save for us."""
    save_file({"rows": 0.5 * torch.randn(64, 12)}, folder / "random.safetensors")
    jobs = []
    for format_name in READS[peer]:
        format_ = FORMATS.build(FormatConfig(format_name))
        for case in writable(format_name):
            x = folder / f"{case[1]}.safetensors"
            save_file({"rows": rows(KINDS[case[1]], seed=5)}, x)
            ways = [format_name] + (["dashboard"] if peer == "saelens" and format_name == "saelens" else [])
            for way in ways:
                place = folder / way / "-".join(case)
                place.mkdir(parents=True)
                layers = range(2 if format_.whole_set else 1)
                saes = [(of_sae(built(*case)), about(case[1], layer)) for layer in layers]
                format_.write(saes, place, torch.float32)
                jobs.append({"do": "load", "folder": str(place), "rows": str(x), "out": f"{place}.out"})
    for name in SAVES[peer]:
        place = folder / "saved" / name
        jobs.append({"do": "save", "name": name, "folder": str(place), "out": f"{place}.out"})
        jobs[-1]["rows"] = str(folder / "random.safetensors")
    return jobs


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """peer -> the folder in which all its jobs are done; one process each."""

    @cache
    def run(peer: str) -> Path:
        python, folder = python_of(peer), tmp_path_factory.mktemp(peer)
        torch.manual_seed(0)
        (folder / "jobs.json").write_text(json.dumps(asked(peer, folder)))
        environment = os.environ | {
            "SPARSIFY_DISABLE_TRITON": "1",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "CIRCUIT_TRACER": str(CIRCUIT_TRACER),
        }
        done = subprocess.run(
            [python, PEERS / f"{peer}.py", folder / "jobs.json"],
            capture_output=True,
            text=True,
            timeout=800,
            env=environment,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return folder

    return run


def agree(sae: SAE, x: torch.Tensor, answer: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Relative differences of codes and reconstructions; which latents are active is the same."""
    codes, y = sae.encode(x).dense(), sae(x)
    assert torch.equal(codes != 0, answer["codes"] != 0) and bool((codes != 0).any())
    apart = [
        float((ours - theirs).norm() / theirs.norm())
        for ours, theirs in ((codes, answer["codes"]), (y, answer["y"]))
    ]
    assert max(apart) < TOLERANCE
    return apart[0], apart[1]


LOADS = [(peer, way) for peer, ways in READS.items() for way in ways] + [("saelens", "dashboard")]


@pytest.mark.parametrize(("peer", "way"), LOADS)
def test_a_library_computes_with_our_export_what_we_do(peer, way, answers, record_property):
    folder, cases, worst = answers(peer), writable("saelens" if way == "dashboard" else way), (0.0, 0.0)
    for case in cases:
        answer = load_file(folder / way / f"{'-'.join(case)}.out")
        apart = agree(built(*case), rows(KINDS[case[1]], seed=5), answer)
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
