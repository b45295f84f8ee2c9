"""delphi: its loader of sparsify folders and its dense latents, in sparsify's environment; by its own name,
so that this file is not taken for it."""

import os
import sys
from pathlib import Path

sys.path = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]
sys.path.append(os.environ["PEER_PACKAGES"])
import torch  # noqa: E402
from delphi.sparse_coders.load_sparsify import load_sparsify_sparse_coders, sae_dense_latents  # noqa: E402

sys.path.append(str(Path(__file__).resolve().parent))
from work import Peer, work  # noqa: E402


def load(folder: Path) -> Peer:
    """A folder as one hookpoint of those beside it."""
    sae = load_sparsify_sparse_coders(str(folder.parent), [folder.name], "cpu")[folder.name]

    def encode(x: torch.Tensor) -> torch.Tensor:
        return sae_dense_latents(x.view(2, -1, x.shape[-1]), sae).flatten(0, 1)

    return encode, lambda x, codes: sae(x).sae_out  # it looks at latents only; the rest is sparsify's


if __name__ == "__main__":
    work(load)
