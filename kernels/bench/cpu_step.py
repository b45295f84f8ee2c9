"""Time of one TopK step on a CPU, op by op, against the dense torch formulation of the same op.

    python kernels/bench/cpu_step.py [--rows 2048] [--width 576] [--latents 4608] [--k 32] [--threads 2]

An op is timed only after its result has agreed with the dense one. The two are run in turns, and the
least of the repeats is shown: wall time, which other processes lengthen, and CPU time over all
threads, which they barely do at --threads 1. Dense: topk, scatter to [N, F], matrix products, autograd.
A whole step is forward, backward, projection, clipping, fused Adam and unit rows, either by autograd and
torch's clipping over the ops, or as topk_encode, decode_residual and latent_step, which also counts.
"""

import argparse
import time
from collections.abc import Callable

import torch
from sae_kernels import (
    AdamStep,
    Counters,
    Latents,
    Weight,
    decode_residual,
    gather_dot,
    latent_step,
    segment_rows,
    sparse_decode,
    sparse_grad,
    topk_encode,
)
from torch import Tensor
from torch.nn import functional

EPS = 2.0**-24  # float32 unit roundoff
BF16_EPS = 2.0**-8

Op = Callable[[], list[Tensor]]


def make_ops(n: int, d: int, f: int, k: int) -> dict[str, tuple[Op, Op]]:
    """name -> (ours, dense), each returning what must agree. Random data: latents fire about equally."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=draw)
    w_enc = (torch.randn(f, d, generator=draw) / d**0.5).requires_grad_()
    w_dec = w_enc.detach().clone().requires_grad_()
    b = torch.zeros(f, requires_grad=True)
    params = (w_enc, w_dec, b)
    with torch.no_grad():
        values, indices = topk_encode(x, w_enc, b, k)
        codes = torch.zeros(n, f).scatter_(1, indices.long(), values)
        e = sparse_decode(values, indices, w_dec) - x

    def ours_encode() -> list[Tensor]:
        return [topk_encode(x, w_enc, b, k)[0].sort(dim=-1).values]

    def dense_codes() -> Tensor:
        top = functional.linear(x, w_enc, b).relu().topk(k, dim=-1, sorted=False)
        return torch.zeros(n, f, dtype=top.values.dtype).scatter(1, top.indices, top.values)

    def ours_step() -> list[Tensor]:
        x_hat = sparse_decode(*topk_encode(x, w_enc, b, k), w_dec)
        return list(torch.autograd.grad((x_hat.float() - x).square().mean(), params))

    def dense_step() -> list[Tensor]:
        x_hat = dense_codes() @ w_dec
        return list(torch.autograd.grad((x_hat.float() - x).square().mean(), params))

    def dense_residual() -> list[Tensor]:
        residual = x - codes @ w_dec
        return [residual, residual.square().sum(dim=1), (residual @ w_dec.T).gather(1, indices.long())]

    return {
        "topk_encode": (
            ours_encode,
            lambda: [functional.linear(x, w_enc, b).relu().topk(k, dim=-1).values.flip(-1)],
        ),
        "sparse_decode": (lambda: [sparse_decode(values, indices, w_dec)], lambda: [codes @ w_dec]),
        "gather_dot (d values)": (
            lambda: [gather_dot(e, indices, w_dec)],
            lambda: [(e @ w_dec.T).gather(1, indices.long())],
        ),
        "segment_rows (d weight)": (lambda: [segment_rows(values, indices, e, f)], lambda: [codes.T @ e]),
        "decode_residual": (
            lambda: list(decode_residual(values, indices, w_dec, x.new_zeros(d), x)),
            dense_residual,
        ),
        "sparse_grad": (
            lambda: list(sparse_grad(x, e, values, indices, w_dec)[1:3]),
            lambda: [((e @ w_dec.T) * (codes != 0)).T @ x, codes.T @ e],
        ),
        "forward and backward": (ours_step, dense_step),
    }


def make_steps(n: int, d: int, f: int, k: int) -> dict[str, tuple[Op, Op]]:
    """Whole steps, each on parameters of its own; what must agree: gradient norm and first moments."""
    draw = torch.Generator().manual_seed(0)
    y = torch.randn(n, d, generator=draw)
    unit = functional.normalize(torch.randn(f, d, generator=draw))

    def autograd_step(encode: Callable[..., Tensor]) -> Op:
        w_enc, b_enc, w_dec, b_dec = params = [
            t.clone() for t in (unit, torch.zeros(f), unit, torch.zeros(d))
        ]
        adam = torch.optim.Adam([p.requires_grad_() for p in params], lr=1e-4, fused=True)

        def step() -> list[Tensor]:
            adam.zero_grad()
            x_hat = encode(y - b_dec, w_enc, b_enc, w_dec) + b_dec
            (x_hat.float() - y).square().mean().backward()
            with torch.no_grad():
                w_dec.grad.addcmul_((w_dec.grad * w_dec).sum(dim=1, keepdim=True), w_dec, value=-1)
            norm = torch.nn.utils.clip_grad_norm_(params, 1.0)
            adam.step()
            with torch.no_grad():
                w_dec.div_(w_dec.norm(dim=1, keepdim=True))
            return [norm, *(adam.state[w]["exp_avg"] for w in (w_enc, w_dec))]

        return step

    def with_ops(x: Tensor, w_enc: Tensor, b_enc: Tensor, w_dec: Tensor) -> Tensor:
        return sparse_decode(*topk_encode(x, w_enc, b_enc, k), w_dec)

    def dense(x: Tensor, w_enc: Tensor, b_enc: Tensor, w_dec: Tensor) -> Tensor:
        top = functional.linear(x, w_enc, b_enc).relu().topk(k, dim=-1, sorted=False)
        return torch.zeros(n, f, dtype=top.values.dtype).scatter(1, top.indices, top.values) @ w_dec

    def weight(master: Tensor) -> Weight:
        return Weight(master.clone(), torch.zeros_like(master), torch.zeros_like(master))

    latents = Latents(*(weight(t) for t in (unit, torch.zeros(f), unit, torch.zeros(d))), torch.zeros(()))
    zeros = torch.zeros(f, dtype=torch.int64)
    counters = Counters(zeros, zeros.clone(), torch.zeros(f), zeros.clone(), tokens=0)

    def fused_step() -> list[Tensor]:
        x = y - latents.b_dec.value
        codes = topk_encode(x, latents.w_enc.value, latents.b_enc.value, k)
        residual, _, dots = decode_residual(*codes, latents.w_dec.value, latents.b_dec.value, y)
        counters.tokens += n
        adam, scale = AdamStep(lr=1e-4), -2 / (n * d)
        norm = latent_step(x, residual, *codes, dots, latents, adam, scale, clip=1.0, counters=counters)
        return [norm, latents.w_enc.first, latents.w_dec.first]

    return {
        "whole step by autograd": (autograd_step(with_ops), autograd_step(dense)),
        "whole step, latent_step": (fused_step, autograd_step(dense)),
    }


def disagreement(got: list[Tensor], want: list[Tensor]) -> float:
    """Largest relative root mean square difference."""
    pairs = [(g.detach().float(), w.detach().float()) for g, w in zip(got, want, strict=True)]
    return max(float((g - w).norm() / w.norm()) for g, w in pairs)


def timed(op: Op) -> tuple[float, float]:
    """Wall and CPU milliseconds of one run."""
    wall, cpu = time.perf_counter(), time.process_time()
    op()
    return (time.perf_counter() - wall) * 1e3, (time.process_time() - cpu) * 1e3


def allowed(name: str, dtype: str, n: int, d: int) -> float:
    """Largest disagreement of an op that works.

    float32 sums of up to max(N, D) terms; bfloat16 rounds operands and results. There, too, a share s
    of the codes swap at the k-th place, which moves a gradient by sqrt(2 s): 0.25 stands for 3 %."""
    if dtype == "fp32":
        return 4 * max(n, d) * EPS
    return 0.25 if name == "forward and backward" or name.startswith("whole") else 4 * BF16_EPS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    defaults = {"rows": 2048, "width": 576, "latents": 4608, "k": 32, "repeats": 9}
    for name, default in {**defaults, "threads": torch.get_num_threads()}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    print(f"N={a.rows} D={a.width} F={a.latents} k={a.k}, {a.threads} threads, least of {a.repeats}, ms")
    print(f"{torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}")
    print(f"{'':24}{'dtype':>6}{'dense wall':>12}{'cpu':>8}{'ours wall':>12}{'cpu':>8}{'disagreement':>14}")
    for dtype in ("fp32", "bf16"):
        sizes = (a.rows, a.width, a.latents, a.k)
        for name, (ours, dense) in (make_ops(*sizes) | make_steps(*sizes)).items():
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
                off, limit = disagreement(ours(), dense()), allowed(name, dtype, a.rows, a.width)
                if not off <= limit:
                    raise SystemExit(f"{name} {dtype}: disagrees by {off:.2e}, limit {limit:.2e}; not timed")
                times = [(timed(dense), timed(ours)) for _ in range(a.repeats)]
            columns = [min(t[who][what] for t in times) for who in (0, 1) for what in (0, 1)]
            row = f"{columns[0]:>12.1f}{columns[1]:>8.1f}{columns[2]:>12.1f}{columns[3]:>8.1f}"
            print(f"{name:24}{dtype:>6}{row}{off:>14.1e}", flush=True)


if __name__ == "__main__":
    main()
