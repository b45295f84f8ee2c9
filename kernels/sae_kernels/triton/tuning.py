"""Which of two ways to compute the same thing is taken, by the size of the problem.

A row of the table says from where on a way is the faster one. Nothing is timed at run time: the same
sizes take the same way in every run, and so give the same bits.
"""

import os

import torch

from sae_kernels.triton.launch import INTERPRETING

ENCODERS = ("e1", "e2")
ENCODER_VARIABLE = "SAE_KERNELS_ENCODER"
# Scores that E1 writes and reads once, and E2 never, take 363 / D of the time of the product if they go
# through memory: 47 % of it at D 768, 16 % at 2304. From there on the library's product, of whose speed
# E2's reaches 85 to 95 %, is worth more. Reckoned from the rates of an H200, not yet measured on one.
FUSED_BELOW_WIDTH = 2304
HOPPER = (9, 0)


def encoder_for(n: int, d: int, f: int, k: int, dtype: torch.dtype = torch.bfloat16) -> str:
    """ "e1": a library's product and a filter over it; "e2": a filter within the product.

    The environment variable SAE_KERNELS_ENCODER takes the choice away, to measure the other one.

    Args:
        n, d, f, k: rows, width, latents and slots of `topk_encode`.
        dtype: of the operands. Products of float32 have no matrix instructions to be fused with.

    Raises:
        ValueError: the variable has another value than e1 or e2."""
    asked = os.environ.get(ENCODER_VARIABLE)
    if asked is not None:
        if asked not in ENCODERS:
            raise ValueError(f"{ENCODER_VARIABLE} is {asked!r}: expected one of {', '.join(ENCODERS)}")
        return asked
    # Without the bulk copies and asynchronous products of Hopper, a library's product is out of reach.
    hopper = not INTERPRETING and torch.version.hip is None and torch.cuda.get_device_capability() >= HOPPER
    narrow = d < FUSED_BELOW_WIDTH and dtype.itemsize == 2
    return "e2" if hopper and narrow else "e1"
