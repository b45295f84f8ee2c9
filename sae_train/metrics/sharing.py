"""How a crosscoder's latents are shared between the hooks that it reconstructs.

    share[f, h] = |W_dec[f, h]| / sum over hooks of |W_dec[f, h']|

Of two models at one hook, a latent with shares near 1/2 stands for something that both have; one near 0 or 1
for what only one of them has. It is the plot of model diffing: Lindsey et al. 2024, "Sparse Crosscoders for
Cross-Layer Features and Model Diffing". A share near an end says that the decoder does without the other
model, not that the other lacks the concept: sparsity alone pushes latents there, under an L1 penalty far more
than under a batch's top-k (Minder et al. 2025, "Overcoming Sparsity Artifacts in Crosscoders to Interpret
Chat-Tuning", arXiv:2504.02922).

Norms are compared in the units of training, in which rows of every hook have the same mean distance from
their centre. In raw units a later layer, whose rows are longer, would seem to own every latent.
"""

import torch
from torch import Tensor

from sae_train.sae.base import SAE


@torch.no_grad()
def decoder_shares(sae: SAE, scale: Tensor | None = None) -> Tensor:
    """Each latent's share of decoder norm at every hook.

    Args:
        sae: with a `w_dec` [F, d_out], in the form that is trained, with its scales.
        scale: [hooks] what rows of each output have to be multiplied by, on top, for equal length. For a
            published SAE, whose decoder is in raw units; one over the mean distance from the centre will do.

    Returns:
        [F, hooks] float32; a row adds up to 1, and is 0 for a latent without a decoder.
    """
    w_dec = sae.w_dec
    assert isinstance(w_dec, Tensor)
    parts = w_dec.float().split(sae.widths.outputs, dim=-1)
    norms = torch.stack([torch.linalg.vector_norm(part, dim=-1) for part in parts], dim=-1)
    if scale is not None:
        norms = norms * scale.to(norms)
    return norms / norms.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(norms.dtype).tiny)
