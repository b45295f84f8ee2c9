"""Train sparse autoencoders on any Hugging Face model, and use the ones you have.

    from sae_train import load_sae
    sae = load_sae("runs/demo/saes/main")
    codes = sae.encode(x)
    x_hat = sae.decode(codes)

Importing this package imports torch and safetensors, and no Hydra, transformers, datasets or wandb.
"""

from sae_train.codes import Codes
from sae_train.sae.base import SAE
from sae_train.sae.io import load_sae, save_sae
from sae_train.stats import FeatureStats

__version__ = "0.1.0"

__all__ = ["SAE", "Codes", "FeatureStats", "load_sae", "save_sae"]
