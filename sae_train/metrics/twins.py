"""Latents that are the same as another: their decoder rows point the same way.

Two of a kind share what one could do alone, and a search for features finds one twice. Few are no harm; many
say that too many latents were asked for, or that a start or a resampling gave several the same direction.
"""

import torch
from torch import Tensor

from sae_train.sae.base import SAE

COSINE = 0.99
MOST = 1024
"""Latents that are looked at, evenly among those that fire; each is compared with all."""
BLOCK = 4096


@torch.no_grad()
def twins(sae: SAE, fires: Tensor) -> tuple[int, int]:
    """How many latents have a twin, and how many were looked at.

    Args:
        sae: any.
        fires: [F] bool; latents that never fire neither count nor are anybody's twin.

    Returns:
        (latents with a cosine above 0.99 to another that fires, latents looked at); (0, 0) if none fires.
    """
    live = fires.nonzero().flatten().to(sae.input_scale.device)
    if len(live) == 0:
        return 0, 0
    chosen = live[:: max(1, -(-len(live) // MOST))]
    own = torch.nn.functional.normalize(sae.directions(chosen), dim=-1)
    found = torch.zeros(len(chosen), dtype=torch.bool, device=chosen.device)
    for block in live.split(BLOCK):
        close = own @ torch.nn.functional.normalize(sae.directions(block), dim=-1).T > COSINE
        found |= (close & (chosen[:, None] != block)).any(dim=1)
    return int(found.sum()), len(chosen)
