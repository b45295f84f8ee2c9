"""The same step by others on a GPU: dense torch, eager and compiled, the libraries that are installed, and
our own trainer, whose step is more than the ops that `gpu_ours` times.

Each starts from the same weights, sees the same rows and uses Adam with the same hyperparameters. Every
builder takes the problem, the weights [F, D] and the device and returns a step on rows [N, D].
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from gpu_problem import Problem, dictionary, make_batches
from gpu_timing import Clock
from gpu_trainer import TRAINERS
from torch import Tensor, nn
from torch.nn import functional

LR = 1e-4
Step = Callable[[Tensor], Any]


def dense(p: Problem, w: Tensor, device: str, compiled: bool = False) -> Step:
    """linear, topk, scatter, linear; autograd; projection; clipping; fused Adam; unit rows."""
    params = [nn.Parameter(t) for t in (w.clone(), w, w.new_zeros(p.f), w.new_zeros(p.d))]
    w_enc, w_dec, b_enc, b_dec = params
    adam = torch.optim.Adam(params, lr=LR, fused=True)

    def forward(x: Tensor) -> Tensor:
        pre = functional.linear(x - b_dec, w_enc, b_enc).relu()
        top = pre.topk(p.k, dim=-1, sorted=False)
        codes = torch.zeros_like(pre).scatter(1, top.indices, top.values)
        return (x - (codes @ w_dec + b_dec).float()).square().mean()

    def project() -> None:
        grad = w_dec.grad
        assert grad is not None
        grad -= (grad * w_dec).sum(dim=-1, keepdim=True) * w_dec

    def renormalise() -> None:
        w_dec.div_(w_dec.norm(dim=-1, keepdim=True))

    if compiled:
        compiler = torch.compile(mode="max-autotune-no-cudagraphs")
        forward, project, renormalise = compiler(forward), compiler(project), compiler(renormalise)

    def step(x: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            loss = forward(x)
        adam.zero_grad(set_to_none=True)
        loss.backward()
        with torch.no_grad():
            project()
            nn.utils.clip_grad_norm_(params, 1.0)
            adam.step()
            renormalise()
        return loss.detach()

    return step


def compiled(p: Problem, w: Tensor, device: str) -> Step:
    return dense(p, w, device, compiled=True)


def sparsify(p: Problem, w: Tensor, device: str) -> Step:
    """SparseCoder in the order of its trainer, without logging; Adam in place of its default signum."""
    from sparsify import SparseCoder, SparseCoderConfig

    config = SparseCoderConfig(num_latents=p.f, k=p.k)
    sae = SparseCoder(p.d, config, device=device, dtype=torch.float32)
    with torch.no_grad():
        sae.encoder.weight.copy_(w)
        sae.encoder.bias.zero_()
        sae.W_dec.copy_(w)
        sae.b_dec.zero_()
    adam = torch.optim.Adam(sae.parameters(), lr=LR, fused=True)

    def step(x: Tensor) -> Tensor:
        sae.set_decoder_norm_to_unit_norm()
        with torch.autocast(device, torch.bfloat16):
            out = sae(x=x, y=x, dead_mask=None)
        out.fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        adam.step()
        adam.zero_grad()
        return out.fvu.detach()

    return step


def dictionary_learning(p: Problem, w: Tensor, device: str) -> Step:
    """`update` of its TopKTrainer under autocast."""
    from dictionary_learning.trainers.top_k import TopKTrainer

    trainer = TopKTrainer(
        steps=10**6,
        activation_dim=p.d,
        dict_size=p.f,
        k=p.k,
        layer=0,
        lm_name="none",
        lr=LR,
        warmup_steps=0,
        device=device,
    )
    with torch.no_grad():
        trainer.ae.encoder.weight.copy_(w)
        trainer.ae.decoder.weight.copy_(w.T)
    done = 0

    def step(x: Tensor) -> float:
        nonlocal done
        done += 1  # step 0 would replace b_dec
        with torch.autocast(device, torch.bfloat16):
            return trainer.update(done, x)

    return step


def saelens(p: Problem, w: Tensor, device: str) -> Step:
    """`step` of its SAETrainer, with autocast."""
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=p.d, d_sae=p.f, k=p.k, device=device))
    with torch.no_grad():
        sae.W_enc.copy_(w.T)
        sae.W_dec.copy_(w)
    config = SAETrainerConfig(
        total_training_samples=10**9,
        train_batch_size_samples=p.n,
        lr=LR,
        lr_end=LR,
        autocast=True,
        device=device,
        logger=LoggingConfig(log_to_wandb=False),
    )
    trainer = SAETrainer(config, sae, data_provider=iter(()))

    def step(x: Tensor) -> Any:
        trainer.maybe_reset_sparsity()
        out = trainer.step(x)
        trainer.n_training_steps += 1
        return out.losses["mse_loss"].detach()

    return step


PEERS: dict[str, tuple[Callable[[Problem, Tensor, str], Step], str]] = {  # name -> builder, package it needs
    **{name: (build, "sae_train") for name, build in TRAINERS.items()},
    "dense": (dense, "torch"),
    "compiled": (compiled, "torch"),
    "sparsify": (sparsify, "sparsify"),
    "dictionary_learning": (dictionary_learning, "dictionary_learning"),
    "saelens": (saelens, "sae_lens"),
}


def missing(name: str) -> str | None:
    """The package without which a peer cannot run, if it is not installed."""
    package = PEERS[name][1]
    return None if find_spec(package) else package


def run(p: Problem, name: str, clock: Clock) -> dict[str, Any]:
    w = dictionary(p, clock.device)
    # As they are trained: rows in float32, products in bfloat16. (`gpu_ours` is given bfloat16 rows.)
    batches = [x.float() for x in make_batches(p, w)]
    step = PEERS[name][0](p, w, clock.device)
    first = step(batches[0])
    if clock.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = clock.measure(lambda i: step(batches[i % len(batches)]))
    peak = torch.cuda.max_memory_allocated() if clock.device == "cuda" else None
    return {"ms": times, "peak_bytes": peak, "loss": [float(first)]}
