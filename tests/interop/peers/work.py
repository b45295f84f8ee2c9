"""What every peer's script does: jobs in, codes and reconstructions out. Runs in the peer's environment.

    python peers/saelens.py JOBS.json

A job is {"do": "load", "folder", "rows", "out"}: load the folder with the peer's own loader, encode and
decode the rows [N, d], write `codes` [N, F] and `y`; or {"do": "save", "name", "folder", "rows", "out"}: make
one of the peer's own SAEs with random weights, save it as the peer does, and write the same; or {"do": "run",
"code", "rows", "out"}: run a file of code that makes an `sae`, with the rows as its `x`; or {"do": "ask",
"address", "rows", "out"}: whatever the peer does with an address on the hub. What a peer measures of a loaded
SAE is written beside the codes, each number as `measured.NAME`.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Peer = tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]
"""rows -> dense codes; (rows, codes) -> reconstruction"""


def randomise(module: torch.nn.Module, seed: int = 0) -> None:
    """Weights that differ in every respect, so that none can be left out or mixed up."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            size = 0.3 if parameter.dim() > 1 else 0.1
            parameter.copy_(size * torch.randn(parameter.shape, generator=g))
            if "threshold" in name:
                parameter.copy_(0.2 + 0.2 * torch.rand(parameter.shape, generator=g))


def work(
    load: Callable[[Path], Peer] | None = None,
    save: Callable[[str, Path], Peer] | None = None,
    measure: Callable[[Path, torch.Tensor], dict[str, float]] | None = None,
    wrap: Callable[[Any], Peer] | None = None,
    ask: Callable[[str, torch.Tensor], dict[str, torch.Tensor]] | None = None,
) -> None:
    """Do the jobs.

    Args:
        load: folder -> SAE.
        save: name, empty folder -> SAE, saved there.
        measure: folder, rows -> numbers.
        wrap: the peer's own object -> SAE.
        ask: address, rows -> tensors.
    """
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    jobs: list[dict[str, Any]] = json.loads(Path(sys.argv[1]).read_text())
    for job in jobs:
        x = load_file(job["rows"])["rows"]
        if job["do"] == "ask":
            assert ask is not None
            save_file(ask(job["address"], x), job["out"])
            continue
        if job["do"] == "save":
            Path(job["folder"]).mkdir(parents=True)
            assert save is not None
            encode, decode = save(job["name"], Path(job["folder"]))
        elif job["do"] == "run":
            assert wrap is not None
            known: dict[str, Any] = {"x": x}
            exec(compile(Path(job["code"]).read_text(), job["code"], "exec"), known)
            encode, decode = wrap(known["sae"])
        else:
            assert load is not None
            encode, decode = load(Path(job["folder"]))
        codes = encode(x)
        y = decode(x, codes)
        answer = {"codes": codes.contiguous(), "y": y.contiguous()}
        if measure is not None:
            found = measure(Path(job["folder"]), x)
            answer |= {f"measured.{name}": torch.tensor(value) for name, value in found.items()}
        save_file(answer, job["out"])
