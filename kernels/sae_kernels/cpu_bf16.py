"""Exact top-k by a product of bfloat16, on CPUs that multiply bfloat16 themselves.

torch's bfloat16 product on a CPU sums in float32 but gives bfloat16, and float32 operands have to be rounded
to it first: which latents are the largest, and how large, is then known to some bits. Here it only proposes.
How far a pre-activation can be from its guess is known, row by row; whatever could be among the k largest is
multiplied again in float32, and the k largest of that are those of all. Rows where it could be too many, as
where all are equal, are encoded in float32 from the start, and counted.
"""

from collections.abc import Callable
from threading import Lock

import torch
from torch import Tensor

from sae_kernels.cpu_candidates import BLOCK, at_most_kth, best, maxima_of_blocks, not_below

ROUNDING = 1.01 * 2.0**-8
"""What rounding a sum in float32 to the nearest bfloat16 changes at most, as a share."""
EPS = 2.0**-24
TINY = torch.finfo(torch.float32).tiny
"""The instructions take numbers below this, and give them, as 0."""
CACHED = 1 << 18
"""Elements that a core keeps near."""
AGAIN = 48
"""What a latent costs that is looked at again, in latents of the product: of 4,608 it pays up to k 80."""

Codes = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Rows [n, D] -> values and indices [n, k] of their k largest pre-activations, in any order."""

_again = 0
_used = False
_counting = Lock()
"""Several threads may encode at a time."""


def fallback_rows() -> dict[torch.device, Tensor]:
    """Rows encoded again since the process began; empty before the first call of `encoder`."""
    return {torch.device("cpu"): torch.tensor(_again, device="cpu")} if _used else {}


def pays(k: int, d_sae: int) -> bool:
    """Whether this is faster than a product in float32."""
    return d_sae % BLOCK == 0 and AGAIN * (k + 16) <= d_sae


def most(k: int, d_sae: int) -> int:
    """Latents of a row that are looked at again, at most."""
    return max(3 * k + 32, d_sae // 64)


def _rounded(rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows [n, D] as operands of both products, and what rounding took from them.

    Returns:
        exact [n, D] float32.
        low [n, D + 2] bfloat16. The last columns are for a bias, which addmm would write to all of its output
        first. They are not written yet.
        norms [n] float32, of the rows; and of what they lost.
    """
    n, d = rows.shape
    rows = rows.contiguous()  # norms are summed in another order over columns, and in one row as over rows
    exact = rows if rows.dtype == torch.float32 else torch.empty_like(rows, dtype=torch.float32)
    low = torch.empty(n, d + 2, dtype=torch.bfloat16, device="cpu")
    norms = torch.zeros(2, n, dtype=torch.float32, device="cpu")
    at_once = max(1, CACHED // max(1, d))  # what is read again is still in the cache
    memory = torch.empty(min(n, at_once), d, dtype=torch.float32, device="cpu")
    parts = (t.split(at_once) for t in (rows, exact, low[:, :d], *norms))
    for given, whole, short, norm, error in zip(*parts, strict=True):
        short.copy_(given)
        if exact is not rows:
            whole.copy_(given)
        if rows.dtype != torch.bfloat16:
            torch.linalg.vector_norm(memory[: len(whole)].copy_(short).sub_(whole), dim=1, out=error)
        torch.linalg.vector_norm(whole, dim=1, out=norm)
    return exact, low, *(norms + _floor(d))


def _floor(d: int) -> float:
    """What a norm of d elements can lack at most because squares are too small for float32."""
    return d**0.5 * 2.0**-60


def encoder(
    w: Tensor,
    b: Tensor,
    k: int,
    top_k: Callable[[Tensor, int], tuple[Tensor, Tensor]],
    gather_dot: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
) -> Codes:
    """The k largest pre-activations of rows, as float32 products and sums have them.

    Args:
        w: [F, D] of any dtype that float32 holds. b: [F].
        k: one that `pays`.
        top_k: (pre-activations [n, F], count) -> values and int64 indices, [n, count].
        gather_dot: (rows [n, D], indices [M], weight [F, D], offsets [n + 1]) -> [M].
    """
    global _used
    _used = True
    d_sae, d = w.shape
    exact, low, *norms_and_errors = _rounded(w)
    longest, worst = (largest.amax() for largest in norms_and_errors)
    b = b.float()
    highest, lift = b.amax(), b.abs().amax()
    low[:, d] = b
    # Two numbers of 8 bits are a bias of 16. What is no bfloat16 number has no rest.
    low[:, d + 1] = torch.where(low[:, d].isfinite(), b - low[:, d], 0)
    memory = torch.empty(0, dtype=torch.bfloat16, device="cpu")

    def whole(rows: Tensor) -> tuple[Tensor, Tensor]:
        return top_k(torch.mm(rows, exact.t()).add_(b), k)

    def off(norms: Tensor, errors: Tensor, kth: Tensor) -> Tensor:
        """[n, 1]: how far off a guess is at most, besides `ROUNDING` of itself, where it can matter."""
        products = norms * longest
        # No product lifts a latent with a bias that is further below zero to where k others are.
        bias = torch.minimum(lift, torch.maximum(highest, 1.1 * (products + kth.abs())))
        operands = errors * longest + (norms + errors) * worst
        sums = 2 * (d + 4) * (EPS * (products + bias) + TINY * (1 + norms + longest))
        return 1.01 * operands + sums + ROUNDING * 2.0**-8 * bias

    def codes(rows: Tensor) -> tuple[Tensor, Tensor]:
        global _again
        nonlocal memory
        if len(memory) < len(rows):
            memory = torch.empty(len(rows), d_sae, dtype=torch.bfloat16, device="cpu")
        rows, guessed, norms, errors = _rounded(rows)
        guessed[:, d:] = 1
        guess = torch.mm(guessed, low.t(), out=memory[: len(rows)])
        maxima = maxima_of_blocks(guess)
        kth = at_most_kth(maxima, k).float()
        # k pre-activations are not below kth - off - ROUNDING * |kth|. A guess as far below that again
        # belongs to none so large. 1.02: it may itself be of a larger size than kth.
        least = kth - 1.02 * 2 * (off(norms.unsqueeze(1), errors.unsqueeze(1), kth) + ROUNDING * kth.abs())
        latents, counts, crowded = not_below(guess, maxima, least, most(k, d_sae))
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        found = gather_dot(rows, latents.int(), exact, offsets).add_(b.index_select(0, latents))
        values, indices = best(found, latents, counts, k, most(k, d_sae))
        if len(crowded):
            with _counting:
                _again += len(crowded)
            values[crowded], indices[crowded] = whole(rows[crowded])
        return values, indices

    return codes
