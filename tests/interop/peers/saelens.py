"""SAELens: SAE.load_from_disk, and the fold that dashboards do."""

from pathlib import Path

import torch
from sae_lens import SAE
from sae_lens.registry import get_sae_class
from work import Peer, randomise, work

D, F = 12, 40


def load(folder: Path) -> Peer:
    sae = SAE.load_from_disk(str(folder), device="cpu")
    assert sae.cfg.metadata.hook_name, "hook names survive"
    return both(sae)


def both(sae) -> Peer:
    def decode(x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        y = sae.decode(codes)
        skip = getattr(sae, "W_skip", None)
        whole = y if skip is None else y + x @ skip.T
        torch.testing.assert_close(sae(x), whole, rtol=1e-4, atol=1e-4)  # its own forward pass says the same
        return whole

    return sae.encode, decode


def load_as_dashboards_do(folder: Path) -> Peer:
    sae = SAE.load_from_disk(str(folder), device="cpu")
    sae.fold_W_dec_norm()
    return both(sae)


def save(name: str, folder: Path) -> Peer:
    sae_class, config_class = get_sae_class(name.removesuffix("-rescaled"))
    options = {"d_in": D, "d_sae": F, "device": "cpu", "dtype": "float32"}
    if "transcoder" in name:
        options |= {"d_out": D, "apply_b_dec_to_input": False}
    if name.startswith("topk"):
        options |= {"k": 5, "rescale_acts_by_decoder_norm": name.endswith("-rescaled")}
    sae = sae_class(config_class(**options))
    randomise(sae)
    sae.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    sae.save_model(str(folder))
    return both(sae)


if __name__ == "__main__":
    work(
        lambda folder: load_as_dashboards_do(folder) if "dashboard" in folder.parts else load(folder),
        save,
        wrap=both,
    )
