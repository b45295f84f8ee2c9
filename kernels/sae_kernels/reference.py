"""The definition of every op: readable, any device, differentiated by plain autograd.

The other backends are held equal to this file by test, forward and gradient. It may build
[N, F] and [M, D] tensors on the way; use it to check numbers, not to train at size. On a GPU
its sums over latents use float atomics, so two runs differ in the last bits.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sae_kernels.contracts import accumulate_dtype, product_dtype
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
from sae_kernels.slots import num_rows, offsets_of, row_of_slot


def supports(op: str, *tensors: Tensor) -> str | None:
    """Everything, everywhere."""
    return None


def topk_encode(x: Tensor, w: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    # A stable sort keeps the order of equal values: of a tie, the smaller index comes first.
    values, indices = _preactivations(x, w, b).relu().sort(dim=-1, descending=True, stable=True)
    return values[:, :k], indices[:, :k].int()


def batch_topk_encode(x: Tensor, w: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    acts = _preactivations(x, w, b).relu()
    place = acts.flatten().sort(descending=True, stable=True).indices[: len(x) * k]
    chosen = torch.zeros_like(acts, dtype=torch.bool).flatten().index_fill(0, place, True).view_as(acts)
    return _compressed(acts, chosen)


def threshold_encode(x: Tensor, w: Tensor, b: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    pre = _preactivations(x, w, b)
    return _compressed(pre, (pre > threshold) & (pre > 0))


def dead_encode(x: Tensor, w: Tensor, b: Tensor, k: int) -> Tensor:
    acts = _preactivations(x, w, b).relu()
    if k >= len(w):
        return acts
    values, indices = acts.sort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(acts).scatter(1, indices[:, :k], values[:, :k])


def _preactivations(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """[N, F]; under autocast the product of the rounded operands, with the gradient of the exact one."""
    acc, rounded = accumulate_dtype(x, w, b), product_dtype(x, w)
    with torch.autocast(x.device.type, enabled=False):
        pre = F.linear(x.to(acc), w.to(acc), b.to(acc))
        if rounded != acc:
            low = F.linear(x.detach().to(rounded).to(acc), w.detach().to(rounded).to(acc), b.detach().to(acc))
            pre = torch.where(low.isfinite(), pre + (low - pre.detach()), low)
    return pre


def _compressed(acts: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, latents = chosen.nonzero(as_tuple=True)
    return acts[rows, latents], latents.int(), offsets_of(chosen.sum(dim=-1))


def sparse_decode(values: Tensor, indices: Tensor, weight: Tensor, offsets: Tensor | None = None) -> Tensor:
    acc = accumulate_dtype(values, weight)
    parts = values.to(acc).unsqueeze(-1) * weight.to(acc)[indices.long()]  # [N, K, D] or [M, D]
    if offsets is None:
        return parts.sum(dim=1).to(weight.dtype)
    out = parts.new_zeros(num_rows(indices, offsets), weight.shape[1])
    return out.index_add(0, row_of_slot(indices, offsets), parts).to(weight.dtype)


def decode_residual(
    values: Tensor,
    indices: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    acc = accumulate_dtype(values, weight, bias, target)
    exact = target.to(acc) - (sparse_decode(values, indices, weight.to(acc), offsets) + bias.to(acc))
    residual = exact.to(target.dtype)
    dots = gather_dot(residual.detach(), indices, weight.detach(), offsets)
    return residual, exact.square().sum(dim=-1), dots


def gather_dot(rows: Tensor, indices: Tensor, weight: Tensor, offsets: Tensor | None = None) -> Tensor:
    acc = accumulate_dtype(rows, weight)
    of_slot = rows.to(acc).unsqueeze(1) if offsets is None else rows.to(acc)[row_of_slot(indices, offsets)]
    return (of_slot * weight.to(acc)[indices.long()]).sum(dim=-1)


def segment_rows(
    values: Tensor, indices: Tensor, rows: Tensor, d_sae: int, offsets: Tensor | None = None
) -> Tensor:
    acc = accumulate_dtype(values, rows)
    of_slot = rows.to(acc)[row_of_slot(indices, offsets)]  # [M, D]
    parts = values.to(acc).reshape(-1, 1) * of_slot
    return parts.new_zeros(d_sae, rows.shape[-1]).index_add(0, indices.reshape(-1).long(), parts)


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
    if dots is None:
        dots = gather_dot(g, indices, w_dec, offsets)
    dz = (scale * dots).masked_fill(values == 0, 0)
    d_sae, ones = len(w_dec), dz.new_ones(len(x), 1)
    d_w_dec = scale * segment_rows(values, indices, g, d_sae, offsets)
    d_w_enc = segment_rows(dz, indices, x, d_sae, offsets)
    d_b_enc = segment_rows(dz, indices, ones, d_sae, offsets).squeeze(1)
    return dz, d_w_enc, d_w_dec, d_b_enc, scale * g.to(dz.dtype).sum(dim=0)


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
    w_enc, w_dec = latents.w_enc.master(), latents.w_dec.master()
    _, *sums = sparse_grad(x, residual, values, indices, w_dec, scale, dots, offsets)
    d_w_enc, d_w_dec, d_b_enc, d_b_dec = (s.float() for s in sums)
    if dead is not None:
        d_w_enc.index_add_(0, dead.latents, dead.w_enc.to(d_w_enc.dtype))
        d_b_enc.index_add_(0, dead.latents, dead.b_enc.to(d_b_enc.dtype))
        d_w_dec.index_add_(0, dead.latents, dead.w_dec.to(d_w_dec.dtype))
    if centred:  # x is centred on b_dec, which thus receives minus what the encoder's input would
        d_b_dec -= d_b_enc @ w_enc
    if unit_norm:
        d_w_dec -= (d_w_dec * w_dec).sum(dim=-1, keepdim=True) * w_dec
    grads = (d_w_enc, d_b_enc, d_w_dec, d_b_dec)
    norm = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
    keep, factor = torch.isfinite(norm), torch.ones_like(norm)
    if clip is not None:
        limited = norm if clip_norm is None else clip_norm
        keep = keep & ~torch.isnan(limited)
        factor = (clip / (limited + 1e-6)).clamp(max=1.0)
    latents.step += keep
    active = _active(values, indices, len(w_dec), dead) if latents.last_step is not None else None
    weights = (latents.w_enc, latents.b_enc, latents.w_dec, latents.b_dec)
    for salt, (weight, grad) in enumerate(zip(weights, grads, strict=True)):
        lazy = active if weight is not latents.b_dec else None
        renorm = unit_norm and weight is latents.w_dec
        _adam(weight, grad * factor, latents, adam, keep, salt, renorm, lazy)
    if latents.last_step is not None and active is not None:
        latents.last_step.copy_(torch.where(active & keep, latents.step.int(), latents.last_step))
    if counters is not None:
        _count(values, indices, counters)
    return norm


def settle(step: Tensor, latents: Latents, adam: AdamStep) -> None:
    if latents.last_step is None:
        return
    missed = step - latents.last_step
    for salt, weight in enumerate((latents.w_enc, latents.b_enc, latents.w_dec)):
        behind = missed if weight.value.dim() == 1 else missed.unsqueeze(1)
        weight.first.masked_fill_(behind > 0, 0)
        exact = weight.second.float() * adam.beta2**behind
        _store_moment(weight.second, exact, step, salt + 16, behind > 0)
    latents.last_step.copy_(step)


def _active(values: Tensor, indices: Tensor, d_sae: int, dead: DeadGrads | None) -> Tensor:
    """[F] bool: latents with a gradient in this step."""
    active = torch.zeros(d_sae, dtype=torch.bool, device=values.device)
    active[indices[values != 0].long()] = True
    if dead is not None:
        active[dead.latents] = True
    return active


def _adam(
    weight: Weight,
    grad: Tensor,
    latents: Latents,
    adam: AdamStep,
    keep: Tensor,
    salt: int,
    renorm: bool,
    lazy: Tensor | None,
) -> None:
    """One step of one parameter where `keep` (0-dim) and, in rows, `lazy` [F] allow it."""
    step, master = latents.step, weight.master()
    rows = (lambda t: t.unsqueeze(1)) if master.dim() == 2 else (lambda t: t)
    mask = keep if lazy is None else keep & rows(lazy)
    second = weight.second.float()
    if lazy is not None and latents.last_step is not None:
        second = second * rows(adam.beta2 ** (step - latents.last_step - 1).clamp_min(0))
    first = adam.beta1 * weight.first.float() + (1 - adam.beta1) * grad
    second = adam.beta2 * second + (1 - adam.beta2) * grad.square()
    done = step.double()  # 1 - 0.999 has lost 15 of float32's 24 bits
    rate, root = adam.lr / (1 - adam.beta1**done), (1 - adam.beta2**done).sqrt()
    new = master - rate.float() * first / (second.sqrt() / root.float() + adam.eps)
    if renorm:
        new = new / new.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    weight.store(torch.where(mask, new, master))
    _store_moment(weight.first, first, step, 2 * salt, mask)
    _store_moment(weight.second, second, step, 2 * salt + 1, mask)


def _store_moment(moment: Tensor, exact: Tensor, step: Tensor, salt: int, mask: Tensor) -> None:
    if moment.dtype == torch.bfloat16:
        exact = round_stochastically(exact, noise(exact.shape, step, salt)).float()
    moment.copy_(torch.where(mask, exact, moment.float()))


def _count(values: Tensor, indices: Tensor, counters: Counters) -> None:
    values = torch.where(torch.isfinite(values), values, 0).reshape(-1)
    latents = indices.reshape(-1).long()
    fired = torch.zeros_like(counters.counts).index_add_(0, latents, (values != 0).long())
    counters.counts += fired
    counters.sums.index_add_(0, latents, (values.double() * FIXED_POINT).round().long())
    counters.maxima.scatter_reduce_(0, latents, values.float(), reduce="amax")
    counters.last_fired.masked_fill_(fired > 0, counters.tokens)
