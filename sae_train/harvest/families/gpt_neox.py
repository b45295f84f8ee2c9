"""GPT-NeoX and Pythia: attention and MLP usually read the same residual and are added together.

    resid_post = resid_pre + attn_out + mlp_out

There is then no point between them, so resid_mid exists only where `use_parallel_residual` is off.
"""

from typing import Any

from sae_train.harvest.families.base import Family, register


def missing(config: Any) -> dict[str, str]:
    if not config.use_parallel_residual:
        return {}
    return {"resid_mid": "attention and MLP are added to the residual in parallel, so there is no resid_mid"}


register(
    Family(
        model_types=("gpt_neox",),
        layers="layers",
        sites={
            "resid_pre": ("", "in"),
            "attn_out": ("attention", "out"),
            "resid_mid": ("post_attention_layernorm", "in"),
            "mlp_in": ("mlp", "in"),
            "mlp_out": ("mlp", "out"),
            "resid_post": ("", "out"),
        },
        missing=missing,
    )
)
