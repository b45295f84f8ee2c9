"""sparsify: SparseCoder.load_from_disk; by its own name, so that this file is not taken for it."""

import sys
from pathlib import Path

sys.path = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]
import torch  # noqa: E402
from sparsify import SparseCoder, SparseCoderConfig  # noqa: E402

sys.path.append(str(Path(__file__).resolve().parent))
from work import Peer, randomise, work  # noqa: E402

D, F = 12, 40


def both(sae: SparseCoder) -> Peer:
    def encode(x: torch.Tensor) -> torch.Tensor:
        top_acts, top_indices, _ = sae.encode(x)
        return torch.zeros(len(x), sae.num_latents).scatter(1, top_indices, top_acts)

    def decode(x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        return sae(x).sae_out

    return encode, decode


def load(folder: Path) -> Peer:
    return both(SparseCoder.load_from_disk(folder, device="cpu"))


def save(name: str, folder: Path) -> Peer:
    config = SparseCoderConfig(
        activation="groupmax" if "groupmax" in name else "topk",
        num_latents=F,
        k=5,
        transcode="transcoder" in name,
        skip_connection="skip" in name,
    )
    sae = SparseCoder(D, config)
    randomise(sae)
    sae.save_to_disk(folder)
    return both(sae)


if __name__ == "__main__":
    work(load, save, wrap=both)
