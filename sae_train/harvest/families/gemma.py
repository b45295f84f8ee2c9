"""Gemma. The first generation has the layer of Llama; Gemma 2 and 3 normalise both before and after a
sublayer.

In Gemma 2 and 3 `post_attention_layernorm` and `post_feedforward_layernorm` stand between a sublayer and
the residual stream, so attn_out and mlp_out are the outputs of those norms: what is added. The raw
MLP output is `model.layers.L.mlp`. `embed` is the embedding before its scaling by sqrt(d) in Gemma 1 and 2;
resid_pre.0 is what the first layer sees.
"""

from sae_train.harvest.families.base import Family, register
from sae_train.harvest.families.llama import PRE_NORM_SITES

register(Family(model_types=("gemma",), layers="layers", sites=PRE_NORM_SITES))

register(
    Family(
        model_types=("gemma2", "gemma3", "gemma3_text"),
        layers="layers",
        sites={
            "resid_pre": ("", "in"),
            "attn_out": ("post_attention_layernorm", "out"),
            "resid_mid": ("pre_feedforward_layernorm", "in"),
            "mlp_in": ("mlp", "in"),
            "mlp_out": ("post_feedforward_layernorm", "out"),
            "resid_post": ("", "out"),
        },
    )
)
