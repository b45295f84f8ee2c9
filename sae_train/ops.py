"""The sparse kernels as torch.compile sees them: one operation each, with shapes and gradients but no inside.

Choosing a backend, checking indices and working in chunks are Python that a graph cannot hold. So while
torch.compile traces, these functions put a custom operation into the graph, which calls the
kernels when the graph runs, on whatever backend is in force then. Otherwise they are the kernels themselves.

A graph needs the shape of what an operation gives: only the ops with the same number of slots in every row
are here. Gradients are those of `sae_kernels.autograd`, where the ops are each other's derivatives.
"""

from typing import Any

import sae_kernels
import torch
from torch import Tensor, library


def topk_encode(x: Tensor, w: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`sae_kernels.topk_encode`: x [N, D], w [F, D], b [F] -> values [N, k] float32, indices [N, k] int32."""
    return (_topk_encode if torch.compiler.is_compiling() else sae_kernels.topk_encode)(x, w, b, k)


def sparse_decode(values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    """`sae_kernels.sparse_decode`: values, indices [N, K], weight [F, D] -> [N, D] in weight's dtype."""
    run = _sparse_decode if torch.compiler.is_compiling() else sae_kernels.sparse_decode
    return run(values, indices, weight)


def gather_dot(rows: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    """`sae_kernels.gather_dot`: rows [N, D], indices [N, K], weight [F, D] -> [N, K]."""
    run = _gather_dot if torch.compiler.is_compiling() else sae_kernels.gather_dot
    return run(rows, indices, weight)


@library.custom_op("sae_train::topk_encode", mutates_args=())
def _topk_encode(x: Tensor, w: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return sae_kernels.topk_encode(x, w, b, k)


@library.custom_op("sae_train::sparse_decode", mutates_args=())
def _sparse_decode(values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    return sae_kernels.sparse_decode(values, indices, weight)


@library.custom_op("sae_train::gather_dot", mutates_args=())
def _gather_dot(rows: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    return sae_kernels.gather_dot(rows, indices, weight)


@library.custom_op("sae_train::segment_rows", mutates_args=())
def _segment_rows(values: Tensor, indices: Tensor, rows: Tensor, d_sae: int) -> Tensor:
    return sae_kernels.segment_rows(values, indices, rows, d_sae)


def _wide(first: Tensor, *others: Tensor) -> torch.dtype:
    """What sums are taken in, as in `sae_kernels`."""
    return torch.float64 if torch.float64 in (first.dtype, *(t.dtype for t in others)) else torch.float32


@_topk_encode.register_fake
def _(x: Tensor, w: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values = x.new_empty(x.shape[0], k, dtype=_wide(x, w, b))
    return values, x.new_empty(x.shape[0], k, dtype=torch.int32)


@_sparse_decode.register_fake
def _(values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    return weight.new_empty(values.shape[0], weight.shape[1])


@_gather_dot.register_fake
def _(rows: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    return rows.new_empty(indices.shape, dtype=_wide(rows, weight))


@_segment_rows.register_fake
def _(values: Tensor, indices: Tensor, rows: Tensor, d_sae: int) -> Tensor:
    return rows.new_empty(d_sae, rows.shape[1], dtype=_wide(values, rows))


def _keep_encoded(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, w, b, _ = inputs
    values, indices = output
    ctx.save_for_backward(x, w, b, values, indices)
    ctx.mark_non_differentiable(indices)


def _encode_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, w, b, values, indices = ctx.saved_tensors
    dz = grad.masked_fill(values == 0, 0)
    dx = dw = db = None
    if ctx.needs_input_grad[0]:
        dx = _sparse_decode(dz, indices, w).to(x.dtype)
    if ctx.needs_input_grad[1]:
        dw = _segment_rows(dz, indices, x, w.shape[0]).to(w.dtype)
    if ctx.needs_input_grad[2]:
        ones = dz.new_ones(x.shape[0], 1)
        db = _segment_rows(dz, indices, ones, w.shape[0]).squeeze(1).to(b.dtype)
    return dx, dw, db, None


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _decode_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    values, indices, weight = ctx.saved_tensors
    dv = dw = None
    if ctx.needs_input_grad[0]:
        dv = _gather_dot(grad, indices, weight).to(values.dtype)
    if ctx.needs_input_grad[2]:
        dw = _segment_rows(values, indices, grad, weight.shape[0]).to(weight.dtype)
    return dv, None, dw


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    rows, indices, weight = ctx.saved_tensors
    dr = dw = None
    if ctx.needs_input_grad[0]:
        dr = _sparse_decode(grad, indices, weight).to(rows.dtype)
    if ctx.needs_input_grad[2]:
        dw = _segment_rows(grad, indices, rows, weight.shape[0]).to(weight.dtype)
    return dr, None, dw


_topk_encode.register_autograd(_encode_backward, setup_context=_keep_encoded)
_sparse_decode.register_autograd(_decode_backward, setup_context=_keep_inputs)
_gather_dot.register_autograd(_gather_backward, setup_context=_keep_inputs)
