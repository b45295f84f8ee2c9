"""Several linear SAEs of one shape at once: M problems whose launches a backend may share.

Every tensor has M as its first dimension: rows [M, N, D], codes [M, N, K], parameters and moments [M, F, D]
(b_enc [M, F], b_dec [M, D], step [M]), counters [M, F]. Indices are each SAE's own, 0 to F - 1. On a GPU a
small step is bound by its launches, some eighty of them, which SAEs that share them pay once. A backend
without a way of its own takes one SAE after the other, which defines what these ops are. Decoding needs no
op of its own: with f + F m for the index f of SAE m, M SAEs are one of M F latents (`numbered`).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sae_kernels import autograd, dispatch
from sae_kernels.contracts import (
    accumulate_dtype,
    check_encoder,
    check_k,
    check_latents,
    check_step,
    product_dtype,
)
from sae_kernels.latents import AdamStep, Counters, DeadGrads, Latents


def topk_encode_many(x: Tensor, w: Tensor, b: Tensor, ks: Sequence[int]) -> tuple[Tensor, Tensor]:
    """`topk_encode` of each of M SAEs, with rows and a number of slots of its own. Not differentiable.

    Args:
        x: [M, N, D]. w: [M, F, D]. b: [M, F].
        ks: M of them, each 1 to F.

    Returns:
        values [M, N, K] float32 (float64 if an argument is), indices [M, N, K] int32, K being the largest of
        ks; what others have beyond their own k are empty slots of latent 0.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or a k is not in 1..F."""
    _check_count("topk_encode_many", x=x, w=w, b=b, ks=ks)
    for *tensors, k in zip(x, w, b, ks, strict=True):
        check_encoder(*tensors)
        check_k(k, w.shape[1])
    _check_total(x, w)
    rounded = product_dtype(x, w)
    return _run("topk_encode", x.to(rounded), w.to(rounded), b, ks)


def latent_step_many(
    x: Tensor,
    residual: Tensor,
    values: Tensor,
    indices: Tensor,
    dots: Tensor,
    latents: Latents,
    adams: Sequence[AdamStep],
    scale: float,
    centred: bool = True,
    unit_norm: bool = True,
    clip: float | None = None,
    clip_norms: Tensor | None = None,
    dead: Sequence[DeadGrads | None] | None = None,
    counters: Counters | None = None,
) -> Tensor:
    """`latent_step` of each of M SAEs; one that must be skipped is skipped alone.

    Args:
        x, residual: [M, N, D].
        values, indices, dots: [M, N, K].
        latents: as in `latent_step`, every tensor with M before its shape, contiguous.
        adams: M of them; learning rates may differ, betas and eps may not.
        scale, centred, unit_norm, clip: of all.
        clip_norms: [M], the `clip_norm` of each.
        dead: M of them, naming each SAE's own latents; None for one without.
        counters: every tensor [M, F], contiguous; `tokens` is that of all.
    Rows that lazy steps leave alone are caught up by `settle(latents.one(m), adam)` of each.

    Returns:
        [M] float32: each one's gradient norm before clipping.

    Raises:
        ValueError: shapes, dtypes, devices or options do not fit."""
    dead = [None] * len(x) if dead is None else dead
    _check_count("latent_step_many", x=x, w_dec=latents.w_dec.value, adams=adams, dead=dead)
    if len({replace(adam, lr=0.0) for adam in adams}) != 1:
        raise ValueError("adams differ in more than lr: expected the same betas and eps in all")
    if latents.w_dec.value.dim() != 3:
        raise ValueError(f"w_dec is {tuple(latents.w_dec.value.shape)}: expected [M, F, D]")
    check_latents(x, residual, values, indices, dots, latents, adams[0], None)
    _check_total(x, latents.w_dec.value)
    check_step(latents, clip, clip_norms, None, counters)
    for one in filter(None, dead):
        check_step(latents, clip, clip_norms, one, None)
    args = (x, residual, values, indices, dots, latents, adams, scale, centred, unit_norm)
    return _run("latent_step", *args, clip, clip_norms, dead, counters)


def numbered(indices: Tensor, d_sae: int) -> Tensor:
    """indices [M, N, K], of M SAEs of d_sae latents each -> [M N, K] int32, of one that has all M d_sae."""
    if len(indices) == 1:
        return indices[0]
    first = torch.arange(len(indices), dtype=torch.int32, device=indices.device) * d_sae
    return (indices + first[:, None, None]).flatten(0, 1)


def _topk_encode(x: Tensor, w: Tensor, b: Tensor, ks: Sequence[int]) -> tuple[Tensor, Tensor]:
    if len(ks) == 1:
        values, indices = autograd.run_plain("topk_encode", x[0], w[0], b[0], ks[0])
        return values.unsqueeze(0), indices.unsqueeze(0)
    shape = (*x.shape[:2], max(ks))
    values = torch.zeros(shape, dtype=accumulate_dtype(x, w, b), device=x.device)
    indices = torch.zeros(shape, dtype=torch.int32, device=x.device)
    for m, k in enumerate(ks):
        values[m, :, :k], indices[m, :, :k] = autograd.run_plain("topk_encode", x[m], w[m], b[m], k)
    return values, indices


def _latent_step(
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
    norms = [
        autograd.run_plain(
            "latent_step",
            *(x[m], residual[m], values[m], indices[m], dots[m], latents.one(m), adam, scale),
            *(centred, unit_norm, clip, None if clip_norms is None else clip_norms[m], dead[m]),
            *(None if counters is None else counters.one(m), None),
        )
        for m, adam in enumerate(adams)
    ]
    return torch.stack(norms)


ONE_BY_ONE: dict[str, Callable[..., Any]] = {"topk_encode": _topk_encode, "latent_step": _latent_step}


def _run(op: str, x: Tensor, *args: Any) -> Any:
    """The way of the backend that has been chosen for `op`, if it has one for many."""
    name, _ = dispatch.select(op, dispatch.requested(), x, *args)
    with torch.no_grad():
        return autograd.plain(dispatch.way_of(name, f"{op}_many") or ONE_BY_ONE[op], x, *args)


def _check_total(x: Tensor, weight: Tensor) -> None:
    """Rows and latents of all SAEs are numbered in int32."""
    most = len(x) * max(x.shape[1], weight.shape[1])
    if most >= 2**31:
        raise ValueError(f"{len(x)} SAEs have {most} rows or latents: expected less than 2^31")


def _check_count(op: str, **of_all: Tensor | Sequence[Any]) -> None:
    counts = {name: len(one) for name, one in of_all.items()}
    if len(set(counts.values())) != 1 or not min(counts.values()):
        told = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise ValueError(f"{op} of one SAE or more: expected the same number of each, and they are {told}")
