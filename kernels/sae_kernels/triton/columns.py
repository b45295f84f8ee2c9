"""Sums over all rows of a matrix in a fixed order, in two stages: for the gradient of b_dec."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae_kernels.triton.formats import PLAIN, SPLIT, load_master
from sae_kernels.triton.launch import Case, Shape
from sae_kernels.triton.lists import flag
from sae_kernels.triton.tiles import NUM_STAGES, ROW_TYPES, Tile, case, column_tile

MIN_ROWS = 64
MAX_PARTIALS = 1024
SUM_TILE = Tile(rows=64, columns=32, warps=4)


def column_sums(
    rows: Tensor, remainder: Tensor | None = None, weights: Tensor | None = None, many: int = 1
) -> Tensor:
    """Partial sums over rows [..., D], times weights [...] if given: [many, at most MAX_PARTIALS, D] float32.

    The rows are those of `many` in turn, each with sums of its own. With `remainder`, they are the int16 bits
    of a split master's upper half."""
    n, d = rows.shape[:-1].numel() // many, rows.shape[-1]
    tile = column_tile(d)
    each = max(MIN_ROWS, triton.cdiv(n, MAX_PARTIALS))
    partials = torch.empty(many, triton.cdiv(n, each), d, dtype=torch.float32, device=rows.device)
    if partials.numel():
        _column_sums[(partials.shape[1], triton.cdiv(d, tile.columns), many)](
            *(rows, remainder, weights, partials, n, d, each),
            FORMAT=PLAIN if remainder is None else SPLIT,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            num_warps=tile.warps,
            num_stages=NUM_STAGES,
        )
    return partials


def add_partials(
    plus: Tensor, scale: float, minus: Tensor | None = None, broken: Tensor | None = None
) -> Tensor:
    """scale * (sum of plus) - (sum of minus), over rows of each of many: [many * D] float32.

    Sets `broken` [many] where it is not finite."""
    many, num_plus, d = plus.shape
    num_minus = 0 if minus is None else minus.shape[1]
    out = torch.empty(many * d, dtype=torch.float32, device=plus.device)
    if d:
        _add_partials[(triton.cdiv(d, SUM_TILE.columns), many)](
            *(out, plus, minus, broken, float(scale), num_plus, num_minus, d),
            ROWS=SUM_TILE.rows,
            COLUMNS=SUM_TILE.columns,
            num_warps=SUM_TILE.warps,
            num_stages=NUM_STAGES,
        )
    return out


@triton.jit
def _column_sums(
    x, remainder, weights, partials, n, d, each,
    FORMAT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    sae = tl.program_id(2).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    begin = sae * n + tl.program_id(0) * each
    end = tl.minimum(begin + each, (sae + 1) * n)
    total = tl.zeros([COLUMNS], tl.float32)
    for start in range(begin, end, ROWS):
        at = start + tl.arange(0, ROWS)
        mask = (at < end)[:, None] & (columns < d)[None, :]
        weight = tl.full([ROWS], 1.0, tl.float32)
        if weights is not None:
            weight = tl.load(weights + at, mask=at < end, other=0)
            mask = mask & (weight != 0)[:, None]  # latents without a gradient are not read
        rows = load_master(x, remainder, at[:, None] * d + columns[None, :], mask, FORMAT)
        total += tl.sum(weight[:, None] * rows, axis=0)
    partial = sae * tl.num_programs(0) + tl.program_id(0)
    tl.store(partials + partial * d + columns, total, mask=columns < d)


@triton.jit
def _add_partials(
    out, plus, minus, broken, scale, num_plus, num_minus, d, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    sae = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = scale * _sum_rows(plus + sae * num_plus * d, num_plus, columns, d, ROWS, COLUMNS)
    if minus is not None:
        total -= _sum_rows(minus + sae * num_minus * d, num_minus, columns, d, ROWS, COLUMNS)
    tl.store(out + sae * d + columns, total, mask=columns < d)
    if broken is not None:
        flag(broken + sae, (tl.abs(total) < float("inf")) | (columns >= d))


@triton.jit
def _sum_rows(rows, n, columns, d, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, n, ROWS):
        at = start + tl.arange(0, ROWS)
        mask = (at < n)[:, None] & (columns < d)[None, :]
        total += tl.load(rows + at[:, None] * d + columns[None, :], mask=mask, other=0)
    return tl.sum(total, axis=0)


def cases(shape: Shape) -> list[Case]:
    tile = column_tile(shape.d)
    plain = {"FORMAT": PLAIN}
    return [
        *(case(_column_sums, tile, plain, x=x, remainder=None, weights=None) for x in ROW_TYPES),
        case(_column_sums, tile, plain, x="*fp32", remainder=None),
        case(_column_sums, tile, {"FORMAT": SPLIT}, x="*i16", remainder="*i16"),
        case(_add_partials, SUM_TILE, {}),
        case(_add_partials, SUM_TILE, {}, minus=None),
        case(_add_partials, SUM_TILE, {}, minus=None, broken=None),
    ]
