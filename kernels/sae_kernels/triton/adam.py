"""The kernels of the step that write weights: gradients, which stay in registers, Adam, formats.

One program per latent adds up its gradients (`lists`), removes what only stretches its row of w_dec,
makes the Adam step in both of its rows and writes them, with their moments, in the formats that are kept.
The row of w_dec is written as Adam leaves it, column block after column block, and read back (from L2) to
be divided by its norm, since no program holds a whole row.

SAEs of one shape share launches: their latents follow one another in all that is read and written, and each
has a row of the control vector. Elements are numbered within their SAE, whose moments are thus rounded as if
it were alone.
"""

from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae_kernels.latents import AdamStep, Latents, Weight
from sae_kernels.triton.formats import (
    MOMENT_TYPES,
    PLAIN,
    SPLIT,
    STORED_TYPES,
    format_of,
    load_master,
    load_moment,
    master_of,
    store_master,
    store_moment,
    tensors_of,
)
from sae_kernels.triton.guard import FACTOR, KEEP, RATE, ROOT, STEP
from sae_kernels.triton.launch import Case, Shape, limited
from sae_kernels.triton.lists import sum_latent
from sae_kernels.triton.tiles import NUM_STAGES, PIECE, ROW_TYPES, Tile, case, column_tile, row_tile

VECTOR_BLOCK = 1024
# Salts of the noise: the number of the parameter, as in the reference.
SALT_B_ENC, SALT_B_DEC = 1, 3
_SALT_W_ENC, _SALT_W_DEC = tl.constexpr(0), tl.constexpr(2)


def square_gradients(gradients: tuple[Any, ...], w_dec: Weight) -> Tensor:
    """Sums of squares of parts of the latents' gradients, [latents of all SAEs, parts] float32."""
    f, d = w_dec.value.shape[:-1].numel(), w_dec.value.shape[-1]
    tile, (value, remainder, form) = column_tile(d), master_of(w_dec)
    squares = torch.empty(f, triton.cdiv(d, tile.columns), dtype=torch.float32, device=w_dec.value.device)
    _square_gradients[squares.shape](
        *(*gradients, value, remainder, squares, d),
        DEC=form,
        PIECE=PIECE,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        num_warps=tile.warps,
        num_stages=NUM_STAGES,
    )
    return squares


def update_rows(
    gradients: tuple[Any, ...], control: Tensor, catch_up: Tensor | None, adam: AdamStep, latents: Latents
) -> Tensor:
    """The step in w_enc and w_dec; sums of squares of the gradients of each latent, [SAEs, F] float32."""
    w_enc, w_dec = latents.w_enc, latents.w_dec
    many, d = len(control), w_dec.value.shape[-1]
    f = w_dec.value.shape[:-1].numel() // many
    tile = row_tile(d, gradients[0].element_size(), lazy=catch_up is not None)
    squares = torch.empty(many, f, dtype=torch.float32, device=control.device)
    _update[(f, many)](
        *(*gradients, control, catch_up, *_betas(adam), *tensors_of(w_enc), *tensors_of(w_dec), squares, d),
        ENC=format_of(w_enc),
        DEC=format_of(w_dec),
        MANY=many > 1,  # finding one's SAE takes registers: 224 instead of 128 on sm_80 in places
        PIECE=PIECE,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        num_warps=tile.warps,
        num_stages=NUM_STAGES,
        **limited(tile.registers),
    )
    return squares


def _betas(adam: AdamStep) -> tuple[float, float, float, float, float]:
    return adam.beta1, 1 - adam.beta1, adam.beta2, 1 - adam.beta2, adam.eps


def update_vector(
    weight: Weight,
    grad: Tensor,
    control: Tensor,
    adam: AdamStep,
    salt: int,
    starts: Tensor | None = None,
    lookup: Tensor | None = None,
    catch_up: Tensor | None = None,
    last_step: Tensor | None = None,
) -> None:
    """One step of a bias; with `catch_up` only of active latents, whose last step is then this one."""
    size = len(grad) // len(control)
    if size:
        _update_bias[(triton.cdiv(size, VECTOR_BLOCK), len(control))](
            *(grad, control, starts, lookup, catch_up, last_step, *_betas(adam), *tensors_of(weight), size),
            SALT=salt,
            FORMAT=format_of(weight),
            BLOCK=VECTOR_BLOCK,
            num_warps=4,
            num_stages=NUM_STAGES,
        )


@triton.jit
def _gradients(
    a, b, rows, z, dz, begin, end, piece, part_a, part_b, dead_row, dead_dec, dead_enc, scale, columns, d,
    PIECE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """d_w_dec and d_w_enc of one latent, [COLUMNS] each."""
    dec, enc = sum_latent(
        a, b, rows, z, dz, begin, end, piece, part_a, part_b, columns, d, PIECE, ROWS, COLUMNS
    )
    dec *= scale
    if dead_dec is not None:
        mask = (columns < d) & (dead_row >= 0)
        dec += tl.load(dead_dec + dead_row * d + columns, mask=mask, other=0).to(tl.float32)
        enc += tl.load(dead_enc + dead_row * d + columns, mask=mask, other=0).to(tl.float32)
    return dec, enc


@triton.jit
def _square_gradients(
    a, b, rows, z, dz, starts, first_piece, part_a, part_b, lookup, dead_dec, dead_enc, along, scale,
    dec_value, dec_extra, squares, d,
    DEC: tl.constexpr, PIECE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The sum of squares of a latent's gradients in w_dec and w_enc."""
    latent = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(starts + latent), tl.load(starts + latent + 1)
    piece = tl.load(first_piece + latent)
    dead_row = latent * 0 - 1
    if lookup is not None:
        dead_row = tl.load(lookup + latent).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], tl.float32)
    if (end > begin) | (dead_row >= 0):
        dec, enc = _gradients(
            a, b, rows, z, dz, begin, end, piece, part_a, part_b, dead_row, dead_dec, dead_enc, scale,
            columns, d, PIECE, ROWS, COLUMNS,
        )  # fmt: skip
        if along is not None:
            w_dec = load_master(dec_value, dec_extra, latent * d + columns, columns < d, DEC)
            dec -= tl.load(along + latent) * w_dec
        total += dec * dec + enc * enc
    tl.store(squares + latent * tl.num_programs(1) + tl.program_id(1), tl.sum(total))


@triton.jit
def _adam(
    old, grad, first, second, at, mask, element, control, catch_up, b1, rest1, b2, rest2, eps,
    salt: tl.constexpr,
):  # fmt: skip
    """The moments' step, and the parameter's, which is returned."""
    grad = grad * tl.load(control + FACTOR)
    v = load_moment(second, at, mask)
    if catch_up is None:
        m = b1 * load_moment(first, at, mask) + rest1 * grad
    else:  # lazy steps: beta1 is 0
        m = grad
        v = v * catch_up
    v = b2 * v + rest2 * (grad * grad)
    step = tl.load(control + STEP)
    store_moment(first, m, at, mask, step, 2 * salt, element)
    store_moment(second, v, at, mask, step, 2 * salt + 1, element)
    return old - tl.load(control + RATE) * m / (tl.sqrt(v) / tl.load(control + ROOT) + eps)


@triton.jit
def _update(
    a, b, rows, z, dz, starts, first_piece, part_a, part_b, lookup, dead_dec, dead_enc, along, scale,
    control, catch_up, b1, rest1, b2, rest2, eps,
    enc_value, enc_extra, enc_first, enc_second, dec_value, dec_extra, dec_first, dec_second, squares, d,
    ENC: tl.constexpr, DEC: tl.constexpr, PIECE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    MANY: tl.constexpr,
):  # fmt: skip
    """One latent's rows: gradients, projection if `along`, Adam, unit norm if `along`."""
    number = tl.program_id(0).to(tl.int64)
    latent = number  # of those of all SAEs
    if MANY:
        control += tl.program_id(1) * 5
        latent += tl.program_id(1).to(tl.int64) * tl.num_programs(0)
    begin, end = tl.load(starts + latent), tl.load(starts + latent + 1)
    piece = tl.load(first_piece + latent)
    dead_row = latent * 0 - 1
    if lookup is not None:
        dead_row = tl.load(lookup + latent).to(tl.int64)
    working = tl.load(control + KEEP) != 0
    late = None
    if catch_up is not None:
        working = working & ((end > begin) | (dead_row >= 0))
        late = tl.load(catch_up + latent)
    square, length = tl.zeros([COLUMNS], tl.float32), tl.zeros([COLUMNS], tl.float32)
    if working:
        for start in range(0, d, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            mask = columns < d
            at = latent * d + columns
            element = number * d + columns
            dec, enc = _gradients(
                a, b, rows, z, dz, begin, end, piece, part_a, part_b, dead_row, dead_dec, dead_enc, scale,
                columns, d, PIECE, ROWS, COLUMNS,
            )  # fmt: skip
            old = load_master(enc_value, enc_extra, at, mask, ENC)
            new = _adam(
                old, enc, enc_first, enc_second, at, mask, element, control, late, b1, rest1, b2, rest2, eps,
                _SALT_W_ENC,
            )  # fmt: skip
            store_master(enc_value, enc_extra, new, at, mask, ENC)
            old = load_master(dec_value, dec_extra, at, mask, DEC)
            if along is not None:
                dec -= tl.load(along + latent) * old
            square += dec * dec + enc * enc
            new = _adam(
                old, dec, dec_first, dec_second, at, mask, element, control, late, b1, rest1, b2, rest2, eps,
                _SALT_W_DEC,
            )  # fmt: skip
            length += tl.where(mask, new * new, 0.0)
            store_master(dec_value, dec_extra, new, at, mask, DEC)
        if along is not None:
            # The smallest normal float32, for a row of zeros.
            norm = tl.maximum(tl.sqrt(tl.sum(length)), 1.1754943508222875e-38)
            tl.debug_barrier()  # threads read back what others of their program have written
            for start in range(0, d, COLUMNS):
                columns = start + tl.arange(0, COLUMNS)
                mask = columns < d
                at = latent * d + columns
                new = load_master(dec_value, dec_extra, at, mask, DEC) / norm
                store_master(dec_value, dec_extra, new, at, mask, DEC)
    tl.store(squares + latent, tl.sum(square))


@triton.jit
def _update_bias(
    grad, control, starts, lookup, catch_up, last_step, b1, rest1, b2, rest2, eps,
    value, extra, first, second, size, SALT: tl.constexpr, FORMAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sae = tl.program_id(1).to(tl.int64)
    control += sae * 5
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = number < tl.where(tl.load(control + KEEP) != 0, size, 0)
    at = sae * size + number
    late = None
    if catch_up is not None:
        active = tl.load(starts + at, mask=mask, other=0) < tl.load(starts + at + 1, mask=mask, other=0)
        if lookup is not None:
            active = active | (tl.load(lookup + at, mask=mask, other=-1) >= 0)
        mask = mask & active
        late = tl.load(catch_up + at, mask=mask, other=1)
        tl.store(last_step + at, tl.load(control + STEP).to(tl.int32), mask=mask)
    old = load_master(value, extra, at, mask, FORMAT)
    g = tl.load(grad + at, mask=mask, other=0)
    new = _adam(old, g, first, second, at, mask, number, control, late, b1, rest1, b2, rest2, eps, SALT)
    store_master(value, extra, new, at, mask, FORMAT)


def cases(shape: Shape) -> list[Case]:
    """Every format of weights and moments, with and without dead rows, projection and lazy steps."""
    column, found = column_tile(shape.d), []
    not_dead = dict.fromkeys(("lookup", "dead_dec", "dead_enc"))
    for rows, dead, unit in product(ROW_TYPES, ({}, not_dead), ({}, {"along": None})):
        given = {"a": rows, "b": rows, **dead, **unit}
        for form in (PLAIN, SPLIT):
            value, extra = STORED_TYPES[form]
            types = given | {"dec_value": value, "dec_extra": extra}
            found.append(case(_square_gradients, column, {"DEC": form}, **types))
        for (form, stored), moment, lazy in product(STORED_TYPES.items(), MOMENT_TYPES, (True, False)):
            types = given if lazy else given | {"catch_up": None}
            for of in ("enc", "dec"):
                types = types | {f"{of}_value": stored[0], f"{of}_extra": stored[1]}
                types |= {f"{of}_first": moment, f"{of}_second": moment}
            tile = row_tile(shape.d, 2 if rows == "*bf16" else 4, lazy)
            for many in (False, True):
                constants = {"ENC": form, "DEC": form, "MANY": many}
                found.append(case(_update, tile, constants, **types))
    idle = {"starts": None, "lookup": None, "catch_up": None, "last_step": None}
    for (form, (value, extra)), moment in product(STORED_TYPES.items(), MOMENT_TYPES):
        weight = {"value": value, "extra": extra, "first": moment, "second": moment}
        for salt, absent in ((SALT_B_ENC, {}), (SALT_B_ENC, {"lookup": None}), (SALT_B_DEC, idle)):
            constants = {"SALT": salt, "FORMAT": form, "BLOCK": VECTOR_BLOCK}
            found.append(case(_update_bias, Tile(1, 1, 4), constants, **weight, **absent))
    return found
