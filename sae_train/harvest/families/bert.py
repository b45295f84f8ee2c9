"""BERT and RoBERTa encoders: post-norm, so the residual stream is normalised after every addition.

    resid_mid = norm(resid_pre + attn_out)        resid_post = norm(resid_mid + mlp_out)

attn_out and mlp_out are the outputs of the last linear layer of each sublayer (`output.dense`; the dropout
after it does nothing in evaluation): what is added, before the norm. The module `output` itself already
includes residual and norm.
"""

from sae_train.harvest.families.base import Family, register

register(
    Family(
        model_types=("bert", "roberta", "xlm-roberta", "camembert"),
        layers="encoder.layer",
        sites={
            "resid_pre": ("", "in"),
            "attn_out": ("attention.output.dense", "out"),
            "resid_mid": ("attention.output", "out"),
            "mlp_in": ("intermediate", "in"),
            "mlp_out": ("output.dense", "out"),
            "resid_post": ("", "out"),
        },
    )
)
