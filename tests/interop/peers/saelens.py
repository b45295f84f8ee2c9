"""SAELens: SAE.load_from_disk, and the fold that dashboards do."""

import json
from pathlib import Path

import torch
from sae_lens import SAE
from sae_lens.registry import get_sae_class
from safetensors.torch import load_file, save_file
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
    name, _, earlier = name.partition(" of ")
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
    if earlier:
        as_before(folder, json.loads((folder / "cfg.json").read_text()))
        return load(folder)
    return both(sae)


def as_before(folder: Path, table: dict) -> None:
    """The configuration as release 5 wrote it, or an early one: other names, no architecture, and ones."""
    told = table.pop("metadata")
    table |= {
        "hook_name": told["hook_name"],
        "activation_fn_str": "relu",
        "sae_lens_training_version": "5.3.0",
    }
    table |= {"finetuning_scaling_factor": False, "context_size": 128, "activation_fn_kwargs": {}}
    k = table.pop("k", None)
    if k is not None:
        table |= {"architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": k}}
    if table["architecture"] == "standard" and k is None:
        del table["architecture"], table["apply_b_dec_to_input"]
        table |= {"hook_point": table.pop("hook_name"), "normalize_activations": False}
        weights = load_file(folder / "sae_weights.safetensors")
        save_file(weights | {"scaling_factor": torch.ones(F)}, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(table))


if __name__ == "__main__":
    work(
        lambda folder: load_as_dashboards_do(folder) if "dashboard" in folder.parts else load(folder),
        save,
        wrap=both,
    )
