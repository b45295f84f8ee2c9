"""Whether a step is made, and the numbers it needs, decided on the device before anything is written."""

import struct
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae_kernels.latents import AdamStep, Latents
from sae_kernels.triton.launch import Case, Shape, on_device
from sae_kernels.triton.lists import Lists, flag
from sae_kernels.triton.tiles import NUM_STAGES, ROW_TYPES, Tile, case, column_tile

CHECK_ROWS = 64
# Places in the control vector: 1 if the step is made, factor of the gradient, lr / (1 - beta1^step),
# sqrt(1 - beta2^step), number of the step.
KEEP, FACTOR, RATE, ROOT, STEP = (tl.constexpr(i) for i in range(5))


def check_rows(x: Tensor, lists: Lists) -> None:
    many, d = len(lists.broken), x.shape[1]
    n, tile = len(x) // many, column_tile(d)
    if n:
        _check[(triton.cdiv(n, CHECK_ROWS), triton.cdiv(d, tile.columns), many)](
            *(x, lists.row_used, lists.broken, n, d),
            EACH=CHECK_ROWS,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            num_warps=tile.warps,
            num_stages=NUM_STAGES,
        )


def decide(
    latents: Latents,
    adams: Sequence[AdamStep],
    clip: float | None,
    norm: Tensor | None,
    clip_norm: Tensor | None,
    broken: Tensor,
) -> Tensor:
    """Decides which SAEs' step is made, counts it, and gives the numbers that it needs [SAEs, 5] float32."""
    control = torch.empty(len(broken), 5, dtype=torch.float32, device=broken.device)
    limited = None if clip is None else norm if clip_norm is None else clip_norm.float().contiguous()
    rates = on_device([float(adam.lr) for adam in adams], torch.float32, broken.device)
    _decide[(len(broken),)](
        *(control, latents.step, broken, norm, limited, 0.0 if clip is None else float(clip)),
        *(rates, *_halves(adams[0].beta1), *_halves(adams[0].beta2)),
        num_warps=1,
        num_stages=NUM_STAGES,
    )
    return control


def _halves(number: float) -> tuple[float, float]:
    """Two float32 whose sum is the number to 48 bits: 1 - 0.999 loses 15 of 24."""
    (upper,) = struct.unpack("f", struct.pack("f", number))
    return upper, number - upper


@triton.jit
def _check(x, row_used, broken, n, d, EACH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    sae = tl.program_id(2).to(tl.int64)
    x += sae * n * d
    row_used += sae * n
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    fine = tl.full([ROWS, COLUMNS], True, tl.int1)
    for start in range(0, EACH, ROWS):
        row = tl.program_id(0).to(tl.int64) * EACH + start + tl.arange(0, ROWS)
        used = tl.load(row_used + row, mask=row < n, other=0) != 0
        mask = used[:, None] & (columns < d)[None, :]
        value = tl.load(x + row[:, None] * d + columns[None, :], mask=mask, other=0).to(tl.float32)
        fine = fine & (tl.abs(value) < float("inf"))
    flag(broken + sae, fine)


@triton.jit
def _decide(
    control, step, broken, norm, limited, clip, rates, beta1_upper, beta1_lower, beta2_upper, beta2_lower
):
    sae = tl.program_id(0)
    control += sae * 5
    step += sae
    keep = tl.load(broken + sae) == 0
    if norm is not None:
        keep = tl.abs(tl.load(norm + sae)) < float("inf")
    factor = 1.0
    if limited is not None:
        limit = tl.load(limited + sae)
        factor = tl.minimum(clip / (limit + 1e-6), 1.0)
        keep = keep & (limit == limit)
    new = tl.load(step) + keep.to(tl.float32)
    tl.store(step, new)
    tl.store(control + KEEP, keep.to(tl.float32))
    tl.store(control + FACTOR, factor)
    zero = tl.zeros([], tl.float64)
    left1 = 1.0 - _power(zero + beta1_upper + beta1_lower, new)
    left2 = 1.0 - _power(zero + beta2_upper + beta2_lower, new)
    tl.store(control + RATE, (tl.load(rates + sae) / left1).to(tl.float32))
    tl.store(control + ROOT, tl.sqrt(left2).to(tl.float32))
    tl.store(control + STEP, new)


@triton.jit
def _power(base, exponent):
    """base ** exponent for a whole number below 2^25, all that a float32 counter can reach."""
    left = exponent.to(tl.int32)
    power = base * 0.0 + 1.0
    for _ in tl.static_range(25):
        power = tl.where(left & 1 == 1, power * base, power)
        base *= base
        left = left >> 1
    return power


def cases(shape: Shape) -> list[Case]:
    one = Tile(1, 1, 1)
    return [
        *(case(_check, column_tile(shape.d), {"EACH": CHECK_ROWS}, x=x) for x in ROW_TYPES),
        case(_decide, one, {}),
        case(_decide, one, {}, norm=None),
        case(_decide, one, {}, norm=None, limited=None),
    ]
