"""Train sparse autoencoders on any Hugging Face model, and use the ones you have.

    from sae_train import load_sae
    sae = load_sae("runs/demo/saes/main")
    codes = sae.encode(x)
    x_hat = sae.decode(codes)

    with attached(model, sae, "resid_post.12") as run: ...    # docs/using.md

Importing this package imports torch and safetensors, and no Hydra, transformers, datasets or wandb.
"""

from sae_train.attach import Recording, ablated, attached, clamped, steered
from sae_train.codes import Codes
from sae_train.load import load_sae
from sae_train.sae.base import SAE
from sae_train.sae.io import save_sae
from sae_train.stats import FeatureStats

__version__ = "0.1.0"

__all__ = [
    "SAE",
    "Codes",
    "FeatureStats",
    "Recording",
    "ablated",
    "attached",
    "clamped",
    "load_sae",
    "save_sae",
    "steered",
]
