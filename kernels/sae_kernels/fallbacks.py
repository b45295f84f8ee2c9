"""How often a fast encoder guessed wrong and did its work again: exact all the same, but slower.

Triton's encoders guess a threshold, verify what they have, and encode again where it may not suffice. The
CPU's by bfloat16 looks again at what rounding leaves open, and encodes rows again where that is too much.
Both are made a matter of few rows. Data that is far from what was assumed shows here.
The counters are on the devices; asking for them does not import Triton.
"""

import sys

from torch import Tensor

from sae_kernels import cpu_bf16


def fallbacks() -> dict[str, int]:
    """What was encoded again since the process began, summed over devices. Waits for them.

    Returns:
        "fallback_rows": rows of `topk_encode`; "fallback_batches": batches of `batch_topk_encode`. An op
        that has guessed nothing in this process has no entry."""
    counters: dict[str, list[Tensor]] = {"fallback_rows": [*cpu_bf16.fallback_rows().values()]}
    if (recover := sys.modules.get("sae_kernels.triton.recover")) is not None:
        counters["fallback_rows"] += recover.fallback_rows().values()
    if (compress := sys.modules.get("sae_kernels.triton.compress")) is not None:
        counters["fallback_batches"] = [*compress._fallbacks.values()]
    return {
        name: sum(int(count) for count in of_devices) for name, of_devices in counters.items() if of_devices
    }
