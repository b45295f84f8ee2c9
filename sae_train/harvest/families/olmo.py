"""OLMo 2 and 3: norms only *after* a sublayer, so the MLP reads the residual stream itself.

mlp_in and resid_mid are therefore the same rows. attn_out and mlp_out are the outputs of the norms: what is
added. (The first OLMo has the layer of Llama.)
"""

from sae_train.harvest.families.base import Family, register

register(
    Family(
        model_types=("olmo2", "olmo3"),
        layers="layers",
        sites={
            "resid_pre": ("", "in"),
            "attn_out": ("post_attention_layernorm", "out"),
            "resid_mid": ("mlp", "in"),
            "mlp_in": ("mlp", "in"),
            "mlp_out": ("post_feedforward_layernorm", "out"),
            "resid_post": ("", "out"),
        },
    )
)
