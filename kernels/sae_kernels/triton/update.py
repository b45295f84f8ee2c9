"""Gradients of the weights on a GPU: sums over each latent's rows, in a fixed order and without atomics.

One program writes some columns of one latent's row; `lists` has the sorted slots and what is summed of them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae_kernels.triton.columns import add_partials, column_sums
from sae_kernels.triton.decode import gather_dot
from sae_kernels.triton.launch import Case, Shape
from sae_kernels.triton.lists import Lists, list_slots, scan, sum_latent, sum_pieces
from sae_kernels.triton.tiles import NUM_STAGES, PIECE, ROW_TYPES, case, column_tile, same_dtype


def segment_rows(
    values: Tensor, indices: Tensor, rows: Tensor, d_sae: int, offsets: Tensor | None = None
) -> Tensor:
    with torch.cuda.device_of(rows):
        rows = rows.contiguous()
        lists = list_slots(values, indices, len(rows), d_sae, offsets, None, 1.0)
        return _sum_lists(lists, rows, None, 1.0)[0]


def sparse_grad(
    x: Tensor,
    g: Tensor,
    values: Tensor,
    indices: Tensor,
    w_dec: Tensor,
    scale: float = 1.0,
    dots: Tensor | None = None,
    offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    with torch.cuda.device_of(x):
        x, g = same_dtype(x, g)
        if dots is None:
            dots = gather_dot(g, indices, w_dec, offsets)
        lists = list_slots(values, indices, len(x), len(w_dec), offsets, dots, scale)
        d_w_dec, d_w_enc = _sum_lists(lists, g, x, scale)
        assert d_w_enc is not None
        d_b_enc, _ = scan(lists)
        d_b_dec = add_partials(column_sums(g), scale)
        return (scale * dots.float()).masked_fill(values == 0, 0), d_w_enc, d_w_dec, d_b_enc, d_b_dec


def _sum_lists(lists: Lists, a: Tensor, b: Tensor | None, scale_a: float) -> tuple[Tensor, Tensor | None]:
    """scale_a * sums of z * a, and sums of dz * b, over each latent's list: [F, D] float32 each."""
    d, tile = a.shape[1], column_tile(a.shape[1])
    part_a, part_b = sum_pieces(lists, a, b)
    out_a = torch.empty(lists.num_latents, d, dtype=torch.float32, device=a.device)
    out_b = None if b is None else torch.empty_like(out_a)
    if out_a.numel():
        _sum_lists_kernel[(lists.num_latents, triton.cdiv(d, tile.columns))](
            *(a, b, lists.rows, lists.z, lists.dz, lists.starts, lists.first_piece, part_a, part_b),
            *(out_a, out_b, float(scale_a), d),
            PIECE=PIECE,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            num_warps=tile.warps,
            num_stages=NUM_STAGES,
        )
    return out_a, out_b


@triton.jit
def _sum_lists_kernel(
    a,
    b,
    rows,
    z,
    dz,
    starts,
    first_piece,
    part_a,
    part_b,
    out_a,
    out_b,
    scale_a,
    d,
    PIECE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    latent = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    begin, end = tl.load(starts + latent), tl.load(starts + latent + 1)
    piece = tl.load(first_piece + latent)
    total_a, total_b = sum_latent(
        a, b, rows, z, dz, begin, end, piece, part_a, part_b, columns, d, PIECE, ROWS, COLUMNS
    )
    place = latent * d + columns
    tl.store(out_a + place, scale_a * total_a, mask=columns < d)
    if b is not None:
        tl.store(out_b + place, total_b, mask=columns < d)


def cases(shape: Shape) -> list[Case]:
    """Both sums, and one; the latter also over rows of one column, as for the gradient of a bias."""
    alone = dict.fromkeys(("b", "part_b", "out_b", "dz"))
    return [
        *(case(_sum_lists_kernel, column_tile(shape.d), {}, a=rows, b=rows) for rows in ROW_TYPES),
        *(case(_sum_lists_kernel, column_tile(shape.d), {}, a=rows, **alone) for rows in ROW_TYPES),
        case(_sum_lists_kernel, column_tile(1), {}, a="*fp32", **alone),
    ]
