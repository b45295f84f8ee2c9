"""OpenMOSS' llamascopium: SparseDictionary.from_pretrained, in SAELens' environment; by its own name, so that
this file is not taken for it."""

import os
import sys
from pathlib import Path

sys.path = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]
sys.path.append(os.environ["PEER_PACKAGES"])
import torch  # noqa: E402
from llamascopium import CrosscoderConfig, SAEConfig, SparseDictionary  # noqa: E402

sys.path.append(str(Path(__file__).resolve().parent))
from work import Peer, randomise, work  # noqa: E402

D, F = 12, 40


def load(folder: Path) -> Peer:
    sae = SparseDictionary.from_pretrained(str(folder), device="cpu", dtype=torch.float32)
    return both(sae)


def both(sae: SparseDictionary) -> Peer:
    """As its own pipeline does: scale what each hook gives, put it together, encode."""
    several = sae.cfg.sae_type == "crosscoder"

    def encode(x: torch.Tensor) -> torch.Tensor:
        hooks = sae.cfg.hook_points if several else [sae.cfg.hook_point_in]
        batch = dict(zip(hooks, x.chunk(len(hooks), dim=-1), strict=True))
        ready, options, _ = sae.prepare_input(sae.normalize_activations(batch))
        codes = sae.encode(ready, **options)
        return codes[:, 0] if several else codes  # the same for every hook

    def decode(x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        if several:
            codes = codes[:, None].expand(-1, sae.cfg.n_heads, -1)
        return sae.decode(codes).flatten(1)

    return encode, decode


def save(name: str, folder: Path) -> Peer:
    rule, *more = name.split()
    options = {
        "act_fn": rule,
        "top_k": 5,
        "norm_activation": "dataset-wise" if "folded" in more else "inference",
        "sparsity_include_decoder_norm": "by-norm" in more or "crosscoder" in more,
        "device": "cpu",
        "dtype": torch.float32,
    }
    if "crosscoder" in more:
        width, hooks = D // 2, ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
        config = CrosscoderConfig(d_model=width, expansion_factor=F / width, hook_points=hooks, **options)
    else:
        hook = {"hook_point_in": "blocks.1.hook_resid_post", "hook_point_out": "blocks.1.hook_resid_post"}
        config = SAEConfig(d_model=D, expansion_factor=F / D, **hook, **options)
    sae = SparseDictionary.from_config(config)
    randomise(sae)
    for parameter_name, parameter in sae.named_parameters():
        if "log" in parameter_name:
            parameter.log_()
    if "folded" in more:
        sae.set_dataset_average_activation_norm({config.hook_point_in: 2.0})
    sae.save_pretrained(folder, fold_activation_scale="folded" in more)
    sae.cfg.save_hyperparameters(folder)
    return load(folder)


if __name__ == "__main__":
    work(load, save)
