"""How the kernels that go over whole rows are launched, for them and for the compile gate.

All are bound by memory. A warp has 256 columns of several rows, so that a thread has 8 columns (16 bytes
of bfloat16) of every row: sums over rows stay within threads. Many small programs share a multiprocessor and
hide each other's waiting, which is why loops are not pipelined through shared memory.
"""

from typing import Any, NamedTuple

import triton
from torch import Tensor

from sae_kernels.triton.launch import Case

PIECE = 128
"""Rows that one program adds at most: 2 MB of x and residual at D 4096."""
NUM_STAGES = 1


class Tile(NamedTuple):
    """Rows and columns that a program reads at a time; a warp to every 256 columns; a limit of registers."""

    rows: int
    columns: int
    warps: int
    registers: int | None = None


def column_tile(d: int) -> Tile:
    """For programs that share a row of d columns out among themselves."""
    return Tile(rows=8, columns=min(256, max(16, triton.next_power_of_2(d))), warps=1)


def row_tile(d: int, operand_bytes: int, lazy: bool) -> Tile:
    """For programs that walk over the whole row, a block of columns after the other.

    4 rows leave registers for the moments; 8 spill on sm_80, and so do 4 of float32 or in lazy steps. A warp:
    with 512 columns in two, Triton 3.6 spills 16 bytes on sm_90, and lists are short enough (N K / F slots)
    to be walked once for every block."""
    if operand_bytes == 2 and not lazy:
        return column_tile(d)._replace(rows=4)
    return column_tile(d)._replace(rows=2, registers=128)


def same_dtype(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Contiguous, and both float32 if they differ: kernels are compiled for rows of one dtype."""
    if a.dtype != b.dtype:
        a, b = a.float(), b.float()
    return a.contiguous(), b.contiguous()


ROW_TYPES = ("*bf16", "*fp32")  # of rows and of what is computed of them; float16 is as bfloat16

# Types of the arguments of the kernels of this file and of those that continue from it, as at training.
_TYPES = {
    **dict.fromkeys(("a", "b", "residual", "x"), "*bf16"),
    **dict.fromkeys(("order", "starts", "first_piece", "owner", "row_of_slot", "latents"), "*i64"),
    **dict.fromkeys(("counts", "sums", "last_fired"), "*i64"),
    **dict.fromkeys(("rows", "broken", "lookup", "last_step"), "*i32"),
    **dict.fromkeys(("d", "d_sae", "k", "n", "each", "size", "num_plus", "num_minus"), "i32"),
    **dict.fromkeys(("scale", "scale_a", "clip", "b1", "rest1", "b2", "rest2", "eps"), "fp32"),
    **dict.fromkeys((f"beta{i}_{half}" for i in (1, 2) for half in ("upper", "lower")), "fp32"),
    **{"row_used": "*i8", "tokens": "i64"},
}


def case(kernel: Any, tile: Tile, constants: dict[str, Any], **types: str | None) -> Case:
    """How a kernel is compiled: with its arguments' usual types, float32 pointers if none are listed.

    A type of None is an argument that is not given."""
    constants = {"ROWS": tile.rows, "COLUMNS": tile.columns, "PIECE": PIECE} | constants
    constants |= {name: None for name, kind in types.items() if kind is None}
    names = kernel.arg_names
    return Case(
        kernel,
        {name: types.get(name) or _TYPES.get(name, "*fp32") for name in names if name not in constants},
        {name: value for name, value in constants.items() if name in names},
        num_warps=tile.warps,
        num_stages=NUM_STAGES,
        register_limit=tile.registers,
        odd=tuple(name for name in ("n", "each", "num_plus", "num_minus") if name in names),
    )
