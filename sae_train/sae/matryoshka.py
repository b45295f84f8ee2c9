"""The Matryoshka SAE: nested dictionaries. The first latents have to reconstruct alone, then more, then all.

    mse = mean over prefixes m of |t y - b_dec - sum over the latents f < m of z_f W_dec[f]|^2

So general features go to the first latents and special ones cannot take their place, which leaves less
feature splitting and absorption. Codes are those of all latents together, computed once; the encoder, what is
published and AuxK, which explains what all latents miss, are those of the linear SAE.

Errors are summed from the last prefix to the first: what a shorter one misses is what the longer one does,
plus the part of the latents between, which is one sparse decode over these alone.

Prefixes are fixed, or drawn for each step with probability sqrt(m / F) of being at most m: a power law cut
off at F, so that short ones are frequent and no latent stands at an edge for good.

Source: Bussmann, Nabeshima, Karvonen & Nanda 2025 (arXiv:2503.17547); the mean over prefixes and the power
law as in the code of Nabeshima 2024, github.com/noanabeshima/matryoshka-saes.
"""

import random
import re
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from math import ceil

from torch import Tensor

from sae_train.codes import Codes
from sae_train.errors import InputError
from sae_train.places import Widths
from sae_train.sae.base import SAES
from sae_train.sae.linear import LinearConfig, LinearSAE
from sae_train.seeds import stable_seed

MAX_PREFIXES = 64
"""Each costs a decode of its own; published SAEs have 2 to 10."""


@dataclass
class MatryoshkaConfig(LinearConfig):
    """A linear SAE whose first latents also have to reconstruct without the others."""

    name: str = "matryoshka"
    prefixes: str = "1/32 3/32 7/32 15/32 1"
    """Rising shares of the latents that reconstruct alone; the last one is 1. These are the 2048, 6144,
    14336, 30720 and 65536 latents of Bussmann et al. on Gemma 2 2B. Equal numbers of latents count once."""
    sampled: int = 0
    """Draw this many prefixes for each step instead, that of all latents always among them. 10 are
    Nabeshima's. 0 is off."""
    prefix_seed: int = 0
    """Of the drawn prefixes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        shares(self.prefixes)
        if self.sampled != 0 and not 2 <= self.sampled <= MAX_PREFIXES:
            raise InputError("sae.sampled", self.sampled, f"2 to {MAX_PREFIXES} prefixes, or 0")


def shares(text: str) -> list[Fraction]:
    """The numbers in `prefixes`."""
    words = text.split()
    wanted = f"1 to {MAX_PREFIXES} rising shares of the latents that end with 1, such as '1/8 1/2 1'"
    plain = all(re.fullmatch(r"\d{1,9}(\.\d{1,9}|/[1-9]\d{0,8})?", word, re.ASCII) for word in words)
    if not plain or not 1 <= len(words) <= MAX_PREFIXES:
        raise InputError("sae.prefixes", text[:80], wanted)
    found = [Fraction(word) for word in words]
    if found[0] <= 0 or found[-1] != 1 or any(a >= b for a, b in pairwise(found)):
        raise InputError("sae.prefixes", text[:80], wanted)
    return found


@SAES.register("matryoshka", MatryoshkaConfig)
class MatryoshkaSAE(LinearSAE):
    """The parameters of the linear SAE."""

    config: MatryoshkaConfig

    def __init__(self, config: MatryoshkaConfig, widths: Widths | int) -> None:
        super().__init__(config, widths)
        if config.sampled > self.d_sae:
            raise InputError("sae.sampled", config.sampled, f"at most the number of latents, {self.d_sae}")
        self.ends = [*self.first_latents(), self.d_sae]
        """Latents of each prefix, rising to F; of the step that `begin_step` announced."""

    def first_latents(self) -> list[int]:
        """The fixed prefixes but the whole, also where others were drawn in training."""
        return sorted({ceil(share * self.d_sae) for share in shares(self.config.prefixes)})[:-1]

    def begin_step(self, step: int, steps: int) -> None:
        super().begin_step(step, steps)
        if self.config.sampled:
            self.ends = drawn(self.d_sae, self.config.sampled, self.config.prefix_seed, step)

    def _error(self, codes: Codes, residual: Tensor) -> Tensor:
        first, own = self.split.first(len(self.w_dec)), len(self.w_dec)
        ends = [min(max(end - first, 0), own) for end in self.ends]  # where this process's latents stand
        sizes = [end - start for start, end in pairwise([0, *ends])]
        groups = list(zip(self.w_dec.split(sizes), ends, sizes, strict=True))
        total = self._squared(residual)
        for w_dec, end, size in reversed(groups[1:]):
            residual = residual + self._decoded(_part(codes, end - size, end), w_dec)
            total = total + self._squared(residual)
        return total / len(groups)


def drawn(d_sae: int, count: int, seed: int, step: int) -> list[int]:
    """`count` different numbers of latents, rising to d_sae: a pure function of the arguments."""
    draw = random.Random(stable_seed("prefixes", seed, step))
    found = {d_sae}
    while len(found) < count:
        found.add(int(d_sae * draw.random() ** 2) + 1)
    return sorted(found)


def _part(codes: Codes, first: int, end: int) -> Codes:
    """The codes of latents first to end, as those of a dictionary of their own."""
    if codes.indices is None:
        return Codes(codes.values[:, first:end], None, end - first)
    if first == end:  # none of this process's latents: nothing to add
        return Codes(codes.values[:, :0], None, 0)
    inside = (codes.indices >= first) & (codes.indices < end)
    own = (codes.indices - first).clamp(0, end - first - 1)
    return Codes(codes.values.where(inside, 0), own, end - first)
