"""Seeds and permutations that are pure functions of what they are made from, in every process alike."""

import torch
import xxhash
from torch import Tensor


def stable_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on the parts only: not on the process or its hash randomisation."""
    return xxhash.xxh3_64_intdigest(repr(parts).encode()) >> 1


def permutation(count: int, *seed: int | str) -> Tensor:
    """[count] int64: a permutation that is a pure function of the seed's parts."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(stable_seed(*seed)))
