"""Real sizes on a GPU, and what is trained there; made on the device, the same in every run.

Rows are sums of K rows of a dictionary and noise. Half of a row's slots go to a few busy latents, half to
any latent by Zipf's law, so that some latents are in a third of the rows and most in none: lists that are
cut into pieces, and rows of weights without a gradient. The dictionary is what encoder and decoder start as.

SAE_GPU_TESTS_TINY=1 runs every test without a GPU in Triton's interpreter, at sizes that it can bear: not
to prove kernels (tests/kernels does), but so that no line of these tests is tried first on a GPU.
"""

import os
from dataclasses import dataclass

import pytest
import torch
from sae_kernels import (
    AdamStep,
    Counters,
    DeadGrads,
    Latents,
    Weight,
    decode_residual,
    topk_encode,
    use_backend,
)
from sae_kernels.latents import split
from torch import Tensor

HAS_CUDA = torch.cuda.is_available()
TINY = not HAS_CUDA and os.environ.get("SAE_GPU_TESTS_TINY") == "1"
DEVICE = "cpu" if TINY else "cuda"
EPS = 2.0**-24  # float32 unit roundoff; a sum of m terms drifts by about m * EPS of its terms' magnitudes
BF16_EPS = 2.0**-8
needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.xdist_group("real sizes"),  # one at a time: each takes gigabytes
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        not (HAS_CUDA or TINY),
        reason="there is no CUDA device; SAE_GPU_TESTS_TINY=1 tries this in the interpreter",
    ),
]


@dataclass(frozen=True)
class Size:
    """N rows of width D, F latents, K slots per row."""

    n: int
    d: int
    f: int
    k: int


SIZES = {"A": Size(8192, 768, 24576, 32), "B": Size(8192, 2304, 65536, 64)}
if TINY:
    SIZES = {"A": Size(6, 20, 24, 3), "B": Size(4, 18, 17, 2)}
NAMES = ("w_enc", "b_enc", "w_dec", "b_dec")


def draws(seed: int) -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(seed)


def dictionary(size: Size) -> Tensor:
    """[F, D] float32 unit rows."""
    w = torch.randn(size.f, size.d, generator=draws(0), device=DEVICE)
    return w / w.norm(dim=1, keepdim=True)


def make_rows(size: Size, w: Tensor, seed: int) -> Tensor:
    """[N, D] float32."""
    draw = draws(seed)
    busy = max(1, round(size.k / 2 / 0.3))
    head = torch.rand(size.n, size.k // 2, generator=draw, device=DEVICE).mul(busy).long()
    rank = torch.rand(size.n, size.k - size.k // 2, generator=draw, device=DEVICE)
    tail = (rank * torch.tensor(size.f).log()).exp().long().clamp_(1, size.f) - 1
    latents = torch.cat([head, tail], dim=1) * 7919 % size.f  # scattered: 7919 is prime and divides no F here
    strengths = 0.5 + torch.randn(size.n, size.k, generator=draw, device=DEVICE).abs()
    x = torch.randn(size.n, size.d, generator=draw, device=DEVICE) * (0.3 / size.d**0.5)
    for part in torch.arange(size.n, device=DEVICE).split(512):
        x[part] += torch.einsum("nk,nkd->nd", strengths[part], w[latents[part]])
    return x


def make_latents(size: Size, fmt: str, moment: torch.dtype = torch.float32, lazy: bool = False) -> Latents:
    """Weights equal to the dictionary; the matrices `plain`, `low` or `split`, as if after ten Adam steps."""
    draw = draws(2)

    def weight(value: Tensor) -> Weight:
        of = fmt if value.dim() == 2 else "plain"
        dtype = moment if value.dim() == 2 else torch.float32
        second = torch.randn(value.shape, generator=draw, device=DEVICE).mul_(1e-5).square_()
        first = torch.zeros_like(value) if lazy else second.sqrt()  # lazy steps have no first moment
        first, second = first.to(dtype), second.to(dtype)
        if of == "split":
            value, remainder = split(value)
            return Weight(value, first, second, remainder=remainder)
        return Weight(value, first, second, low=value.bfloat16() if of == "low" else None)

    w_enc, w_dec = dictionary(size), dictionary(size)
    vectors = (torch.zeros(length, device=DEVICE) for length in (size.f, size.d))
    w_enc, b_enc, w_dec, b_dec = (weight(t) for t in (w_enc, next(vectors), w_dec, next(vectors)))
    last = torch.full((size.f,), 10, dtype=torch.int32, device=DEVICE) if lazy else None
    return Latents(w_enc, b_enc, w_dec, b_dec, torch.full((), 10.0, device=DEVICE), last)


def make_counters(size: Size) -> Counters:
    counts, sums, last_fired = (torch.zeros(size.f, dtype=torch.int64, device=DEVICE) for _ in range(3))
    return Counters(counts, sums, torch.zeros(size.f, device=DEVICE), last_fired, tokens=size.n)


def make_dead(size: Size, seed: int, scale: float) -> DeadGrads:
    """In a twentieth of the latents, some of which fire; of about `scale` in the root mean square."""
    draw = draws(seed)
    count = max(2, size.f // 20)
    latents = torch.randperm(size.f, generator=draw, device=DEVICE)[:count]
    w_enc, w_dec = (torch.randn(count, size.d, generator=draw, device=DEVICE) * scale for _ in range(2))
    return DeadGrads(latents, w_enc, torch.randn(count, generator=draw, device=DEVICE) * scale, w_dec)


@dataclass
class Codes:
    """One batch, encoded and decoded: the first arguments of `latent_step`, in its order."""

    x: Tensor
    residual: Tensor
    values: Tensor
    indices: Tensor
    dots: Tensor

    @property
    def args(self) -> tuple[Tensor, ...]:
        return self.x, self.residual, self.values, self.indices, self.dots


def encode(size: Size, latents: Latents, rows: Tensor) -> Codes:
    """With Triton, which must be in force for nothing else. `dots` are those of the master: see `adam`."""
    x = (rows.float() - latents.b_dec.value).to(rows.dtype)
    with use_backend("triton"):
        values, indices = topk_encode(x, latents.w_enc.product().to(x.dtype), latents.b_enc.value, size.k)
        residual, _, dots = decode_residual(
            values, indices, latents.w_dec.master(), latents.b_dec.value, rows
        )
    return Codes(x, residual, values, indices, dots)


def adam_for(latents: Latents) -> AdamStep:
    return AdamStep(lr=1e-4, beta1=0.9 if latents.last_step is None else 0.0)


def tensors_of(latents: Latents) -> dict[str, Tensor]:
    """Everything that a step changes, by name."""
    found = {"step": latents.step}
    if latents.last_step is not None:
        found["last_step"] = latents.last_step
    for name in NAMES:
        fields = vars(getattr(latents, name))
        found |= {f"{name}.{field}": tensor for field, tensor in fields.items() if tensor is not None}
    return found


def rms(tensor: Tensor) -> float:
    return float(tensor.double().square().mean().sqrt())
