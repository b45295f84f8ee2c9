"""Our parameters, moments and counters in every storage format, and which encoder reads them."""

import os

import torch
from gpu_problem import CHUNK, Problem, dictionary
from sae_kernels import AdamStep, Counters, Latents, Weight
from sae_kernels.latents import split
from torch import Tensor

FORMATS = {  # what each keeps, for the report
    "fp32": {"masters": "fp32 and a bf16 copy", "moments": "fp32"},
    "split": {"masters": "fp32 as bf16 + int16", "moments": "fp32"},
    "bf16-moments": {"masters": "fp32 as bf16 + int16", "moments": "bf16, rounded stochastically"},
    "lazy": {"masters": "fp32 as bf16 + int16", "moments": "fp32, active rows only, beta1 0"},
}


def make_latents(p: Problem, fmt: str, device: str, noisy_moments: bool = False) -> Latents:
    """Encoder and decoder equal to the dictionary; moments zero, or random as if after ten steps."""
    draw = torch.Generator(device).manual_seed(2)
    moment = torch.bfloat16 if fmt == "bf16-moments" else torch.float32

    def make(value: Tensor, whole: bool) -> Weight:
        dtype = moment if whole else torch.float32
        first, second = (torch.zeros(value.shape, dtype=dtype, device=device) for _ in range(2))
        if noisy_moments:
            for part, other in zip(_parts(first), _parts(second), strict=True):
                noise = torch.randn(part.shape, generator=draw, device=device) * 1e-6
                part.copy_(noise if fmt != "lazy" else torch.zeros_like(noise))
                other.copy_(noise.square())
        if not whole:
            return Weight(value, first, second)
        if fmt == "fp32":
            return Weight(value, first, second, low=value.bfloat16())
        upper = torch.empty_like(value, dtype=torch.bfloat16)
        remainder = torch.empty_like(value, dtype=torch.int16)
        for part, high, low in zip(_parts(value), _parts(upper), _parts(remainder), strict=True):
            a, b = split(part)
            high.copy_(a)
            low.copy_(b)
        return Weight(upper, first, second, remainder=remainder)

    step = torch.full((), 10.0 if noisy_moments else 0.0, device=device)
    w_enc = make(dictionary(p, device), whole=True)
    w_dec = make(dictionary(p, device), whole=True)
    b_enc = make(torch.zeros(p.f, device=device), whole=False)
    b_dec = make(torch.zeros(p.d, device=device), whole=False)
    last = torch.full((p.f,), int(step), dtype=torch.int32, device=device) if fmt == "lazy" else None
    return Latents(w_enc=w_enc, w_dec=w_dec, b_enc=b_enc, b_dec=b_dec, step=step, last_step=last)


def adam_step(fmt: str) -> AdamStep:
    return AdamStep(lr=1e-4, beta1=0.0 if fmt == "lazy" else 0.9)


def make_counters(p: Problem, device: str) -> Counters:
    counts, sums, last_fired = (torch.zeros(p.f, dtype=torch.int64, device=device) for _ in range(3))
    return Counters(counts, sums, torch.zeros(p.f, device=device), last_fired, tokens=p.n)


def tensors_of(latents: Latents) -> list[Tensor]:
    """Everything that a step changes."""
    found = [latents.step] + ([] if latents.last_step is None else [latents.last_step])
    for weight in (latents.w_enc, latents.b_enc, latents.w_dec, latents.b_dec):
        fields = (weight.value, weight.first, weight.second, weight.low, weight.remainder)
        found += [tensor for tensor in fields if tensor is not None]
    return found


def set_encoder(name: str) -> None:
    """Which encoder `topk_encode` takes from now on: e1, e2, or its own choice."""
    os.environ.pop("SAE_KERNELS_ENCODER", None)
    if name != "auto":
        os.environ["SAE_KERNELS_ENCODER"] = name


def master_rows(weight: Weight, rows: Tensor | slice) -> Tensor:
    """Rows of a parameter in float64, joined from its halves where it is split."""
    value, remainder = weight.value[rows], weight.remainder
    if remainder is None:
        return value.double()
    bits = (value.contiguous().view(torch.int16).int() << 16) + remainder[rows].int()
    return bits.view(torch.float32).double()


def _parts(tensor: Tensor) -> tuple[Tensor, ...]:
    return tensor.split(max(1, CHUNK // max(1, tensor[0].numel() if len(tensor) else 1)))
