"""What `latent_step` reads and writes: parameters with their Adam moments, counters, storage formats.

A parameter is kept in one of two formats. Plain: `value` is float32, and `low`, where there is one,
is its bfloat16 copy for matrix products. Split: `value` is bfloat16 and `remainder` int16, and
together they hold the same float32 in 4 bytes, with the copy for matrix products for free:

    bits(float32) = (bits(value) << 16) + remainder        -2^15 <= remainder < 2^15

so `value` is the float32 rounded to nearest, ties away from zero in magnitude of the bits.
Moments are float32, or bfloat16 rounded stochastically: their expectation is then the float32
moment, while rounding to nearest would never let a second moment decay by a factor of 0.999.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Weight:
    """A parameter and its Adam moments; every tensor has the parameter's shape.

    Attributes:
        value: float32, or bfloat16 if `remainder` is set.
        first, second: Adam's moments, both float32 or both bfloat16 (stochastic rounding).
        low: bfloat16 copy of a float32 `value`, kept up to date; optional.
        remainder: int16 lower half of a split master; optional.
    """

    value: Tensor
    first: Tensor
    second: Tensor
    low: Tensor | None = None
    remainder: Tensor | None = None

    def master(self) -> Tensor:
        """The parameter in float32: `value` itself, or joined from its halves."""
        return self.value if self.remainder is None else join(self.value, self.remainder)

    def product(self) -> Tensor:
        """What matrix products should read: the bfloat16 copy where there is one."""
        return self.value if self.low is None else self.low

    def one(self, number: int) -> "Weight":
        """Of several that are stacked, every tensor with their number before its shape: a view of one."""
        return Weight(*(None if t is None else t[number] for t in vars(self).values()))  # type: ignore[arg-type]

    def store(self, master: Tensor) -> None:
        """Write a new float32 value [shape of the parameter], in place, in every format kept."""
        if self.remainder is None:
            self.value.copy_(master)
        else:
            value, remainder = split(master)
            self.value.copy_(value)
            self.remainder.copy_(remainder)
        if self.low is not None:
            self.low.copy_(master)


@dataclass
class Latents:
    """Parameters of a linear SAE, updated in place: x_hat = z w_dec + b_dec.

    Attributes:
        w_enc, w_dec: [F, D], both in one format. b_enc: [F]. b_dec: [D].
        step: 0-dim float32, the number of Adam steps done.
        last_step: [F] int32 or None. If set, rows of latents that are inactive in a step are left
            alone and caught up when they are next active ("lazy" Adam): exact because beta1 must be 0,
            so an inactive row neither moves nor keeps a first moment, and its second moment only decays.
            `settle` catches up every row.
    """

    w_enc: Weight
    b_enc: Weight
    w_dec: Weight
    b_dec: Weight
    step: Tensor
    last_step: Tensor | None = None

    def written(self) -> list[Tensor]:
        """Every tensor that a step changes."""
        weights = (self.w_enc, self.b_enc, self.w_dec, self.b_dec)
        kept = [t for weight in weights for t in vars(weight).values()]
        return [t for t in (*kept, self.step, self.last_step) if t is not None]

    def one(self, number: int) -> "Latents":
        """Of several SAEs' that are stacked: a view of one."""
        w_enc, b_enc, w_dec, b_dec = (
            weight.one(number) for weight in (self.w_enc, self.b_enc, self.w_dec, self.b_dec)
        )
        last_step = None if self.last_step is None else self.last_step[number]
        return Latents(w_enc, b_enc, w_dec, b_dec, self.step[number], last_step)


@dataclass(frozen=True)
class AdamStep:
    """Hyperparameters of one Adam step (Kingma & Ba 2015, arXiv:1412.6980), no weight decay."""

    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    def __post_init__(self) -> None:
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ValueError(f"beta1 is {self.beta1} and beta2 {self.beta2}: expected numbers in [0, 1)")
        if not (math.isfinite(self.lr) and self.eps >= 0):
            raise ValueError(
                f"lr is {self.lr} and eps {self.eps}: expected a finite number, and one of at least 0"
            )


@dataclass
class Counters:
    """Feature statistics updated in the same pass; [F] each, on the device of the latents.

    Attributes:
        counts: int64 rows on which a latent fired.
        sums: int64 summed values in units of 2^-20, each value rounded to the nearest unit, ties to even:
            exact as long as a sum stays below 2^43.
        maxima: float32 largest value; from 0 on, which is what empty slots hold.
        last_fired: int64; set to `tokens` where a latent fired.
        tokens: rows seen, this batch included.
    Values that are not finite count as zero.
    """

    counts: Tensor
    sums: Tensor
    maxima: Tensor
    last_fired: Tensor
    tokens: int

    def written(self) -> list[Tensor]:
        """Every tensor that a step changes."""
        return [self.counts, self.sums, self.maxima, self.last_fired]

    def one(self, number: int) -> "Counters":
        """Of several SAEs' that are stacked: a view of one."""
        counts, sums, maxima, last_fired = (
            t[number] for t in (self.counts, self.sums, self.maxima, self.last_fired)
        )
        return Counters(counts, sums, maxima, last_fired, self.tokens)


FIXED_POINT = 2**20
"""Units per 1.0 of `Counters.sums`."""


@dataclass(frozen=True)
class DeadGrads:
    """Gradients of another loss (AuxK) in some latents' rows, added to those of the reconstruction.

    Attributes:
        latents: [F_dead] int64, distinct and in range. Checked on a CPU only, as a GPU would have to be
            waited for; there a latent that is named twice gets one or the other gradient, or some of both.
        w_enc, w_dec: [F_dead, D]. b_enc: [F_dead].
    """

    latents: Tensor
    w_enc: Tensor
    b_enc: Tensor
    w_dec: Tensor


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """float32 -> bfloat16 value and int16 remainder of the same shape; lossless for finite numbers."""
    bits = master.contiguous().view(torch.int32)
    remainder = bits.to(torch.int16)  # the lower 16 bits, as a signed number
    upper = (bits - remainder.int()) >> 16
    return upper.to(torch.int16).view(torch.bfloat16), remainder


def join(value: Tensor, remainder: Tensor) -> Tensor:
    """The float32 that `split` took apart."""
    upper = value.contiguous().view(torch.int16).int() << 16
    return (upper + remainder.int()).view(torch.float32)


def noise(shape: torch.Size, step: Tensor, salt: int, start: int = 0) -> Tensor:
    """Integers in 0..2^16-1 for stochastic rounding: a hash of (element, step, salt), int32 of `shape`.

    Elements are numbered in order from `start`, for a block of a larger tensor.

    The element number is hashed twice with the step between, by the finalizer of MurmurHash3 (Austin
    Appleby, public domain), in wrapping 32-bit arithmetic: a kernel gives the same bits.
    """
    elements = torch.arange(start, start + shape.numel(), device=step.device).reshape(shape)
    key = (step.long() * 0x9E3779B1 + salt) & 0xFFFFFFFF
    return (_mix(_mix(elements & 0xFFFFFFFF) ^ key) >> 16).int()


def _mix(h: Tensor) -> Tensor:
    """MurmurHash3's 32-bit finalizer on int64 tensors that hold 32-bit unsigned numbers."""
    h = h ^ (h >> 16)
    h = (h * 0x85EBCA6B) & 0xFFFFFFFF
    h = h ^ (h >> 13)
    h = (h * 0xC2B2AE35) & 0xFFFFFFFF
    return h ^ (h >> 16)


def round_stochastically(exact: Tensor, noise: Tensor) -> Tensor:
    """float32 -> bfloat16: up with the probability of the fraction cut off; `noise` from `noise`."""
    bits = exact.contiguous().view(torch.int32) + noise
    return (bits >> 16).to(torch.int16).view(torch.bfloat16)
