"""Mixtures of experts with the layer of Llama.

`mlp` is the router and all of a layer's experts, with those that every token shares where there are some:
`mlp_in` is what each may read, `mlp_out` what they add up to.
"""

from sae_train.harvest.families.base import Family, register
from sae_train.harvest.families.llama import PRE_NORM_SITES

EXPERTS = register(
    Family(
        model_types=(
            "deepseek_v3",
            "ernie4_5_moe",
            "glm4_moe",
            "gpt_oss",
            "mixtral",
            "olmoe",
            "phimoe",
            "qwen2_moe",
            "qwen3_moe",
        ),
        layers="layers",
        sites=PRE_NORM_SITES,
    )
)
