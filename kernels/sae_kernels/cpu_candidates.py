"""Which latents of a row can be among its k largest, on a CPU: a bound first, then what is not below it.

Latents lie in blocks of 8, blocks in groups. The maxima of the groups are few, and the k-th largest of them
is at most the k-th largest of the row: what is below it cannot be chosen, nor can a block whose maximum is
below it. If the large ones lie anywhere, about a sixth more latents than k are left.
"""

import torch
from torch import Tensor

SHIFT = 3
BLOCK = 1 << SHIFT
GROUPS = 4
"""Groups for each of the k. Twice as many leave 7 % above k instead of 15, and cost twice as much."""


def maxima_of_blocks(pre: Tensor) -> Tensor:
    """[n, F] -> [n, F / 8]: block i holds latents i, i + F / 8 ... Over neighbours it takes twice as long."""
    n, d_sae = pre.shape
    return pre.view(n, BLOCK, d_sae // BLOCK).amax(dim=1)


def at_most_kth(maxima: Tensor, k: int) -> Tensor:
    """Maxima of blocks [n, B] -> [n, 1]: what the k-th largest of each row is at least. NaN is largest."""
    n, blocks = maxima.shape
    size = 1
    while blocks % (2 * size) == 0 and blocks // (2 * size) >= GROUPS * k:
        size *= 2
    groups = maxima.view(n, size, blocks // size).amax(dim=1)
    return groups.topk(k, dim=-1, sorted=False).values.amin(dim=1, keepdim=True)


def not_below(pre: Tensor, maxima: Tensor, least: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where pre [n, F] is not below least [n, 1]; NaN is not below anything, and nothing below NaN.

    Args:
        maxima: of the blocks of pre.
        most: rows with more such places are left out.

    Returns:
        latents [M] int64: of these places, row after row.
        counts [n] int64: how many of them each row has; 0 for those that are left out.
        crowded [R] int64: the rows that are.
    """
    n, blocks = maxima.shape
    rows, found = (maxima < least).logical_not_().nonzero(as_tuple=True)
    rows, found, _, many = _uncrowded(rows, found, n, most)
    members = pre.view(n, BLOCK, blocks)[rows, :, found]
    inside = (members < least.index_select(0, rows)).logical_not_().view(-1).nonzero().squeeze(1)
    # Integers are divided slowly.
    block, member = inside >> SHIFT, inside & (BLOCK - 1)
    latents = found.index_select(0, block).add_(member, alpha=blocks)
    _, latents, counts, more = _uncrowded(rows.index_select(0, block), latents, n, most)
    return latents, counts, torch.cat([many, more])


def _uncrowded(rows: Tensor, of: Tensor, n: int, most: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """rows and of [M] without those of rows that occur more than `most` times; how often others do; these."""
    counts = torch.bincount(rows, minlength=n)
    crowded = (counts > most).nonzero().squeeze(1)
    if len(crowded) > 0:
        keep = (counts <= most).index_select(0, rows)
        rows, of = rows[keep], of[keep]
        counts[crowded] = 0
    return rows, of, counts, crowded


def best(values: Tensor, latents: Tensor, counts: Tensor, k: int, most: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row's values [M] and their latents, in any order; nonsense for rows with fewer.

    Args:
        counts: [n] how many of values and latents belong to each row.
        most: no less than any of them. On it, and on the row, depends the order, but on no other row."""
    starts = counts.cumsum(0) - counts
    own = torch.arange(len(counts), device="cpu") * most - starts
    table = values.new_full((len(counts) * most,), -torch.inf)
    table[torch.arange(len(values), device="cpu") + own.repeat_interleave(counts)] = values
    chosen, places = table.view(len(counts), most).topk(k, dim=-1, sorted=False)
    if len(latents) == 0:
        return chosen, places
    places.add_(starts.unsqueeze(1)).clamp_(max=len(latents) - 1)
    return chosen, latents.index_select(0, places.view(-1)).view_as(places)
