"""A TransformerLens model whose residual stream after block 0 is the rows of a test: token i gives row i.

So a tool that insists on a model, tokens and a hook computes on exactly the rows that we do.
"""

import torch
from sae_lens import HookedSAETransformer
from transformer_lens import HookedTransformerConfig

HOOK = "blocks.0.hook_resid_post"
CONTEXT = 8


def model_of(rows: torch.Tensor) -> HookedSAETransformer:
    """Its block adds nothing, and it predicts by `residual @ rows.T`; [n, d] rows are n tokens."""
    n, d = rows.shape
    sizes = {"d_model": d, "d_head": d, "d_mlp": d, "n_heads": 1, "n_layers": 1, "d_vocab": n}
    config = HookedTransformerConfig(
        **sizes, n_ctx=CONTEXT, act_fn="relu", normalization_type=None, device="cpu"
    )
    model = HookedSAETransformer(config).eval().requires_grad_(False)
    for weight in model.parameters():
        weight.zero_()
    model.W_E.copy_(rows)
    model.W_U.copy_(rows.T)
    return model


def tokens_of(rows: torch.Tensor) -> torch.Tensor:
    """Every token once: [n / CONTEXT, CONTEXT]."""
    return torch.arange(len(rows)).view(-1, CONTEXT)
