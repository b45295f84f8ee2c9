"""Gradients for every backend: the ops are each other's derivatives.

    out = sparse_decode(v, i, W)      dv = gather_dot(g, i, W)       dW = segment_rows(v, i, g)
    out = gather_dot(r, i, W)         dr = sparse_decode(g, i, W)    dW = segment_rows(g, i, r)
    out = segment_rows(v, i, r)       dv = gather_dot(r, i, g)       dr = sparse_decode(v, i, g)
    e, l, _ = decode_residual(v, i, W, b, y) with l = |e|^2          as y - sparse_decode(v, i, W) - b
    v, i = topk_encode(x, W, b, k)    z = g where v is not 0
                                      dx = sparse_decode(z, i, W)    dW = segment_rows(z, i, x)    db likewise

`batch_topk_encode` and `threshold_encode` are as `topk_encode`. A backward calls the ops again, so
second derivatives need nothing more. The reference is not wrapped: plain autograd differentiates
it, which makes it an independent check of these formulas.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sae_kernels import dispatch
from sae_kernels.contracts import accumulate_dtype, product_dtype

Grads = tuple[Tensor | None, ...]


def call(op: str, *args: Any, backend: str | None = None) -> Any:
    """Run one op on the backend in force, or on the one that a forward pass wrote down for its backward."""
    asked = dispatch.requested() if backend is None else backend
    name, run = dispatch.select(op, asked, *args)
    if name == "reference":
        return run(*args)
    return _FUNCTIONS[op].apply(asked, run, *args)


def plain(run: Callable, first: Tensor, *others: Any) -> Any:
    """Run a backend outside autograd, and outside autocast: what dtypes mean is settled before."""
    with torch.autocast(first.device.type, enabled=False):
        return run(first.detach(), *(a.detach() if isinstance(a, Tensor) else a for a in others))


class _Encode(torch.autograd.Function):
    """Any encoder with sparse codes: x, w, b and one more argument -> values, indices[, offsets]."""

    @staticmethod
    def forward(ctx: Any, asked: str, run: Callable, x: Tensor, w: Tensor, b: Tensor, how: Any) -> Any:
        rounded = product_dtype(x, w)
        values, indices, *offsets = plain(run, x.to(rounded), w.to(rounded), b, how)
        ctx.asked, ctx.b_dtype = asked, b.dtype
        ctx.save_for_backward(x, w, values, indices, *offsets)
        ctx.mark_non_differentiable(indices, *offsets)
        return values, indices, *offsets

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> Grads:
        x, w, values, indices, *offsets = ctx.saved_tensors
        dz = grad.masked_fill(values == 0, 0)
        dx = dw = db = None
        if ctx.needs_input_grad[2]:
            wide = w.to(torch.promote_types(x.dtype, w.dtype))  # what comes back is of the weight's dtype
            dx = call("sparse_decode", dz, indices, wide, *offsets, backend=ctx.asked).to(x.dtype)
        if ctx.needs_input_grad[3]:
            dw = call("segment_rows", dz, indices, x, len(w), *offsets, backend=ctx.asked).to(w.dtype)
        if ctx.needs_input_grad[4]:
            ones = dz.new_ones(len(x), 1)
            db = call("segment_rows", dz, indices, ones, len(w), *offsets, backend=ctx.asked).squeeze(1)
            db = db.to(ctx.b_dtype)
        return None, None, dx, dw, db, None


class _DeadEncode(torch.autograd.Function):
    """Dense products on a GPU take rounded operands in the backward too, as torch's own do under autocast."""

    @staticmethod
    def forward(ctx: Any, asked: str, run: Callable, x: Tensor, w: Tensor, b: Tensor, k: int) -> Tensor:
        rounded = product_dtype(x, w)
        acts = plain(run, x.to(rounded), w.to(rounded), b, k)
        ctx.b_dtype, ctx.rounded = b.dtype, rounded if x.is_cuda else acts.dtype
        ctx.save_for_backward(x, w, acts)
        return acts

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Grads:
        x, w, acts = ctx.saved_tensors
        dz = grad.masked_fill(acts == 0, 0)
        low = dz.to(ctx.rounded)
        dx = dw = db = None
        with torch.autocast(x.device.type, enabled=False):
            if ctx.needs_input_grad[2]:
                dx = (low @ w.to(ctx.rounded)).to(x.dtype)
            if ctx.needs_input_grad[3]:
                dw = (low.T @ x.to(ctx.rounded)).to(w.dtype)
        if ctx.needs_input_grad[4]:
            db = dz.sum(dim=0).to(ctx.b_dtype)
        return None, None, dx, dw, db, None


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, asked: str, run: Callable, values: Tensor, indices: Tensor, weight: Tensor, *offsets: Tensor
    ) -> Tensor:
        ctx.asked = asked
        ctx.save_for_backward(values, indices, weight, *offsets)
        return plain(run, values, indices, weight, *offsets)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Grads:
        values, indices, weight, *offsets = ctx.saved_tensors
        dv = dw = None
        if ctx.needs_input_grad[2]:
            dv = call("gather_dot", grad, indices, weight, *offsets, backend=ctx.asked).to(values.dtype)
        if ctx.needs_input_grad[4]:
            dw = call("segment_rows", values, indices, grad, len(weight), *offsets, backend=ctx.asked)
            dw = dw.to(weight.dtype)
        return None, None, dv, None, dw, *(None for _ in offsets)


class _DecodeResidual(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        asked: str,
        run: Callable,
        values: Tensor,
        indices: Tensor,
        weight: Tensor,
        bias: Tensor,
        target: Tensor,
        *offsets: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        residual, loss, dots = plain(run, values, indices, weight, bias, target, *offsets)
        ctx.asked, ctx.bias_dtype, ctx.target_dtype = asked, bias.dtype, target.dtype
        ctx.save_for_backward(values, indices, weight, residual, *offsets)
        ctx.mark_non_differentiable(dots)
        return residual, loss, dots

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_loss: Tensor, _: Tensor) -> Grads:
        values, indices, weight, residual, *offsets = ctx.saved_tensors
        acc = accumulate_dtype(values, weight, residual)
        down = grad.to(acc) + 2 * grad_loss.to(acc).unsqueeze(1) * residual.to(acc)  # in the target
        dv = dw = db = dy = None
        if ctx.needs_input_grad[2]:
            dv = -call("gather_dot", down, indices, weight, *offsets, backend=ctx.asked).to(values.dtype)
        if ctx.needs_input_grad[4]:
            dw = -call("segment_rows", values, indices, down, len(weight), *offsets, backend=ctx.asked)
            dw = dw.to(weight.dtype)
        if ctx.needs_input_grad[5]:
            db = -down.sum(dim=0).to(ctx.bias_dtype)
        if ctx.needs_input_grad[6]:
            dy = down.to(ctx.target_dtype)
        return None, None, dv, None, dw, db, dy, *(None for _ in offsets)


class _GatherDot(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, asked: str, run: Callable, rows: Tensor, indices: Tensor, weight: Tensor, *offsets: Tensor
    ) -> Tensor:
        ctx.asked = asked
        ctx.save_for_backward(rows, indices, weight, *offsets)
        return plain(run, rows, indices, weight, *offsets)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Grads:
        rows, indices, weight, *offsets = ctx.saved_tensors
        dr = dw = None
        if ctx.needs_input_grad[2]:
            wide = weight.to(torch.promote_types(rows.dtype, weight.dtype))
            dr = call("sparse_decode", grad, indices, wide, *offsets, backend=ctx.asked).to(rows.dtype)
        if ctx.needs_input_grad[4]:
            dw = call("segment_rows", grad, indices, rows, len(weight), *offsets, backend=ctx.asked)
            dw = dw.to(weight.dtype)
        return None, None, dr, None, dw, *(None for _ in offsets)


class _SegmentRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        asked: str,
        run: Callable,
        values: Tensor,
        indices: Tensor,
        rows: Tensor,
        d_sae: int,
        *offsets: Tensor,
    ) -> Tensor:
        ctx.asked = asked
        ctx.save_for_backward(values, indices, rows, *offsets)
        return plain(run, values, indices, rows, d_sae, *offsets)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Grads:
        values, indices, rows, *offsets = ctx.saved_tensors
        dv = dr = None
        if ctx.needs_input_grad[2]:
            dv = call("gather_dot", rows, indices, grad, *offsets, backend=ctx.asked).to(values.dtype)
        if ctx.needs_input_grad[4]:
            dr = call("sparse_decode", values, indices, grad, *offsets, backend=ctx.asked).to(rows.dtype)
        return None, None, dv, None, dr, None, *(None for _ in offsets)


def run_plain(op: str, first: Tensor, *args: Any) -> Any:
    """An op outside autograd: what it returns has no gradient, whatever it was given."""
    _, run = dispatch.select(op, dispatch.requested(), first, *args)
    with torch.no_grad():
        return plain(run, first, *args)


_FUNCTIONS = {
    "topk_encode": _Encode,
    "batch_topk_encode": _Encode,
    "threshold_encode": _Encode,
    "dead_encode": _DeadEncode,
    "sparse_decode": _SparseDecode,
    "decode_residual": _DecodeResidual,
    "gather_dot": _GatherDot,
    "segment_rows": _SegmentRows,
}
