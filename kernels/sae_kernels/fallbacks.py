"""How often a fast encoder guessed wrong and did its work again: exact all the same, but slower.

Triton's encoders guess a threshold, verify what it let through, and encode again where it failed, which their
plans make a matter of one row in a million. Data that is far from what the plans assume shows here.
The counters are on the devices; asking for them does not import Triton.
"""

import sys

from torch import Tensor


def fallbacks() -> dict[str, int]:
    """What was encoded again since the process began, summed over devices. Waits for them.

    Returns:
        "fallback_rows": rows of `topk_encode`; "fallback_batches": batches of `batch_topk_encode`. An op
        that Triton has not run in this process has no entry, so without Triton the dictionary is empty."""
    counters: dict[str, dict[object, Tensor]] = {}
    if (recover := sys.modules.get("sae_kernels.triton.recover")) is not None:
        counters["fallback_rows"] = recover.fallback_rows()
    if (compress := sys.modules.get("sae_kernels.triton.compress")) is not None:
        counters["fallback_batches"] = compress._fallbacks
    return {
        name: sum(int(count) for count in by_device.values())
        for name, by_device in counters.items()
        if by_device
    }
