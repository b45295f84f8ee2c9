"""What every op demands of its arguments and promises about dtypes, whatever the backend."""

from numbers import Integral

import torch
from torch import Tensor

from sae_kernels.latents import AdamStep, Counters, DeadGrads, Latents, Weight
from sae_kernels.slots import num_rows


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


def check_encoder(x: Tensor, w: Tensor, b: Tensor) -> None:
    if x.dim() != 2 or w.dim() != 2 or x.shape[1] != w.shape[1]:
        raise ValueError(f"x is {tuple(x.shape)} and w is {tuple(w.shape)}: expected [N, D] and [F, D]")
    if b.shape != w.shape[:1]:
        raise ValueError(f"b is {tuple(b.shape)}: expected [{w.shape[0]}], one per row of w")
    _check_float_on_one_device(x=x, w=w, b=b)


def check_k(k: int, most: int | None) -> None:
    """Of `dead_encode`, which may be asked for more than there are latents, `most` is None."""
    if not isinstance(k, Integral) or k < 1 or (most is not None and k > most):
        wanted = "a whole number of at least 1" if most is None else f"1 to {most}, the number of latents"
        raise ValueError(f"k is {k}: expected {wanted}")


def check_threshold(threshold: Tensor, w: Tensor) -> None:
    """The argument of `threshold_encode` that other encoders do not have."""
    _check_tensors(threshold=threshold)
    if threshold.dim() != 0 and threshold.shape != w.shape[:1]:
        raise ValueError(f"threshold is {tuple(threshold.shape)}: expected [{w.shape[0]}] or []")
    _check_float_on_one_device(w=w, threshold=threshold)


def check_codes(values: Tensor, indices: Tensor, weight: Tensor, offsets: Tensor | None) -> None:
    """Arguments of `sparse_decode`."""
    _check_pair(values, indices, offsets)
    if weight.dim() != 2:
        raise ValueError(f"weight is {tuple(weight.shape)}: expected [F, D]")
    _check_float_on_one_device(values=values, weight=weight)
    _check_indices(indices, weight, offsets, len(weight))


def check_residual(
    values: Tensor, indices: Tensor, weight: Tensor, bias: Tensor, target: Tensor, offsets: Tensor | None
) -> None:
    """Arguments of `decode_residual`."""
    check_codes(values, indices, weight, offsets)
    rows = num_rows(indices, offsets)
    if bias.shape != weight.shape[1:]:
        raise ValueError(f"bias is {tuple(bias.shape)}: expected [{weight.shape[1]}], the width of weight")
    if target.shape != (rows, weight.shape[1]):
        raise ValueError(f"target is {tuple(target.shape)}: expected [{rows}, {weight.shape[1]}]")
    _check_float_on_one_device(weight=weight, bias=bias, target=target)


def check_gather(rows: Tensor, indices: Tensor, weight: Tensor, offsets: Tensor | None) -> None:
    """Arguments of `gather_dot`."""
    if rows.dim() != 2 or weight.dim() != 2 or rows.shape[1] != weight.shape[1]:
        shapes = f"rows is {tuple(rows.shape)} and weight is {tuple(weight.shape)}"
        raise ValueError(f"{shapes}: expected [N, D] and [F, D]")
    if indices.dim() != (2 if offsets is None else 1) or num_rows(indices, offsets) != len(rows):
        layout = f"[{len(rows)}, K]" if offsets is None else f"[M] with offsets [{len(rows) + 1}]"
        raise ValueError(f"indices is {tuple(indices.shape)}: expected {layout}")
    _check_float_on_one_device(rows=rows, weight=weight)
    _check_indices(indices, weight, offsets, len(weight))


def check_segments(values: Tensor, indices: Tensor, rows: Tensor, d_sae: int, offsets: Tensor | None) -> None:
    """Arguments of `segment_rows`."""
    _check_pair(values, indices, offsets)
    if rows.dim() != 2 or len(rows) != num_rows(indices, offsets):
        raise ValueError(f"rows is {tuple(rows.shape)}: expected [{num_rows(indices, offsets)}, D]")
    if d_sae < 1:
        raise ValueError(f"d_sae is {d_sae}: expected at least 1")
    _check_float_on_one_device(values=values, rows=rows)
    _check_indices(indices, rows, offsets, d_sae)


def check_sparse_grad(
    x: Tensor,
    g: Tensor,
    values: Tensor,
    indices: Tensor,
    w_dec: Tensor,
    dots: Tensor | None,
    offsets: Tensor | None,
    name_of_g: str = "g",
) -> None:
    check_codes(values, indices, w_dec, offsets)
    shape = (num_rows(indices, offsets), w_dec.shape[1])
    for name, rows in (("x", x), (name_of_g, g)):
        if rows.shape != shape:
            raise ValueError(f"{name} is {tuple(rows.shape)}: expected {list(shape)}")
    if dots is not None and dots.shape != values.shape:
        raise ValueError(f"dots is {tuple(dots.shape)}: expected {tuple(values.shape)} as values")
    floats = {"w_dec": w_dec, "x": x, name_of_g: g}
    _check_float_on_one_device(**floats, **({} if dots is None else {"dots": dots}))


def check_latents(
    x: Tensor,
    residual: Tensor,
    values: Tensor,
    indices: Tensor,
    dots: Tensor,
    latents: Latents,
    adam: AdamStep,
    offsets: Tensor | None,
) -> None:
    """Arguments of `latent_step`, or of `latent_step_many` with M before every shape."""
    w_dec, rows = latents.w_dec.value, (x, residual, values, indices, dots)
    many = w_dec.shape[:-2]
    if many:
        if any(t.dim() != 3 or t.shape[:1] != many for t in rows):
            shapes = ", ".join(str(tuple(t.shape)) for t in rows)
            raise ValueError(
                f"x, residual, values, indices and dots are {shapes}: expected [{many[0]}, N, ...]"
            )
        x, residual, values, indices, dots = (t.flatten(0, 1) for t in rows)
        w_dec = w_dec[0]
    check_sparse_grad(x, residual, values, indices, w_dec, dots, offsets, "residual")
    f, d = w_dec.shape
    for name, of_one in {"w_enc": (f, d), "b_enc": (f,), "w_dec": (f, d), "b_dec": (d,)}.items():
        shape = (*many, *of_one)
        weight = getattr(latents, name)
        wanted = {"value": torch.float32, "first": None, "second": None, "low": torch.bfloat16}
        if weight.remainder is not None:
            wanted |= {"value": torch.bfloat16, "remainder": torch.int16}
        for field, dtype in wanted.items():
            tensor = getattr(weight, field)
            if tensor is None:
                continue
            if tensor.shape != shape or not tensor.is_contiguous():
                raise ValueError(
                    f"{name}.{field} is {tuple(tensor.shape)}: expected a contiguous {list(shape)}"
                )
            if tensor.device != x.device:
                raise ValueError(f"{name}.{field} is on {tensor.device}: expected {x.device}, where x is")
            accepted = (torch.float32, torch.bfloat16) if dtype is None else (dtype,)
            if tensor.dtype not in accepted:
                raise ValueError(
                    f"{name}.{field} is {tensor.dtype}: expected {' or '.join(map(str, accepted))}"
                )
        if weight.first.dtype != weight.second.dtype:
            raise ValueError(
                f"{name}.first is {weight.first.dtype}: expected {weight.second.dtype}, as second"
            )
        if weight.remainder is not None and weight.low is not None:
            raise ValueError(f"{name} has a remainder and a low copy: its value is the low copy already")
    if _format(latents.w_enc) != _format(latents.w_dec):
        formats = f"{_format(latents.w_enc)} and {_format(latents.w_dec)}"
        raise ValueError(f"w_enc and w_dec keep {formats}: expected one format for both")
    if latents.last_step is not None and adam.beta1 != 0:
        raise ValueError(f"beta1 is {adam.beta1} with last_step set: lazy steps are exact for beta1 = 0 only")


def _format(weight: Weight) -> str:
    kept = (name for name in ("low", "remainder") if getattr(weight, name) is not None)
    return ", ".join(("value", *kept, f"moments of {weight.first.dtype}"))


def check_step(
    latents: Latents,
    clip: float | None,
    clip_norm: Tensor | None,
    dead: DeadGrads | None,
    counters: Counters | None,
) -> None:
    """Options and counters of `latent_step`: a kernel would write past the end of one that is too short.

    Those of `latent_step_many` have M before every shape but `dead`'s, which is one SAE's."""
    *many, f, d = latents.w_dec.value.shape
    if clip is not None and not clip > 0:
        raise ValueError(f"clip is {clip}: expected a positive number")
    tensors: list[tuple[str, Tensor, tuple[int, ...], torch.dtype | None]]  # name, tensor, shape, dtype
    tensors = [("latents.step", latents.step, (*many,), torch.float32)]
    if latents.last_step is not None:
        tensors.append(("latents.last_step", latents.last_step, (*many, f), torch.int32))
    if clip_norm is not None:
        _check_tensors(clip_norm=clip_norm)
        tensors.append(("clip_norm", clip_norm, (*many,), None))
    if dead is not None:
        n = dead.latents.numel()
        tensors.append(("dead.latents", dead.latents, (n,), torch.int64))
        tensors += [("dead.w_enc", dead.w_enc, (n, d), None), ("dead.w_dec", dead.w_dec, (n, d), None)]
        tensors.append(("dead.b_enc", dead.b_enc, (n,), None))
        rows = {f"dead.{name}": getattr(dead, name) for name in ("w_enc", "b_enc", "w_dec")}
        _check_float_on_one_device(w_dec=latents.w_dec.value, **rows)
    if counters is not None:
        if not isinstance(counters.tokens, Integral):
            raise ValueError(f"counters.tokens is {counters.tokens!r}: expected a whole number")
        tensors.append(("counters.maxima", counters.maxima, (*many, f), torch.float32))
        for name in ("counts", "sums", "last_fired"):
            tensors.append((f"counters.{name}", getattr(counters, name), (*many, f), torch.int64))
    for name, tensor, shape, dtype in tensors:
        if tensor.shape != shape or (dtype is not None and tensor.dtype != dtype):
            wanted = f"{list(shape)}" if dtype is None else f"{dtype} {list(shape)}"
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}: expected {wanted}")
        if tensor.device != latents.w_dec.value.device:
            raise ValueError(f"{name} is on {tensor.device}: expected {latents.w_dec.value.device}")
        # Kernels write by place, not by stride.
        if not tensor.is_contiguous() and not name.startswith("dead."):
            raise ValueError(f"{name} has strides {tensor.stride()}: expected a contiguous tensor")
    if dead is not None and dead.latents.device.type == "cpu":  # a GPU would have to be waited for
        ordered = dead.latents.sort().values
        if len(ordered) and not 0 <= int(ordered[0]) <= int(ordered[-1]) < f:
            run = f"run from {int(ordered[0])} to {int(ordered[-1])}"
            raise ValueError(f"dead.latents {run}: expected 0 to {f - 1}")
        repeated = ordered[1:][ordered.diff() == 0]
        if len(repeated):
            raise ValueError(f"dead.latents has {int(repeated[0])} twice: expected each latent once")


def check_settle(latents: Latents, adam: AdamStep) -> None:
    """Arguments of `settle`, where there is something to settle."""
    check_one(latents)
    if latents.last_step is None:
        return
    if adam.beta1 != 0:
        raise ValueError(f"beta1 is {adam.beta1} with last_step set: lazy steps are exact for beta1 = 0 only")
    check_step(latents, None, None, None, None)


def check_one(latents: Latents) -> None:
    """Raises ValueError if these are several SAEs', stacked."""
    if latents.w_dec.value.dim() != 2:
        shape = tuple(latents.w_dec.value.shape)
        raise ValueError(f"w_dec is {shape}: expected [F, D], of one SAE (`Latents.one` of several)")


def _check_tensors(**tensors: object) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} is {tensor!r}: expected a tensor")


def _check_pair(values: Tensor, indices: Tensor, offsets: Tensor | None) -> None:
    dim, layout = (2, "[N, K]") if offsets is None else (1, "[M]")
    if values.dim() != dim or values.shape != indices.shape:
        shapes = f"values is {tuple(values.shape)} and indices {tuple(indices.shape)}"
        raise ValueError(f"{shapes}: expected {layout} twice")


def _check_float_on_one_device(**tensors: Tensor) -> None:
    first, where = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}: expected a floating point dtype")
        if tensor.device != where.device:
            raise ValueError(f"{name} is on {tensor.device}: expected {where.device}, where {first} is")


def _check_indices(indices: Tensor, beside: Tensor, offsets: Tensor | None, d_sae: int) -> None:
    if indices.dtype != torch.int32:
        raise ValueError(f"indices is {indices.dtype}: expected torch.int32")
    for name, tensor in (("indices", indices), ("offsets", offsets)):
        if tensor is not None and tensor.device != beside.device:
            raise ValueError(f"{name} is on {tensor.device}: expected {beside.device}")
    if offsets is not None and (offsets.dtype != torch.int64 or offsets.dim() != 1 or len(offsets) < 1):
        raise ValueError(f"offsets is {offsets.dtype} {tuple(offsets.shape)}: expected torch.int64 [N + 1]")
    if indices.device.type == "cpu":
        _check_contents(indices, offsets, d_sae)


def _check_contents(indices: Tensor, offsets: Tensor | None, d_sae: int) -> None:
    """Library calls on a CPU read and write memory out of range in silence; 11 us buy an error."""
    if indices.numel():
        least, most = (int(i) for i in indices.aminmax())
        if least < 0 or most >= d_sae:
            raise ValueError(f"indices run from {least} to {most}: expected 0 to {d_sae - 1}")
    if offsets is not None:
        first, last, slots = int(offsets[0]), int(offsets[-1]), len(indices)
        if first != 0 or last != slots or bool((offsets.diff() < 0).any()):
            order = "ascending" if bool((offsets.diff() >= 0).all()) else "not ascending"
            raise ValueError(f"offsets run from {first} to {last}, {order}: expected 0 to {slots}, ascending")
