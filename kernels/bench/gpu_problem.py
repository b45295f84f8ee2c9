"""What the GPU benchmark trains: shapes, rows whose latents fire as those of language models do, parameters.

Rows are sums of about k dictionary rows and some noise. Half of the slots go to a head of latents that fire
on 30 % of the rows each, half to all latents by Zipf's law (the r-th most frequent fires as 1 / r), so that
some latents are busy, most are rare and many are silent in a batch. The dictionary is the decoder itself.
"""

import os
from dataclasses import dataclass

import torch
from sae_kernels import AdamStep, Counters, Latents, Weight
from sae_kernels.latents import split
from torch import Tensor

HEAD_DENSITY = 0.3
NUM_BATCHES = 4  # in turns, so that no row waits in a cache for its next use
CHUNK = 1 << 26  # elements of temporaries
FORMATS = ("fp32", "split", "bf16-moments", "lazy")


@dataclass(frozen=True)
class Problem:
    """Sizes of one step; the letters are those of the shapes in sae_kernels.triton.launch."""

    name: str
    n: int
    d: int
    f: int
    k: int

    @property
    def gemm_flops(self) -> int:
        """Of the encoder's product."""
        return 2 * self.n * self.d * self.f

    def parameter_bytes(self, fmt: str) -> int:
        """Held for both matrices: the master, what products read, and two moments."""
        per = {"fp32": 4 + 2 + 8, "split": 4 + 8, "bf16-moments": 4 + 4, "lazy": 4 + 8}[fmt]
        return 2 * self.f * self.d * per

    def adam_traffic(self, fmt: str, active: float = 1.0) -> float:
        """Bytes that the optimizer reads and writes: all that is held, and nothing reads the bf16 copy."""
        per = {"fp32": 24 + 2, "split": 24, "bf16-moments": 16, "lazy": 24 * active}[fmt]
        return 2 * self.f * self.d * per


PROBLEMS = {
    p.name: p
    for p in (
        Problem("A", 8192, 768, 24576, 32),
        Problem("B", 8192, 2304, 65536, 64),
        Problem("C", 8192, 4096, 131072, 64),
        Problem("D", 4096, 4096, 1048576, 64),
        Problem("S", 8192, 2304, 16384, 32),
        *(Problem(f"S-k{k}", 8192, 2304, 16384, k) for k in (16, 64, 128, 192)),
        Problem("tiny", 5, 20, 30, 3),  # for the interpreter
    )
}


def dictionary(p: Problem, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """[F, D] unit rows, the same for every implementation."""
    draw = torch.Generator(device).manual_seed(0)
    out = torch.empty(p.f, p.d, dtype=dtype, device=device)
    for part in out.split(max(1, CHUNK // p.d)):
        rows = torch.randn(part.shape, generator=draw, device=device)
        part.copy_(rows / rows.norm(dim=1, keepdim=True))
    return out


def make_batches(p: Problem, w: Tensor) -> list[Tensor]:
    """NUM_BATCHES of [N, D] bfloat16."""
    draw = torch.Generator(w.device).manual_seed(1)
    head = max(1, round(p.k / 2 / HEAD_DENSITY))

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=draw, device=w.device)

    def batch() -> Tensor:
        in_head = uniform(p.n, p.k // 2).mul(head).long()
        rank = (uniform(p.n, p.k - p.k // 2) * torch.tensor(p.f).log().item()).exp().long() - 1
        # Ranks are scattered over the dictionary: 2654435761 is odd and not a multiple of any F used here.
        latents = torch.cat([in_head, rank.clamp_(0, p.f - 1)], dim=1) * 2654435761 % p.f
        strength = 0.5 + torch.randn(p.n, p.k, generator=draw, device=w.device).abs()
        x = torch.randn(p.n, p.d, generator=draw, device=w.device) * (0.3 / p.d**0.5)
        for start in range(0, p.n, max(1, CHUNK // (p.k * p.d))):
            part = slice(start, start + max(1, CHUNK // (p.k * p.d)))
            x[part] += torch.einsum("nk,nkd->nd", strength[part], w[latents[part]].float())
        return x.bfloat16()

    return [batch() for _ in range(NUM_BATCHES)]


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


def digest(tensors: list[Tensor]) -> int:
    """A number that differs if any bit does (but for a chance of 2^-40 or so): weighted sum of the bits."""
    total = 0
    for tensor in tensors:
        bits = (
            tensor.contiguous().view(torch.int16 if tensor.element_size() == 2 else torch.int32).reshape(-1)
        )
        for part in bits.split(CHUNK):
            place = torch.arange(len(part), device=part.device) % 1048573 + 1
            total = (total * 1000003 + int((part.long() * place).sum())) % (1 << 61)
    return total


def set_encoder(name: str) -> None:
    """Which encoder `topk_encode` takes from now on: e1, e2, or its own choice."""
    os.environ.pop("SAE_KERNELS_ENCODER", None)
    if name != "auto":
        os.environ["SAE_KERNELS_ENCODER"] = name


def _parts(tensor: Tensor) -> tuple[Tensor, ...]:
    return tensor.split(max(1, CHUNK // max(1, tensor[0].numel() if len(tensor) else 1)))
