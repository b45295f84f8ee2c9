"""Sparse top-k operations for sparse autoencoders; `N` rows, `D` width, `F` latents, `K` slots per row.

Encoders give sparse codes, decoders read them, and `latent_step` does everything between the
residual and the next weights. The differentiable ops are closed under differentiation: each one's
gradients are sums that another one computes, so every one can be differentiated, twice if need be,
and a backend that implements the forward computations has implemented the backward passes too.

Codes. Values and indices are [N, K]; where rows differ in their number of slots they are [M], and
`offsets` [N + 1] int64 says where each row's slots begin (offsets[0] = 0, offsets[N] = M).
Indices are int32 and in range (checked on CPU only: a GPU would have to be waited for). A zero value
is an empty slot. Repeated indices add up.

Numbers are finite: 0 * inf is NaN. Sums are taken in float32, in float64 if an argument is float64.
Two runs on one machine with one thread count give the same bits, except those of the reference on a GPU.
"""

from torch import Tensor

from sae_kernels import autograd
from sae_kernels.contracts import (
    check_codes,
    check_encoder,
    check_gather,
    check_k,
    check_latents,
    check_one,
    check_residual,
    check_segments,
    check_settle,
    check_sparse_grad,
    check_step,
    check_threshold,
)
from sae_kernels.dispatch import available_backends, use_backend
from sae_kernels.fallbacks import fallbacks
from sae_kernels.latents import AdamStep, Counters, DeadGrads, Latents, Weight
from sae_kernels.many import latent_step_many, numbered, topk_encode_many

__all__ = [
    "AdamStep",
    "Counters",
    "DeadGrads",
    "Latents",
    "Weight",
    "available_backends",
    "batch_topk_encode",
    "dead_encode",
    "decode_residual",
    "fallbacks",
    "gather_dot",
    "latent_step",
    "latent_step_many",
    "numbered",
    "segment_rows",
    "settle",
    "sparse_decode",
    "sparse_grad",
    "threshold_encode",
    "topk_encode",
    "topk_encode_many",
    "use_backend",
]


def topk_encode(x: Tensor, w: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of relu(x @ w.T + b) in each row.

    The order of the slots is the backend's. Between equal pre-activations at the k-th place the
    reference takes the smaller index; another backend may take another one, so its values are the
    same multiset, and its indices the same set but for such ties.

    Under autocast x and w are rounded to the autocast dtype before they are multiplied (on ROCm the backend
    `torch` rounds the product too); gradients are those of the unrounded product, summed in float32. On a GPU
    float32 operands are multiplied by torch, in TF32 where torch has been allowed that; rows whose candidates
    did not suffice (`fallbacks`) are encoded again in IEEE float32.

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
    check_encoder(x, w, b)
    check_k(k, len(w))
    values, indices = autograd.call("topk_encode", x, w, b, k)
    return values, indices


def batch_topk_encode(x: Tensor, w: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The N * k largest of relu(x @ w.T + b) over all rows together, so that rows share the budget.

    Ties, rounding under autocast and gradients are as in `topk_encode`. The slots of a row are in the
    backend's order, and rows are in order.

    Args:
        x, w, b: as in `topk_encode`.
        k: mean number of slots per row, 1 to F.

    Returns:
        values [N * k] float32, never negative; differentiable in x, w and b through slots not empty.
        indices [N * k] int32, distinct within a row; not differentiable.
        offsets [N + 1] int64; not differentiable.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or k is not in 1..F.

    Source: BatchTopK of Bussmann et al. 2024 (arXiv:2412.06410)."""
    check_encoder(x, w, b)
    check_k(k, len(w))
    values, indices, offsets = autograd.call("batch_topk_encode", x, w, b, k)
    return values, indices, offsets


def threshold_encode(x: Tensor, w: Tensor, b: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All pre-activations h = x @ w.T + b that are above their latent's threshold and above zero.

    JumpReLU, and inference with thresholds learned in training (BatchTopK). How many there are is known
    only afterwards, so the host waits for the device: once with Triton, which keeps what it finds in places
    that it has counted on; once for each chunk of rows with the torch backend, which allocates as it goes.

    Args:
        x, w, b: as in `topk_encode`; rounding under autocast likewise.
        threshold: [F], or [] for one threshold. Not differentiable here: a straight-through estimator
            needs the pre-activations around it, which a lower threshold selects too.

    Returns:
        values [M] float32, all positive; differentiable in x, w and b.
        indices [M] int32, distinct within a row; not differentiable.
        offsets [N + 1] int64; not differentiable.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.

    Source: JumpReLU of Rajamanoharan et al. 2024 (arXiv:2407.14435)."""
    check_encoder(x, w, b)
    check_threshold(threshold, w)
    values, indices, offsets = autograd.call("threshold_encode", x, w, b, threshold)
    return values, indices, offsets


def dead_encode(x: Tensor, w: Tensor, b: Tensor, k: int) -> Tensor:
    """The k largest of relu(x @ w.T + b) in each row, at their places in a dense tensor.

    For few latents and large k, where dense products beat gathers: AuxK over the rows of the dead
    latents, which the caller has taken out of the weights. Exactly k latents are kept however many tie.

    Args:
        x: [N, D].
        w: [F, D] rows of the dead latents. b: [F].
        k: latents kept per row, at least 1; all that are positive if k is F or more.

    Returns:
        [N, F] float32, zero where nothing was kept; differentiable in x, w and b.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or k is below 1."""
    check_encoder(x, w, b)
    check_k(k, None)
    return autograd.call("dead_encode", x, w, b, k)


def sparse_decode(values: Tensor, indices: Tensor, weight: Tensor, offsets: Tensor | None = None) -> Tensor:
    """out[n] = sum over the slots j of row n of values[j] * weight[indices[j]].

    Differentiable in values and weight. The gradient of an empty slot's value is that of the formula,
    <grad[n], weight[indices[j]]>; the encoders let none of it through.

    Args:
        values: [N, K], or [M] with offsets.
        indices: int32, as values.
        weight: [F, D].
        offsets: [N + 1] int64.

    Returns:
        [N, D] in weight's dtype.

    Raises:
        ValueError: shapes, dtypes or devices do not fit."""
    check_codes(values, indices, weight, offsets)
    return autograd.call("sparse_decode", values, indices, weight, *_given(offsets))


def decode_residual(
    values: Tensor,
    indices: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """target - (sparse_decode(values, indices, weight) + bias), squared norms, products with the codes' rows.

    One pass over the gathered rows does the decoder, the loss, and what the backward needs of the decoder.

    Args:
        values, indices, weight, offsets: as in `sparse_decode`.
        bias: [D].
        target: [N, D].

    Returns:
        residual [N, D] in target's dtype. Differentiable in values, weight, bias and target.
        loss [N] float32: sum of squares of each row, before it is rounded to target's dtype.
            Differentiable likewise, as the norm of the residual that is returned.
        dots, float32, as values: <residual[n], weight[indices[j]]>, the gradient of -loss / 2 in values.
            Not differentiable.

    Raises:
        ValueError: shapes, dtypes or devices do not fit."""
    check_residual(values, indices, weight, bias, target, offsets)
    args = (values, indices, weight, bias, target, *_given(offsets))
    residual, loss, dots = autograd.call("decode_residual", *args)
    return residual, loss, dots


def gather_dot(rows: Tensor, indices: Tensor, weight: Tensor, offsets: Tensor | None = None) -> Tensor:
    """out[j] = <rows[n], weight[indices[j]]> for the slots j of row n: `rows @ weight.T` at a few places.

    This is the gradient of `sparse_decode` in its values. Differentiable in rows and weight.

    Args:
        rows: [N, D].
        indices: [N, K] int32, or [M] with offsets.
        weight: [F, D].
        offsets: [N + 1] int64.

    Returns:
        float32, of the shape of indices.

    Raises:
        ValueError: shapes, dtypes or devices do not fit."""
    check_gather(rows, indices, weight, offsets)
    return autograd.call("gather_dot", rows, indices, weight, *_given(offsets))


def segment_rows(
    values: Tensor, indices: Tensor, rows: Tensor, d_sae: int, offsets: Tensor | None = None
) -> Tensor:
    """out[f] = sum over slots j with indices[j] = f of values[j] * rows[n], n being the slot's row.

    This is the gradient of `sparse_decode` in its weight. The fast backends sort the slots by latent,
    skip empty ones and sum each latent's rows in a fixed order: no float atomics. Differentiable in
    values and rows.

    Args:
        values: [N, K], or [M] with offsets.
        indices: int32, as values, each below d_sae.
        rows: [N, D].
        d_sae: number of latents F.
        offsets: [N + 1] int64.

    Returns:
        [d_sae, D] float32; zero for a latent that no slot names.

    Raises:
        ValueError: shapes, dtypes or devices do not fit."""
    check_segments(values, indices, rows, d_sae, offsets)
    return autograd.call("segment_rows", values, indices, rows, d_sae, *_given(offsets))


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
    """All gradients of a linear SAE at once, from scale * g, the gradient in its output. Not differentiable.

        z = values, x_hat = sparse_decode(z) + b_dec, and z came of `x @ w_enc.T + b_enc`

    Args:
        x: [N, D] what was encoded.
        g: [N, D] gradient in x_hat, up to `scale`; with the residual and scale = -2 / (N D), that of the
            mean squared error.
        values, indices, offsets: codes, as in `sparse_decode`.
        w_dec: [F, D].
        dots: <g[n], w_dec[indices[j]]>, as values, if it is known already (`decode_residual`).

    Returns:
        dz, as values: gradient in the pre-activations, 0 in empty slots.
        d_w_enc, d_w_dec [F, D]; d_b_enc [F]; d_b_dec [D], through x_hat alone. All float32.

    Raises:
        ValueError: shapes, dtypes or devices do not fit."""
    check_sparse_grad(x, g, values, indices, w_dec, dots, offsets)
    return autograd.run_plain("sparse_grad", x, g, values, indices, w_dec, scale, dots, offsets)


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
    """Backward, projection, clipping, Adam, renormalisation and counters of a linear SAE, in place.

    Equal to: the gradients of `sparse_grad` (those of `dead` added); `d_b_dec - d_b_enc @ w_enc` if
    `centred`; the part of d_w_dec that only stretches rows removed if `unit_norm`; all scaled by
    min(1, clip / (norm + 1e-6)); one Adam step; unit rows of w_dec again. A step whose gradient norm is
    not finite changes no parameter, moment or step count. Not differentiable; never waits for the device.

    Args:
        x: [N, D] what was encoded.
        residual, dots: of `decode_residual`, `dots` with w_dec as it is before this step.
        values, indices, offsets: codes.
        latents: parameters and moments; updated.
        adam: hyperparameters of this step.
        scale: gradient in x_hat per residual: -2 / (N D) for the mean squared error over rows and width.
        centred: x is (something - b_dec), so that b_dec has a gradient through the encoder too.
        unit_norm: rows of w_dec are unit vectors and stay so.
        clip: largest gradient norm, over all parameters; None leaves gradients as they are.
        clip_norm: 0-dim norm to compare with `clip` instead of this step's own, which then needs no
            pass of its own (the norm of the last step that was made, say). NaN skips the step. Without
            `clip` it is not looked at.
        dead: gradients of another loss in some rows.
        counters: statistics to update; also in a step that is skipped.

    Returns:
        0-dim float32: this step's gradient norm before clipping.

    Raises:
        ValueError: shapes, dtypes, devices or options do not fit."""
    check_one(latents)
    check_latents(x, residual, values, indices, dots, latents, adam, offsets)
    check_step(latents, clip, clip_norm, dead, counters)
    return autograd.run_plain(
        "latent_step",
        *(x, residual, values, indices, dots, latents, adam, scale, centred, unit_norm),
        *(clip, clip_norm, dead, counters, offsets),
    )


def settle(latents: Latents, adam: AdamStep) -> None:
    """Catch up the rows that lazy steps have left alone (`Latents.last_step`): before saving or comparing.

    Raises:
        ValueError: latents are those of several SAEs, or adam is not that of lazy steps (beta1 = 0)."""
    check_settle(latents, adam)
    autograd.run_plain("settle", latents.step, latents, adam)


def _given(offsets: Tensor | None) -> tuple[Tensor, ...]:
    return () if offsets is None else (offsets,)
