"""Time of one TopK step on a CPU, op by op, against the dense torch formulation of the same op.

    python kernels/bench/cpu_step.py [--rows 2048] [--width 576] [--latents 4608] [--k 32] [--threads 2]

An op is timed only after its result has agreed with the dense one. The two are run in turns, and the
least of the repeats is shown: wall time, which other processes lengthen, and CPU time over all
threads, which they barely do at --threads 1. Dense: topk, scatter to [N, F], matrix products, autograd.
"""

import argparse
import time
from collections.abc import Callable

import torch
from sae_kernels import gather_dot, segment_rows, sparse_decode, topk_encode
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
        "forward and backward": (ours_step, dense_step),
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
    return 0.25 if name == "forward and backward" else 4 * BF16_EPS


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
        for name, (ours, dense) in make_ops(a.rows, a.width, a.latents, a.k).items():
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
