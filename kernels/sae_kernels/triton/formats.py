"""How kernels read and write parameters and moments in the formats of `latents`, bit for bit.

bfloat16 is passed as its int16 bits: rounding is then the same on every device, and in the interpreter, which
cannot do it. The kernel at the end catches up moments that lazy steps have left alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from sae_kernels.latents import AdamStep, Latents, Weight
from sae_kernels.triton.launch import Case, Shape
from sae_kernels.triton.tiles import NUM_STAGES, case, column_tile

PLAIN, LOW, SPLIT = 0, 1, 2  # float32; float32 and a bfloat16 copy; upper and lower half
_LOW, _SPLIT = tl.constexpr(LOW), tl.constexpr(SPLIT)
# How a kernel is compiled for each of them: types of value and of the other half or copy.
STORED_TYPES = {PLAIN: ("*fp32", None), LOW: ("*fp32", "*i16"), SPLIT: ("*i16", "*i16")}
MOMENT_TYPES = ("*fp32", "*i16")


def settle(step: Tensor, latents: Latents, adam: AdamStep) -> None:
    if latents.last_step is None:
        return
    with torch.cuda.device_of(step):
        missed = step - latents.last_step
        decay = adam.beta2**missed
        for salt, weight in enumerate((latents.w_enc, latents.b_enc, latents.w_dec)):
            f, d = weight.value.shape if weight.value.dim() == 2 else (len(weight.value), 1)
            tile = column_tile(d)
            _settle[(f,)](
                *(bits_of(weight.first), bits_of(weight.second), missed, decay, step, d),
                SALT=salt + 16,
                COLUMNS=tile.columns,
                num_warps=tile.warps,
                num_stages=NUM_STAGES,
            )
        latents.last_step.copy_(step)
        increment_version(latents.written())


def bits_of(tensor: Tensor) -> Tensor:
    """bfloat16 as int16: kernels round it themselves, alike on every device and in the interpreter."""
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


def tensors_of(weight: Weight) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Value, the other half or copy if there is one, and the moments."""
    extra = weight.remainder if weight.low is None else bits_of(weight.low)
    return bits_of(weight.value), extra, bits_of(weight.first), bits_of(weight.second)


def master_of(weight: Weight) -> tuple[Tensor, Tensor | None, int]:
    """What a kernel that only reads a parameter is given: value, lower half if there is one, format."""
    return bits_of(weight.value), weight.remainder, PLAIN if weight.remainder is None else SPLIT


def format_of(weight: Weight) -> int:
    if weight.remainder is not None:
        return SPLIT
    return PLAIN if weight.low is None else LOW


@triton.jit
def load_master(value, extra, at, mask, FORMAT: tl.constexpr):
    """float32 parameters: as they are, or joined from their halves as `latents.join` does."""
    if FORMAT == _SPLIT:
        upper = tl.load(value + at, mask=mask, other=0).to(tl.int32) << 16
        return (upper + tl.load(extra + at, mask=mask, other=0).to(tl.int32)).to(tl.float32, bitcast=True)
    else:
        return tl.load(value + at, mask=mask, other=0).to(tl.float32)


@triton.jit
def store_master(value, extra, new, at, mask, FORMAT: tl.constexpr):
    """What `Weight.store` does."""
    bits = new.to(tl.int32, bitcast=True)
    if FORMAT == _SPLIT:
        remainder = bits.to(tl.int16)
        tl.store(value + at, ((bits - remainder.to(tl.int32)) >> 16).to(tl.int16), mask=mask)
        tl.store(extra + at, remainder, mask=mask)
    else:
        tl.store(value + at, new, mask=mask)
        if FORMAT == _LOW:  # to nearest, ties to even
            tl.store(extra + at, ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16), mask=mask)


@triton.jit
def load_moment(moment, at, mask):
    stored = tl.load(moment + at, mask=mask, other=0)
    if moment.dtype.element_ty == tl.int16:
        return (stored.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return stored


@triton.jit
def store_moment(moment, exact, at, mask, step, salt, element):
    """As it is, or rounded to bfloat16 with the noise of (element, step, salt): see `latents.noise`."""
    if moment.dtype.element_ty == tl.int16:
        key = (step.to(tl.int64) * 0x9E3779B1 + salt).to(tl.uint32)
        noise = _mix(_mix(element.to(tl.uint32)) ^ key) >> 16
        bits = exact.to(tl.int32, bitcast=True) + noise.to(tl.int32)
        tl.store(moment + at, (bits >> 16).to(tl.int16), mask=mask)
    else:
        tl.store(moment + at, exact, mask=mask)


@triton.jit
def _mix(h):
    """`latents._mix`: MurmurHash3's finalizer."""
    h = h ^ (h >> 16)
    h = h * 0x85EBCA6B
    h = h ^ (h >> 13)
    h = h * 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def _settle(first, second, missed, decay, step, d, SALT: tl.constexpr, COLUMNS: tl.constexpr):
    latent = tl.program_id(0).to(tl.int64)
    if tl.load(missed + latent) > 0:
        for start in range(0, d, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            at = latent * d + columns
            exact = load_moment(second, at, columns < d) * tl.load(decay + latent)
            zero = tl.zeros([COLUMNS], tl.float32).to(first.dtype.element_ty)
            tl.store(first + at, zero, mask=columns < d)
            store_moment(second, exact, at, columns < d, tl.load(step), SALT, at)


def cases(shape: Shape) -> list[Case]:
    """Moments of a matrix, and those of b_enc, a matrix of one column."""
    return [
        case(_settle, column_tile(d), {"SALT": 16}, first=moment, second=moment)
        for d in (shape.d, 1)
        for moment in MOMENT_TYPES
    ]
