"""A few of many combinations, such that every pair of choices occurs together in one of them.

What a compiler gets wrong about a combination it mostly gets wrong about two of its choices, whatever the
others are: the idea of pairwise testing (Cohen et al. 1997, "The AETG system"). The choice is greedy, and
the same for the same combinations in the same order.
"""

from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations


def covering(rows: Sequence[Mapping[str, Hashable]], together: int = 2) -> list[int]:
    """Numbers of rows, ascending: each pair of (name, value) that some row has is in one of them.

    Args:
        together: 1 for each (name, value) alone, 3 for three at a time.
    """
    left: set[object] = set()
    pairs = [set(combinations(sorted(row.items(), key=repr), together)) for row in rows]
    for number, row in enumerate(rows):  # a row of fewer choices stands for what it has
        pairs[number] = pairs[number] or {(item,) for item in row.items()} or {()}
        left |= pairs[number]
    chosen = []
    while left:
        best = max(range(len(rows)), key=lambda i: (len(pairs[i] & left), -i))
        chosen.append(best)
        left -= pairs[best]
    return sorted(chosen)
