"""circuit-tracer takes a set of ours from the hub, puts it into a model and traces circuits through it."""

from pathlib import Path

import pytest
import torch
from format_cases import KINDS, about, built, rows
from hub_server import HubServer, Repo
from interop.environments import agree, do
from safetensors.torch import load_file, save_file

from sae_train.formats.base import FORMATS, FormatConfig
from sae_train.formats.plain import of_sae

pytestmark = [pytest.mark.interop, pytest.mark.timeout(900), pytest.mark.usefixtures("one_thread")]

CASES = [
    ("linear", "transcoder", "jumprelu"),
    ("gated", "transcoder", "batch_topk"),
    ("linear", "transcoder", "relu"),
    ("matryoshka", "skip transcoder", "jumprelu"),
]


@pytest.mark.parametrize(
    ("case", "folder"),
    [(CASES[0], ""), (CASES[1], "layers/width_40"), (CASES[2], ""), (CASES[3], "")],
    ids=map(" ".join, CASES),
)
def test_a_set_from_the_hub_replaces_a_model_s_layers(case, folder, tmp_path: Path) -> None:
    made = tmp_path / "set"
    made.mkdir()
    saes = [(of_sae(built(*case)), about(case[1], layer)) for layer in range(2)]
    FORMATS.build(FormatConfig("circuit_tracer")).write(saes, made, torch.float32)
    save_file({"rows": rows(KINDS[case[1]])}, tmp_path / "rows.safetensors")
    with HubServer() as hub:
        hub.repos["me/set"] = Repo()
        place = f"{folder}/" if folder else ""
        hub.repos["me/set"].add({f"{place}{path.name}": path.read_bytes() for path in made.iterdir()})
        address = "me/set" + (f"/{folder}" if folder else "")
        job = {"do": "ask", "address": address, "rows": str(tmp_path / "rows.safetensors")}
        do("circuit_tracer", [job | {"out": str(tmp_path / "out")}], tmp_path, **hub.environment(tmp_path))
    answer, active = load_file(tmp_path / "out"), 0
    for layer in range(2):
        apart = agree(
            built(*case),
            answer[f"rows.{layer}"],
            {"codes": answer[f"codes.{layer}"], "y": answer[f"y.{layer}"]},
        )
        print(f"layer {layer}: codes {apart[0]:.1e}, reconstruction {apart[1]:.1e}")
        active += int((answer[f"codes.{layer}"] != 0).sum())
    assert len(answer["active"]) == active, "the graph's latents are the active ones"
