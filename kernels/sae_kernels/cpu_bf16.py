"""Exact top-k from a product that is rounded to bfloat16, on CPUs that multiply bfloat16 themselves.

torch's bfloat16 product on a CPU sums in float32 but gives bfloat16, so which latents are the largest, and
how large, is known to eight bits. Here it only proposes: some more than k latents of each row are multiplied
again in float32, and their k largest stand if rounding cannot have hidden a larger one among those left out.
Rows where it can have are encoded again in float32, and counted.
"""

from collections.abc import Callable
from threading import Lock

import torch
from torch import Tensor

SPARE = 16
"""Latents of a row that are looked at besides k. Of 4,608 normal pre-activations the 48th is 6 % below the
32nd, of a million the 80th 1.4 % below the 64th; rounding is half a percent."""
ROUNDING = 1.01 * 2.0**-8
"""Twice what rounding to the nearest bfloat16 changes at most, as a share, and a little for what one rounding
makes of the other: a library may round the product, and once more what it is with its bias."""
EPS = 2.0**-24
TINY = torch.finfo(torch.float32).tiny
"""The instructions take numbers below this, and give them, as 0."""
AGAIN = 48
"""What a latent costs that is looked at again, in latents of the product: of 4,608 it pays up to k 80."""

Codes = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Rows [n, D] -> values and indices [n, k] of their k largest pre-activations, in any order."""

_again = torch.zeros((), dtype=torch.int64)
_used = False
_counting = Lock()
"""Several threads may encode at a time."""


def fallback_rows() -> dict[torch.device, Tensor]:
    """Rows encoded again since the process began; empty before the first call of `encoder`."""
    return {_again.device: _again} if _used else {}


def pays(k: int, d_sae: int) -> bool:
    """Whether this is faster than a product in float32."""
    return k + SPARE < d_sae and AGAIN * (k + SPARE) <= d_sae


def encoder(
    w: Tensor,
    b: Tensor,
    k: int,
    top_k: Callable[[Tensor, int], tuple[Tensor, Tensor]],
    gather_dot: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Codes:
    """The k largest pre-activations of rows, by products of bfloat16 operands [F, D], summed in float32.

    Args:
        w: [F, D] bfloat16. b: [F].
        k: one that `pays`.
        top_k: (pre-activations [n, F] of any dtype, count) -> values of it and int64 indices, [n, count].
        gather_dot: (rows [n, D], indices [n, K], weight [F, D]) -> [n, K].
    """
    global _used
    _used = True
    wide, b = w.float(), b.float()
    longest, lift, low = torch.linalg.vector_norm(wide, dim=1).amax(), b.abs().amax(), b.to(w.dtype)

    def whole(rows: Tensor) -> tuple[Tensor, Tensor]:
        return top_k(torch.mm(rows.float(), wide.t()).add_(b), k)

    def codes(rows: Tensor) -> tuple[Tensor, Tensor]:
        guess, places = top_k(torch.addmm(low, rows, w.t()), k + SPARE)
        found = gather_dot(rows, places.int(), wide) + b[places]
        values, chosen = found.topk(k, dim=-1, sorted=False)
        indices = places.gather(1, chosen)
        # Whatever was left out is at most `least` as guessed, from a rounded bias, and rounded again.
        least = guess.amin(dim=1).float()
        terms, size = rows.shape[1] + 2, torch.linalg.vector_norm(rows.float(), dim=1)
        summing = 2 * terms * (EPS * (size * longest + lift) + TINY * (1 + size + longest))
        hidden = least + ROUNDING * (least.abs() + lift) + summing
        failed = (values.amin(dim=1) > hidden).logical_not_().nonzero().squeeze(1)  # NaN is among them
        if len(failed):
            with _counting:
                _again.add_(len(failed))
            values[failed], indices[failed] = whole(rows[failed])
        return values, indices

    return codes
