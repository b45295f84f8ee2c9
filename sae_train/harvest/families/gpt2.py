"""GPT-2: pre-norm attention, then a pre-norm MLP. `embed` is the token embedding, before positions."""

from sae_train.harvest.families.base import Family, register

register(
    Family(
        model_types=("gpt2",),
        layers="h",
        sites={
            "resid_pre": ("", "in"),
            "attn_out": ("attn", "out"),
            "resid_mid": ("ln_2", "in"),
            "mlp_in": ("mlp", "in"),
            "mlp_out": ("mlp", "out"),
            "resid_post": ("", "out"),
        },
    )
)
