"""From the residual to the next weights in plain torch, on CUDA and CPU: one sort, two sums, then blocks.

The slots are sorted by latent once, for both weight gradients, the bias gradient, the projection and
the latents that are active. Gradients take two [F, D] buffers; everything after them goes through
blocks of latents, so that what a block reads again it finds in a cache, and temporaries stay small.
Plain float32 parameters are updated by torch's fused Adam, other formats by the formulas of `latents`.

`latent_step_with` is the frame that the CPU backend fills with its own sums. Nothing here waits for a
device: a step that must be skipped is skipped by a mask.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.adam import adam as torch_adam

from sae_kernels.contracts import accumulate_dtype
from sae_kernels.latents import (
    FIXED_POINT,
    AdamStep,
    Counters,
    DeadGrads,
    Latents,
    Weight,
    noise,
    round_stochastically,
)
from sae_kernels.slots import row_of_slot, slots_by_latent

# Elements of a block of latents: temporaries of 64 MiB on a GPU; on a CPU 4 MiB, which a cache holds.
BLOCK_ELEMENTS = {"cpu": 1 << 20}
BLOCK_ELEMENTS_ELSEWHERE = 16 << 20
TINY = torch.finfo(torch.float32).tiny

# x, g, dz, values, indices, d_sae, scale, offsets
#   -> d_w_enc, d_w_dec [F, D]; d_b_enc; sum of values * dz over each latent's slots; which latents have slots
Sums = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]


def sums_by_latent(
    x: Tensor,
    g: Tensor,
    dz: Tensor,
    values: Tensor,
    indices: Tensor,
    d_sae: int,
    scale: float,
    offsets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    order, starts = slots_by_latent(values, indices, d_sae)
    active = starts.diff() > 0
    # The empty slots form one more bag. Cutting them off would wait for the device to say how many they are.
    starts = torch.cat([starts, starts.new_full((1,), values.numel())])
    rows = row_of_slot(indices, offsets)[order]
    acc = dz.dtype
    values, dz = values.reshape(-1)[order].to(acc), dz.reshape(-1)[order]

    def bags(slots: Tensor, rows: Tensor, of: Tensor) -> Tensor:
        of = of.to(acc).contiguous()
        out = F.embedding_bag(
            rows, of, starts, per_sample_weights=slots, mode="sum", include_last_offset=True
        )
        return out[:d_sae]

    d_w_enc, d_w_dec = bags(dz, rows, x), bags(values * scale, rows, g)
    slots = torch.arange(len(dz), device=dz.device)
    pair = torch.stack([dz, values * dz], dim=1)  # two sums of numbers in one bag of short rows
    sums = bags(torch.ones_like(dz), slots, pair)
    # Fused Adam reads memory in order whatever the strides are.
    return d_w_enc, d_w_dec, sums[:, 0].contiguous(), sums[:, 1].contiguous(), active


def sparse_grad_with(
    sums: Sums,
    x: Tensor,
    g: Tensor,
    values: Tensor,
    indices: Tensor,
    d_sae: int,
    scale: float,
    dots: Tensor,
    offsets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    acc = accumulate_dtype(x, g, values, dots)
    dz = (scale * dots.to(acc)).masked_fill_(values == 0, 0)
    d_w_enc, d_w_dec, d_b_enc, _, _ = sums(x, g, dz, values, indices, d_sae, scale, offsets)
    return dz, d_w_enc, d_w_dec, d_b_enc, scale * g.sum(dim=0, dtype=acc)


def latent_step_with(
    sums: Sums,
    x: Tensor,
    residual: Tensor,
    values: Tensor,
    indices: Tensor,
    dots: Tensor,
    latents: Latents,
    adam: AdamStep,
    scale: float,
    centred: bool,
    unit_norm: bool,
    clip: float | None,
    clip_norm: Tensor | None,
    dead: DeadGrads | None,
    counters: Counters | None,
    offsets: Tensor | None,
) -> Tensor:
    d_sae = len(latents.w_dec.value)
    dz = (scale * dots.float()).masked_fill_(values == 0, 0)
    d_w_enc, d_w_dec, d_b_enc, stretch, active = sums(x, residual, dz, values, indices, d_sae, scale, offsets)
    d_b_dec = scale * residual.sum(dim=0, dtype=torch.float32)
    if dead is not None:
        add_rows(d_w_enc, dead.latents, dead.w_enc)
        add_rows(d_b_enc, dead.latents, dead.b_enc)
        add_rows(d_w_dec, dead.latents, dead.w_dec)
        active = active.index_fill(0, dead.latents, True)

    # <d_w_dec, w_dec> is the sum of values * dz already, if dots were taken with these very weights
    # (not with a rounded copy of them) and nothing was added.
    known = dead is None and latents.w_dec.low is None and latents.w_dec.remainder is None
    norms = torch.empty(2, d_sae, dtype=torch.float32, device=x.device)
    for part in blocks(d_w_dec):
        if unit_norm:
            w, d = rows_of(latents.w_dec, part).master(), d_w_dec[part]
            along = stretch[part] if known else torch.linalg.vecdot(d, w)
            d.addcmul_(along.unsqueeze(1), w, value=-1)
        norms[0, part] = torch.linalg.vector_norm(d_w_dec[part], dim=1)
        norms[1, part] = torch.linalg.vector_norm(d_w_enc[part], dim=1)
        if centred:  # x is centred on b_dec, which thus receives minus what the encoder's input would
            d_b_dec.sub_(d_b_enc[part] @ rows_of(latents.w_enc, part).master())
    norm = torch.linalg.vector_norm(torch.cat([norms.flatten(), d_b_enc, d_b_dec]))
    keep = torch.isfinite(norm)
    factor = None
    if clip is not None:
        limited = norm if clip_norm is None else clip_norm
        keep = keep & ~torch.isnan(limited)
        factor = (clip / (limited + 1e-6)).clamp(max=1.0)

    grads = (d_w_enc, d_b_enc, d_w_dec, d_b_dec)
    if is_plain(latents):
        _fused_adam(latents, grads, adam, keep, factor)
        if unit_norm:
            _renormalise(latents.w_dec, keep)
        for weight in (latents.w_enc, latents.b_enc, latents.w_dec, latents.b_dec):
            if weight.low is not None:
                weight.low.copy_(weight.value)
    else:
        latents.step += keep
        _adam_in_blocks(latents, grads, adam, keep, factor, unit_norm, active)
    if counters is not None:
        count(values, indices, counters)
    return norm


latent_step = partial(latent_step_with, sums_by_latent)


def blocks(matrix: Tensor) -> Iterator[slice]:
    """Ranges of latents, in order, that make up [F, D] or [F]."""
    elements = BLOCK_ELEMENTS.get(matrix.device.type, BLOCK_ELEMENTS_ELSEWHERE)
    size = max(1, elements // max(1, matrix[:1].numel()))
    for start in range(0, len(matrix), size):
        yield slice(start, min(start + size, len(matrix)))


def rows_of(weight: Weight, part: slice) -> Weight:
    """A block of rows of a parameter, to be read and written in place."""
    low, remainder = weight.low, weight.remainder
    return Weight(
        weight.value[part],
        weight.first[part],
        weight.second[part],
        None if low is None else low[part],
        None if remainder is None else remainder[part],
    )


def add_rows(grad: Tensor, latents: Tensor, rows: Tensor) -> None:
    """Distinct latents: reading and writing needs no atomics, as adding at indices on a GPU would."""
    grad.index_copy_(0, latents, grad[latents] + rows.to(grad.dtype))


def is_plain(latents: Latents) -> bool:
    """Whether torch's fused Adam can do it: everything float32, every row in every step."""
    weights = (latents.w_enc, latents.b_enc, latents.w_dec, latents.b_dec)
    float32 = all(t.dtype == torch.float32 for w in weights for t in (w.value, w.first, w.second))
    return float32 and latents.last_step is None


def _fused_adam(
    latents: Latents, grads: tuple[Tensor, ...], adam: AdamStep, keep: Tensor, factor: Tensor | None
) -> None:
    weights = (latents.w_enc, latents.b_enc, latents.w_dec, latents.b_dec)
    steps = [latents.step.clone() for _ in weights]  # it counts each of them up by itself
    torch_adam(
        [w.value for w in weights],
        list(grads),
        [w.first for w in weights],
        [w.second for w in weights],
        [],
        steps,
        fused=True,
        grad_scale=None if factor is None else factor.reciprocal(),  # it divides
        found_inf=(~keep).float(),
        amsgrad=False,
        beta1=adam.beta1,
        beta2=adam.beta2,
        lr=adam.lr,
        weight_decay=0.0,
        eps=adam.eps,
        maximize=False,
    )
    latents.step.copy_(steps[0])


def _renormalise(weight: Weight, keep: Tensor) -> None:
    for part in blocks(weight.value):
        rows = rows_of(weight, part)
        norm = torch.linalg.vector_norm(rows.value, dim=1, keepdim=True).clamp_min_(TINY)
        rows.value.div_(torch.where(keep, norm, 1.0))


def _adam_in_blocks(
    latents: Latents,
    grads: tuple[Tensor, ...],
    adam: AdamStep,
    keep: Tensor,
    factor: Tensor | None,
    unit_norm: bool,
    active: Tensor,
) -> None:
    """Any format of storage, and lazy rows; `latents.step` counts this step already."""
    step, last_step = latents.step, latents.last_step
    decay = None if last_step is None else adam.beta2 ** (step - last_step - 1).clamp_min(0)
    done = step.double()  # 1 - 0.999 has lost 15 of float32's 24 bits
    rate = (adam.lr / (1 - adam.beta1**done)).float()
    scale = (1 - adam.beta2**done).sqrt().float()
    for salt, name in enumerate(("w_enc", "b_enc", "w_dec", "b_dec")):
        whole: Weight = getattr(latents, name)
        lazy = decay is not None and name != "b_dec"
        for part in blocks(whole.value):
            weight, grad = rows_of(whole, part), grads[salt][part]
            like = (-1, 1) if grad.dim() == 2 else (-1,)
            mask = keep & active[part].view(like) if lazy else keep
            if factor is not None:
                grad = grad * factor
            old, second = weight.master(), weight.second.float()
            if lazy and decay is not None:
                second = second * decay[part].view(like)
            first = (weight.first.float() * adam.beta1).add_(grad, alpha=1 - adam.beta1)
            second = (second * adam.beta2).addcmul_(grad, grad, value=1 - adam.beta2)
            new = old - rate * first / ((second.sqrt() / scale).add_(adam.eps))
            if unit_norm and name == "w_dec":
                new /= torch.linalg.vector_norm(new, dim=-1, keepdim=True).clamp_min_(TINY)
            weight.store(torch.where(mask, new, old))
            start = part.start * grad[:1].numel()
            store_moment(weight.first, first, step, 2 * salt, mask, start)
            store_moment(weight.second, second, step, 2 * salt + 1, mask, start)
    if last_step is not None:
        last_step.copy_(torch.where(active & keep, step.int(), last_step))


def store_moment(moment: Tensor, exact: Tensor, step: Tensor, salt: int, mask: Tensor, start: int) -> None:
    """Write where `mask` allows it; `start` is the number of the first element in the whole moment."""
    if moment.dtype == torch.bfloat16:
        exact = round_stochastically(exact, noise(exact.shape, step, salt, start))
    moment.copy_(torch.where(mask, exact, moment))


def settle(step: Tensor, latents: Latents, adam: AdamStep) -> None:
    if latents.last_step is None:
        return
    missed = step - latents.last_step
    for salt, whole in enumerate((latents.w_enc, latents.b_enc, latents.w_dec)):
        for part in blocks(whole.value):
            weight = rows_of(whole, part)
            behind = missed[part].view((-1, 1) if weight.value.dim() == 2 else (-1,))
            weight.first.masked_fill_(behind > 0, 0)
            exact = weight.second.float() * adam.beta2**behind
            start = part.start * weight.value[:1].numel()
            store_moment(weight.second, exact, step, salt + 16, behind > 0, start)
    latents.last_step.copy_(step)


def count(values: Tensor, indices: Tensor, counters: Counters) -> None:
    """Integer sums and maxima are the same in any order: adding at indices is exact."""
    values = values.reshape(-1).float().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    latents = indices.reshape(-1).long()
    fired = torch.zeros_like(counters.counts).index_add_(0, latents, (values != 0).long())
    counters.counts += fired
    counters.sums.index_add_(0, latents, values.double().mul_(FIXED_POINT).round_().long())
    counters.maxima.scatter_reduce_(0, latents, values, reduce="amax")
    counters.last_fired.masked_fill_(fired > 0, counters.tokens)
