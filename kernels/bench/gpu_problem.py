"""What the GPU benchmark trains on: shapes, rows whose latents fire as those of language models do, weights.

Synthetic rows are sums of about k dictionary rows and some noise. Half of the slots go to a head of latents
that fire on 30 % of the rows each, half to all latents by Zipf's law (the r-th most frequent fires as 1 / r),
so that some latents are busy, most are rare and many are silent in a batch. The dictionary is the decoder.

Recorded rows (`record_rows.py` writes them) are centred and scaled to the size of the synthetic ones; the
dictionary is made of rows of the same recording, so that latents fire as unequally as those of a trained SAE.

Imports nothing but torch and safetensors, since the environments of other libraries have no more.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

HEAD_DENSITY = 0.3
NUM_BATCHES = 4  # in turns, so that no row waits in a cache for its next use
CHUNK = 1 << 26  # elements of temporaries
RECORDED_NOISE = (
    0.3  # of a recorded row's norm, so that a dictionary larger than the recording repeats nothing
)


@dataclass(frozen=True)
class Problem:
    """Sizes of one step; the letters are those of the shapes in sae_kernels.triton.launch."""

    name: str
    n: int
    d: int
    f: int
    k: int
    rows: str = ""
    """File with recorded rows; empty for synthetic ones."""

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
        Problem("R", 8192, 576, 16384, 32),  # the width of the demo's model, for recorded rows
        Problem("tiny", 5, 20, 30, 3),  # for the interpreter
    )
}


def dictionary(p: Problem, device: str) -> Tensor:
    """[F, D] float32 unit rows, the same for every implementation."""
    draw = torch.Generator(device).manual_seed(0)
    recorded = recorded_rows(p, device) if p.rows else None
    out = torch.empty(p.f, p.d, device=device)
    for part in out.split(max(1, CHUNK // p.d)):
        rows = torch.randn(part.shape, generator=draw, device=device)
        if recorded is not None:
            picked = recorded[torch.randint(len(recorded), (len(part),), generator=draw, device=device)]
            rows = picked / picked.norm(dim=1, keepdim=True) + rows * (RECORDED_NOISE / p.d**0.5)
        part.copy_(rows / rows.norm(dim=1, keepdim=True))
    return out


def make_batches(p: Problem, w: Tensor) -> list[Tensor]:
    """NUM_BATCHES of [N, D] bfloat16."""
    draw = torch.Generator(w.device).manual_seed(1)
    if p.rows:
        recorded = recorded_rows(p, w.device)
        order = torch.randperm(len(recorded), generator=draw, device=w.device)
        taken = order[torch.arange(NUM_BATCHES * p.n, device=w.device) % len(order)]
        return [recorded[part].bfloat16() for part in taken.split(p.n)]
    return [synthetic_batch(p, w, draw) for _ in range(NUM_BATCHES)]


def synthetic_batch(p: Problem, w: Tensor, draw: torch.Generator) -> Tensor:
    """The next [N, D] bfloat16 rows of a generator."""
    head = max(1, round(p.k / 2 / HEAD_DENSITY))

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=draw, device=w.device)

    in_head = uniform(p.n, p.k // 2).mul(head).long()
    rank = (uniform(p.n, p.k - p.k // 2) * torch.tensor(p.f).log().item()).exp().long() - 1
    # Ranks are scattered over the dictionary: 2654435761 is odd and not a multiple of any F used here.
    latents = torch.cat([in_head, rank.clamp_(0, p.f - 1)], dim=1) * 2654435761 % p.f
    strength = 0.5 + torch.randn(p.n, p.k, generator=draw, device=w.device).abs()
    x = torch.randn(p.n, p.d, generator=draw, device=w.device) * (0.3 / p.d**0.5)
    for start in range(0, p.n, max(1, CHUNK // (p.k * p.d))):
        part = slice(start, start + max(1, CHUNK // (p.k * p.d)))
        x[part] += torch.einsum("nk,nkd->nd", strength[part], w[latents[part]])
    return x.bfloat16()


def recorded_shape(path: Path) -> tuple[str, list[int]]:
    """Name and shape of the one tensor in a file of rows.

    Raises:
        ValueError: it holds another number of tensors, or one that is not [M, D]."""
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        shape = file.get_slice(names[0]).get_shape() if len(names) == 1 else []
    if len(shape) != 2 or min(shape) < 2:
        raise ValueError(f"{path} holds {', '.join(names)} of shape {shape}: expected one tensor [M, D]")
    return names[0], shape


def recorded_rows(p: Problem, device: str | torch.device) -> Tensor:
    """[M, D] float32, centred, as large on average as the synthetic rows are."""
    name, _ = recorded_shape(Path(p.rows))
    with safe_open(p.rows, framework="pt", device=str(device)) as file:
        rows = file.get_tensor(name).float()
    if not bool(torch.isfinite(rows).all()):
        raise ValueError(f"{p.rows} holds numbers that are not finite")
    rows -= rows.mean(dim=0)
    return rows * ((2 * p.k) ** 0.5 / rows.norm(dim=1).mean())


def digest(tensors: list[Tensor]) -> int:
    """A number that differs if any bit does (but for a chance of 2^-40 or so): weighted sum of the bits."""
    total = 0
    for tensor in tensors:
        words = {2: torch.int16, 4: torch.int32, 8: torch.int32}[tensor.element_size()]
        bits = tensor.detach().contiguous().reshape(-1).view(words)
        for part in bits.split(CHUNK):
            place = torch.arange(len(part), device=part.device) % 1048573 + 1
            total = (total * 1000003 + int((part.long() * place).sum())) % (1 << 61)
    return total
