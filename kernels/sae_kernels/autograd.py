"""Gradients for every backend: the four ops are each other's derivatives.

    out = sparse_decode(v, i, W)      dv = gather_dot(g, i, W)       dW = segment_rows(v, i, g)
    out = gather_dot(r, i, W)         dr = sparse_decode(g, i, W)    dW = segment_rows(g, i, r)
    out = segment_rows(v, i, r)       dv = gather_dot(r, i, g)       dr = sparse_decode(v, i, g)
    v, i = topk_encode(x, W, b, k)    z = g where v is not 0
                                      dx = sparse_decode(z, i, W)    dW = segment_rows(z, i, x)    db likewise

A backward calls the ops again, so second derivatives need nothing more. The reference is not
wrapped: plain autograd differentiates it, which makes it an independent check of these formulas.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sae_kernels import dispatch
from sae_kernels.contracts import product_dtype

Grads = tuple[Tensor | None, ...]


def call(op: str, *args: Tensor | int, backend: str | None = None) -> Any:
    """Run one op on the backend in force, or on the one that a forward pass wrote down for its backward."""
    asked = dispatch.requested() if backend is None else backend
    name, run = dispatch.select(op, asked, *args)
    if name == "reference":
        return run(*args)
    return _FUNCTIONS[op].apply(asked, run, *args)


def _plain(run: Callable, first: Tensor, *others: Tensor | int) -> Any:
    """Run a backend outside autograd, and outside autocast: what dtypes mean is settled before."""
    with torch.autocast(first.device.type, enabled=False):
        return run(first.detach(), *(a.detach() if isinstance(a, Tensor) else a for a in others))


class _TopKEncode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, asked: str, run: Callable, x: Tensor, w: Tensor, b: Tensor, k: int
    ) -> tuple[Tensor, Tensor]:
        rounded = product_dtype(x, w)
        values, indices = _plain(run, x.to(rounded), w.to(rounded), b, k)
        ctx.asked, ctx.b_dtype = asked, b.dtype
        ctx.save_for_backward(x, w, values, indices)
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> Grads:
        x, w, values, indices = ctx.saved_tensors
        dz = grad.masked_fill(values == 0, 0)
        dx = dw = db = None
        if ctx.needs_input_grad[2]:
            dx = call("sparse_decode", dz, indices, w, backend=ctx.asked).to(x.dtype)
        if ctx.needs_input_grad[3]:
            dw = call("segment_rows", dz, indices, x, len(w), backend=ctx.asked).to(w.dtype)
        if ctx.needs_input_grad[4]:
            ones = dz.new_ones(len(dz), 1)
            db = call("segment_rows", dz, indices, ones, len(w), backend=ctx.asked).squeeze(1).to(ctx.b_dtype)
        return None, None, dx, dw, db, None


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, asked: str, run: Callable, values: Tensor, indices: Tensor, weight: Tensor
    ) -> Tensor:
        ctx.asked = asked
        ctx.save_for_backward(values, indices, weight)
        return _plain(run, values, indices, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Grads:
        values, indices, weight = ctx.saved_tensors
        dv = dw = None
        if ctx.needs_input_grad[2]:
            dv = call("gather_dot", grad, indices, weight, backend=ctx.asked).to(values.dtype)
        if ctx.needs_input_grad[4]:
            dw = call("segment_rows", values, indices, grad, len(weight), backend=ctx.asked).to(weight.dtype)
        return None, None, dv, None, dw


class _GatherDot(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, asked: str, run: Callable, rows: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
        ctx.asked = asked
        ctx.save_for_backward(rows, indices, weight)
        return _plain(run, rows, indices, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Grads:
        rows, indices, weight = ctx.saved_tensors
        dr = dw = None
        if ctx.needs_input_grad[2]:
            dr = call("sparse_decode", grad, indices, weight, backend=ctx.asked).to(rows.dtype)
        if ctx.needs_input_grad[4]:
            dw = call("segment_rows", grad, indices, rows, len(weight), backend=ctx.asked).to(weight.dtype)
        return None, None, dr, None, dw


class _SegmentRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, asked: str, run: Callable, values: Tensor, indices: Tensor, rows: Tensor, d_sae: int
    ) -> Tensor:
        ctx.asked = asked
        ctx.save_for_backward(values, indices, rows)
        return _plain(run, values, indices, rows, d_sae)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Grads:
        values, indices, rows = ctx.saved_tensors
        dv = dr = None
        if ctx.needs_input_grad[2]:
            dv = call("gather_dot", rows, indices, grad, backend=ctx.asked).to(values.dtype)
        if ctx.needs_input_grad[4]:
            dr = call("sparse_decode", values, indices, grad, backend=ctx.asked).to(rows.dtype)
        return None, None, dv, None, dr, None


_FUNCTIONS = {
    "topk_encode": _TopKEncode,
    "sparse_decode": _SparseDecode,
    "gather_dot": _GatherDot,
    "segment_rows": _SegmentRows,
}
