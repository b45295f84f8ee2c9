"""What every op demands of its arguments and promises about dtypes, whatever the backend."""

import torch
from torch import Tensor


def accumulate_dtype(*tensors: Tensor) -> torch.dtype:
    """float32, or float64 as soon as one argument is float64 (gradient checks)."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def product_dtype(x: Tensor, w: Tensor) -> torch.dtype:
    """The dtype to which the operands of the encoder product are rounded.

    The autocast dtype under autocast (float64 is left alone, as torch's own autocast does),
    otherwise the wider of the two.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device) and torch.float64 not in (x.dtype, w.dtype):
        return torch.get_autocast_dtype(device)
    return torch.promote_types(x.dtype, w.dtype)


def check_encoder(x: Tensor, w: Tensor, b: Tensor, k: int) -> None:
    if x.dim() != 2 or w.dim() != 2 or x.shape[1] != w.shape[1]:
        raise ValueError(f"x is {tuple(x.shape)} and w is {tuple(w.shape)}: expected [N, D] and [F, D]")
    if b.shape != w.shape[:1]:
        raise ValueError(f"b is {tuple(b.shape)}: expected [{w.shape[0]}], one per row of w")
    if not 1 <= k <= w.shape[0]:
        raise ValueError(f"k is {k}: expected 1 to {w.shape[0]}, the number of latents")
    _check_float_on_one_device(x=x, w=w, b=b)


def check_codes(values: Tensor, indices: Tensor, weight: Tensor) -> None:
    """Arguments of `sparse_decode`."""
    if values.dim() != 2 or values.shape != indices.shape:
        shapes = f"values is {tuple(values.shape)} and indices {tuple(indices.shape)}"
        raise ValueError(f"{shapes}: expected [N, K] twice")
    if weight.dim() != 2:
        raise ValueError(f"weight is {tuple(weight.shape)}: expected [F, D]")
    _check_float_on_one_device(values=values, weight=weight)
    _check_indices(indices, weight)


def check_gather(rows: Tensor, indices: Tensor, weight: Tensor) -> None:
    """Arguments of `gather_dot`."""
    if rows.dim() != 2 or weight.dim() != 2 or rows.shape[1] != weight.shape[1]:
        shapes = f"rows is {tuple(rows.shape)} and weight is {tuple(weight.shape)}"
        raise ValueError(f"{shapes}: expected [N, D] and [F, D]")
    if indices.dim() != 2 or len(indices) != len(rows):
        raise ValueError(f"indices is {tuple(indices.shape)}: expected [{len(rows)}, K]")
    _check_float_on_one_device(rows=rows, weight=weight)
    _check_indices(indices, weight)


def check_segments(values: Tensor, indices: Tensor, rows: Tensor, d_sae: int) -> None:
    """Arguments of `segment_rows`."""
    if values.dim() != 2 or values.shape != indices.shape:
        shapes = f"values is {tuple(values.shape)} and indices {tuple(indices.shape)}"
        raise ValueError(f"{shapes}: expected [N, K] twice")
    if rows.dim() != 2 or len(rows) != len(values):
        raise ValueError(f"rows is {tuple(rows.shape)}: expected [{len(values)}, D]")
    if d_sae < 1:
        raise ValueError(f"d_sae is {d_sae}: expected at least 1")
    _check_float_on_one_device(values=values, rows=rows)
    _check_indices(indices, rows)


def _check_float_on_one_device(**tensors: Tensor) -> None:
    first, where = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}: expected a floating point dtype")
        if tensor.device != where.device:
            raise ValueError(f"{name} is on {tensor.device}: expected {where.device}, where {first} is")


def _check_indices(indices: Tensor, beside: Tensor) -> None:
    if indices.dtype != torch.int32:
        raise ValueError(f"indices is {indices.dtype}: expected torch.int32")
    if indices.device != beside.device:
        raise ValueError(f"indices is on {indices.device}: expected {beside.device}")
