"""Sparse top-k operations for sparse autoencoders; `N` rows, `D` width, `F` latents, `K` slots per row.

Four ops, closed under differentiation: each one's gradients are sums that another one computes,
so every op can be differentiated, twice if need be, and a backend that implements the four
forward computations has implemented the backward passes too.

Shared rules. Indices are int32 and in range (checked on CPU only: a GPU would have to be waited
for). A zero value is an empty slot. Repeated indices add up. Numbers are finite: 0 * inf is NaN.
Sums are taken in float32, in float64 if an argument is float64. Two runs on one machine with one
thread count give the same bits, except those of the reference on a GPU.
"""

from torch import Tensor

from sae_kernels import autograd
from sae_kernels.contracts import check_codes, check_encoder, check_gather, check_segments
from sae_kernels.dispatch import available_backends, use_backend

__all__ = ["available_backends", "gather_dot", "segment_rows", "sparse_decode", "topk_encode", "use_backend"]


def topk_encode(x: Tensor, w: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of relu(x @ w.T + b) in each row.

    The order of the slots is the backend's. Between equal pre-activations at the k-th place the
    reference takes the smaller index; another backend may take another one, so its values are the
    same multiset, and its indices the same set but for such ties.

    Under autocast x and w are rounded to the autocast dtype before they are multiplied (the product
    may be rounded to it too); gradients are those of the unrounded product, summed in float32.

    Args:
        x: [N, D] rows.
        w: [F, D] encoder, one latent per row.
        b: [F] bias.
        k: slots per row, 1 to F.

    Returns:
        values [N, k] float32, never negative; 0 where the pre-activation was not positive (an empty
        slot). Differentiable in x, w and b, through slots that are not empty.
        indices [N, k] int32, distinct within a row and in range even for empty slots; not differentiable.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or k is not in 1..F.

    Source: TopK activation of Gao et al. 2024 (arXiv:2406.04093)."""
    check_encoder(x, w, b, k)
    values, indices = autograd.call("topk_encode", x, w, b, k)
    return values, indices


def sparse_decode(values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    """out[n] = sum_j values[n, j] * weight[indices[n, j]].

    Differentiable in values and weight. The gradient of an empty slot's value is that of the formula,
    <grad[n], weight[indices[n, j]]>; `topk_encode` lets none of it through.

    Args:
        values: [N, K].
        indices: [N, K] int32.
        weight: [F, D].

    Returns:
        [N, D] in weight's dtype.

    Raises:
        ValueError: shapes, dtypes or devices do not fit."""
    check_codes(values, indices, weight)
    return autograd.call("sparse_decode", values, indices, weight)


def gather_dot(rows: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    """out[n, j] = <rows[n], weight[indices[n, j]]>: `rows @ weight.T` at K places per row.

    This is the gradient of `sparse_decode` in its values. Differentiable in rows and weight.

    Args:
        rows: [N, D].
        indices: [N, K] int32.
        weight: [F, D].

    Returns:
        [N, K] float32.

    Raises:
        ValueError: shapes, dtypes or devices do not fit."""
    check_gather(rows, indices, weight)
    return autograd.call("gather_dot", rows, indices, weight)


def segment_rows(values: Tensor, indices: Tensor, rows: Tensor, d_sae: int) -> Tensor:
    """out[f] = sum over slots (n, j) with indices[n, j] = f of values[n, j] * rows[n].

    This is the gradient of `sparse_decode` in its weight. The fast backends sort the slots by latent,
    skip empty ones and sum each latent's rows in order: no float atomics. Differentiable in values and rows.

    Args:
        values: [N, K].
        indices: [N, K] int32, each below d_sae.
        rows: [N, D].
        d_sae: number of latents F.

    Returns:
        [d_sae, D] float32; zero for a latent that no slot names.

    Raises:
        ValueError: shapes, dtypes or devices do not fit."""
    check_segments(values, indices, rows, d_sae)
    return autograd.call("segment_rows", values, indices, rows, d_sae)
