"""Llama and what shares its layer: pre-norm attention, then a pre-norm MLP, each added as it is.

`post_attention_layernorm` is, in spite of its name, the norm *before* the MLP; its input is resid_mid.
"""

from sae_train.harvest.families.base import Family, register

PRE_NORM_SITES = {
    "resid_pre": ("", "in"),
    "attn_out": ("self_attn", "out"),
    "resid_mid": ("post_attention_layernorm", "in"),
    "mlp_in": ("mlp", "in"),
    "mlp_out": ("mlp", "out"),
    "resid_post": ("", "out"),
}

register(
    Family(
        model_types=(
            "arcee",
            "glm",
            "llama",
            "ministral",
            "ministral3",
            "mistral",
            "nemotron",
            "olmo",
            "phi3",
            "seed_oss",
            "smollm3",
            "starcoder2",
        ),
        layers="layers",
        sites=PRE_NORM_SITES,
    )
)
