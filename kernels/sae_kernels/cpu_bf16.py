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

ROUNDING = 2.02 * 2.0**-8
"""What rounding to the nearest bfloat16 changes at most, twice, as a share: a library may round the product,
and once more what it is with its bias."""
EPS = 2.0**-24
TINY = torch.finfo(torch.float32).tiny
"""The instructions take numbers below this, and give them, as 0."""
PAIR = (torch.float32, torch.bfloat16)
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
    return {torch.device("cpu"): torch.tensor(_again)} if _used else {}


def pays(k: int, d_sae: int) -> bool:
    """Whether this is faster than a product in float32."""
    return d_sae % BLOCK == 0 and AGAIN * (k + 16) <= d_sae


def most(k: int, d_sae: int) -> int:
    """Latents of a row that are looked at again, at most."""
    return max(3 * k + 32, d_sae // 64)


def _both(w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """w [F, D] in float32 and in bfloat16; the largest norm of a row, and of what rounding took from one."""
    exact, low = (w if w.dtype == dtype else torch.empty_like(w, dtype=dtype) for dtype in PAIR)
    norms = torch.zeros(2, len(w), dtype=torch.float32)
    rows = max(1, CACHED // max(1, w.shape[1]))  # what is read again is still in the cache
    for start in range(0, len(w), rows):
        part = slice(start, start + rows)
        if exact is not w:
            exact[part] = w[part]
        torch.linalg.vector_norm(exact[part], dim=1, out=norms[0, part])
        if low is not w:
            low[part] = exact[part]
            torch.linalg.vector_norm(exact[part] - low[part], dim=1, out=norms[1, part])
    longest, most = norms.amax(dim=1) + _floor(w.shape[1])
    return exact, low, longest, most


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
        w: [F, D] bfloat16 or float32. b: [F].
        k: one that `pays`.
        top_k: (pre-activations [n, F], count) -> values and int64 indices, [n, count].
        gather_dot: (rows [n, D], indices [M], weight [F, D], offsets [n + 1]) -> [M].
    """
    global _used
    _used = True
    d_sae, d = w.shape
    exact, guessing, longest, rounded = _both(w)
    b = b.float()
    low, highest, lift = b.bfloat16(), b.amax(), b.abs().amax()
    memory = torch.empty(0, dtype=torch.bfloat16)

    def whole(rows: Tensor) -> tuple[Tensor, Tensor]:
        return top_k(torch.mm(rows, exact.t()).add_(b), k)

    def off(rows: Tensor, guessed: Tensor, kth: Tensor) -> Tensor:
        """[n, 1]: how far off a guess is at most, besides `ROUNDING` of itself, where it can matter."""
        size = torch.linalg.vector_norm(rows, dim=1, keepdim=True) + _floor(d)
        lost = torch.linalg.vector_norm(rows - guessed, dim=1, keepdim=True) + _floor(d)
        products = size * longest
        # No product lifts a latent with a bias that is further below zero to where k others are.
        bias = torch.minimum(lift, torch.maximum(highest, 1.1 * (products + kth.abs())))
        operands = lost * longest + (size + lost) * rounded
        sums = 2 * (d + 2) * (EPS * (products + bias) + TINY * (1 + size + longest))
        return 1.01 * operands + sums + ROUNDING * bias

    def codes(rows: Tensor) -> tuple[Tensor, Tensor]:
        global _again
        nonlocal memory
        if len(memory) < len(rows):
            memory = torch.empty(len(rows), d_sae, dtype=torch.bfloat16)
        guessed, rows = rows.bfloat16(), rows.float()
        guess = torch.addmm(low, guessed, guessing.t(), out=memory[: len(rows)])
        maxima = maxima_of_blocks(guess)
        kth = at_most_kth(maxima, k).float()
        # k pre-activations are not below kth - off - ROUNDING * |kth|. A guess as far below that again
        # belongs to none so large. 1.02: it may itself be of a larger size than kth.
        least = kth - 1.02 * 2 * (off(rows, guessed, kth) + ROUNDING * kth.abs())
        places, counts, crowded = not_below(guess, maxima, least, most(k, d_sae))
        latents = (places % d_sae).int()
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        found = gather_dot(rows, latents, exact, offsets) + b.index_select(0, latents)
        values, indices = best(found, latents.long(), counts, k, most(k, d_sae))
        if len(crowded):
            with _counting:
                _again += len(crowded)
            values[crowded], indices[crowded] = whole(rows[crowded])
        return values, indices

    return codes
