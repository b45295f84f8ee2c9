"""The step on a GPU: from the residual to the next weights, of one SAE or of several that share launches.

The part of d_w_dec along w_dec is the sum of z * dz, by what `dots` are: it needs no pass of its own.
b_enc and b_dec are vectors: their gradients are known before the weights change, and they follow after.

A step with a gradient that is not finite must leave everything as it was, which has to be known before
the first row is written. With `clip` and no `clip_norm` the norm itself comes first, in a pass of its own.
Otherwise what goes into the gradients is looked at: residual (by its column sums), the rows of x that have
codes, values, scale * dots, `dead`, and the sums of dz. That is the same but for finite numbers whose
gradient, or its square, overflows float32 (beyond 1e19): such a step is made, and its norm is infinite.

M SAEs are one of M F latents and M N rows, but for what is each one's own: sums over all rows or latents,
whether its step is made, its learning rate. Each gets the bits that it would get alone; a norm is a sum of
torch's, whose order may depend on M, and with it the last bits of a step that is clipped to its own norm.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from sae_kernels.latents import AdamStep, Counters, DeadGrads, Latents
from sae_kernels.many import numbered
from sae_kernels.triton.adam import SALT_B_DEC, SALT_B_ENC, square_gradients, update_rows, update_vector
from sae_kernels.triton.columns import add_partials, column_sums
from sae_kernels.triton.formats import master_of
from sae_kernels.triton.guard import check_rows, decide
from sae_kernels.triton.lists import add_dead, list_slots, scan, sum_pieces
from sae_kernels.triton.tiles import same_dtype


class _Options(NamedTuple):
    """What is the same for all SAEs but for the norms that they are clipped by, [M], or that of one."""

    scale: float
    centred: bool
    unit_norm: bool
    clip: float | None
    clip_norms: Tensor | None


def latent_step(
    x: Tensor,
    residual: Tensor,
    values: Tensor,
    indices: Tensor,
    dots: Tensor,
    latents: Latents,
    adam: AdamStep,
    scale: float,
    centred: bool = True,
    unit_norm: bool = True,
    clip: float | None = None,
    clip_norm: Tensor | None = None,
    dead: DeadGrads | None = None,
    counters: Counters | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    codes = values, indices, offsets, dots
    options = _Options(scale, centred, unit_norm, clip, clip_norm)
    return _step(x, residual, codes, latents, [adam], options, dead, counters)[0]


def latent_step_many(
    x: Tensor,
    residual: Tensor,
    values: Tensor,
    indices: Tensor,
    dots: Tensor,
    latents: Latents,
    adams: Sequence[AdamStep],
    scale: float,
    centred: bool,
    unit_norm: bool,
    clip: float | None,
    clip_norms: Tensor | None,
    dead: Sequence[DeadGrads | None],
    counters: Counters | None,
) -> Tensor:
    f = latents.w_dec.value.shape[1]
    codes = values.flatten(0, 1), numbered(indices, f), None, dots.flatten(0, 1)
    options = _Options(scale, centred, unit_norm, clip, clip_norms)
    rows = x.flatten(0, 1), residual.flatten(0, 1)
    return _step(*rows, codes, latents, adams, options, _joined(dead, f), counters)


def _joined(dead: Sequence[DeadGrads | None], d_sae: int) -> DeadGrads | None:
    """Those of all SAEs, in latents that are numbered as if they were one SAE's."""
    given = [(m, one) for m, one in enumerate(dead) if one is not None]
    if not given:
        return None
    latents = torch._foreach_add([one.latents for _, one in given], [m * d_sae for m, _ in given])
    rows = zip(*((one.w_enc, one.b_enc, one.w_dec) for _, one in given), strict=True)
    return DeadGrads(torch.cat(latents), *map(torch.cat, rows))


def _step(
    x: Tensor,
    residual: Tensor,
    codes: tuple[Tensor, Tensor, Tensor | None, Tensor],
    latents: Latents,
    adams: Sequence[AdamStep],
    options: _Options,
    dead: DeadGrads | None,
    counters: Counters | None,
) -> Tensor:
    """The norms [M] of M SAEs' steps, whose rows, codes and `dead` follow one another."""
    with torch.cuda.device_of(x):
        scale, centred, unit_norm, clip, clip_norms = options
        values, indices, offsets, dots = codes
        x, residual = same_dtype(x, residual)
        many, adam, w_enc, w_dec = len(adams), adams[0], latents.w_enc, latents.w_dec
        f = w_dec.value.shape[:-1].numel()
        lists = list_slots(values, indices, len(x), f, offsets, dots, scale, many)
        d_b_enc, along = scan(lists, counters)
        added = None if dead is None else add_dead(dead, w_dec, lists, d_b_enc, along)
        through_encoder = None
        if centred:  # x is centred on b_dec, which thus receives minus what the encoder's input would
            through_encoder = column_sums(*master_of(w_enc)[:2], d_b_enc, many)
        d_b_dec = add_partials(column_sums(residual, many=many), scale, through_encoder, lists.broken)
        parts = sum_pieces(lists, residual, x)
        sums = (residual, x, lists.rows, lists.z, lists.dz, lists.starts, lists.first_piece, *parts)
        gradients = (*sums, *(added or (None, None, None)), along if unit_norm else None, float(scale))

        norms = None
        if clip is not None and clip_norms is None:
            norms = _norms(square_gradients(gradients, w_dec), d_b_enc, d_b_dec, many)
        else:
            check_rows(x, lists)
        control = decide(latents, adams, clip, norms, clip_norms, lists.broken)
        catch_up = None
        if latents.last_step is not None:
            since = latents.step.view(many, 1) - latents.last_step.view(many, -1)
            catch_up = adam.beta2 ** (since - 1).clamp_min(0)
        squares = update_rows(gradients, control, catch_up, adam, latents)
        update_vector(latents.b_dec, d_b_dec, control, adam, SALT_B_DEC)
        lazy: tuple[Tensor | None, ...] = ()
        if catch_up is not None:
            lazy = lists.starts, None if added is None else added[0], catch_up, latents.last_step
        update_vector(latents.b_enc, d_b_enc, control, adam, SALT_B_ENC, *lazy)
        # Autograd cannot see what a kernel writes.
        increment_version([*latents.written(), *([] if counters is None else counters.written())])
        if norms is None:
            norms = torch.where(control[:, 0] != 0, _norms(squares, d_b_enc, d_b_dec, many), torch.nan)
        return norms


def _norms(squares: Tensor, d_b_enc: Tensor, d_b_dec: Tensor, many: int) -> Tensor:
    parts = squares, d_b_enc.square(), d_b_dec.square()
    return torch.stack([part.view(many, -1).sum(dim=1) for part in parts]).sum(dim=0).sqrt()
