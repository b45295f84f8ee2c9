"""Qwen 2 and 3: the layer of Llama; they differ inside attention (biases, norms of query and key)."""

from sae_train.harvest.families.base import Family, register
from sae_train.harvest.families.llama import PRE_NORM_SITES

register(Family(model_types=("qwen2", "qwen3"), layers="layers", sites=PRE_NORM_SITES))
