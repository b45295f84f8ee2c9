"""Time and memory of exporting an SAE of a million latents.

    python tests/interop/large.py [LATENTS WIDTH FORMAT]

Random weights in bfloat16 are written as one of our SAEs, block by block, and exported by the command itself,
proof included, in a process whose peak memory is then read.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from sae_train.formats.blocks import Matrix, Stored, write_file


def random_weights(latents: int, width: int, seed: int) -> Matrix:
    """[latents, width] unit rows that are made when they are read, the same each time."""

    def rows(first: int, last: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed * 10**9 + first)
        return torch.nn.functional.normalize(torch.randn(last - first, width, generator=generator), dim=-1)

    return Matrix(rows, (latents, width))


def publish(folder: Path, latents: int, width: int) -> int:
    """A top-k SAE of ours; its bytes."""
    tensors = {
        "w_enc": Stored(random_weights(latents, width, 1)),
        "w_dec": Stored(random_weights(latents, width, 2)),
        "b_enc": torch.zeros(latents),
        "b_dec": torch.randn(width),
        "input_scale": torch.tensor(1.0),
    }
    write_file(folder / "sae.safetensors", tensors, torch.bfloat16)
    sae = {"name": "linear", "kind": "autoencoder", "d_sae": latents, "activation": {"name": "topk", "k": 64}}
    told = {"format_version": 1, "kind": "sae", "d_in": width, "sae": sae, "meta": {"hook": "resid_post.12"}}
    (folder / "config.json").write_text(json.dumps(told))
    return (folder / "sae.safetensors").stat().st_size


def main() -> None:
    latents, width = (int(text) for text in sys.argv[1:3]) if len(sys.argv) > 2 else (2**20, 1024)
    format_name = sys.argv[3] if len(sys.argv) > 3 else "saelens"
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", ".")) as name:
        ours, out = Path(name) / "ours", Path(name) / "out"
        ours.mkdir()
        size_bytes = publish(ours, latents, width)
        started = time.perf_counter()
        command = ["export", f"run={ours}", f"format={format_name}", f"out={out}", "dtype=bfloat16"]
        done = subprocess.run(
            [sys.executable, "-m", "sae_train", *command], text=True, stdout=subprocess.PIPE
        )
        seconds = time.perf_counter() - started
        peak_bytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        print(done.stdout)
        print(
            f"{latents:,} latents of width {width}, {size_bytes / 1e9:.2f} GB in bfloat16, as {format_name}: "
            f"{seconds:.0f} s with proof, peak memory {peak_bytes / 1e9:.2f} GB"
        )
        sys.exit(done.returncode)


if __name__ == "__main__":
    main()
