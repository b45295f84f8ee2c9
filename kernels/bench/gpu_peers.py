"""The same step by others on a GPU: dense torch, eager and compiled, and the libraries that are installed.

Each starts from the same weights, sees the same rows and uses Adam with the same hyperparameters. A builder
takes the problem, the weights [F, D], the device and a variant. "as shipped" does what the library's own
training loop does to a batch, host synchronisations for its logging included; "no syncs" leaves those out,
and the host's looks for dead latents, of which there are none: so a gap to ours is no artefact of logging.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import gpu_reference
import torch
from gpu_problem import Problem, dictionary, digest, make_batches
from gpu_timing import Part, Prepared, peak_bytes
from torch import Tensor, nn
from torch.nn import functional

LR = 1e-4
BITS_STEPS = 3  # after which two runs are compared
ROWS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
AUTOCAST = {"masters": "fp32", "moments": "fp32", "products": "bf16 autocast"}


@dataclass
class Peer:
    """An implementation that is ready to train.

    Attributes:
        step: one training step on rows [N, D]; what it returns is for `mse`.
        mse: squared error per element, of what `step` returned and the rows it was given.
        moment: [F, D] Adam's first moment of the encoder; None if more than the reconstruction is in it.
        tensors: what a step changes.
        state: what is kept and computed in which format.
    """

    step: Callable[[Tensor], Any]
    mse: Callable[[Any, Tensor], float]
    moment: Callable[[], Tensor] | None
    tensors: Callable[[], list[Tensor]]
    state: dict[str, str]


def dense(
    p: Problem,
    w: Tensor,
    device: str,
    variant: str,
    products: torch.dtype = torch.bfloat16,
    lr: float = LR,
) -> Peer:
    """linear, topk, scatter, linear; autograd; projection; clipping; fused Adam; unit rows."""
    params = [nn.Parameter(t) for t in (w.clone(), w.clone(), w.new_zeros(p.f), w.new_zeros(p.d))]
    w_enc, w_dec, b_enc, b_dec = params
    adam = torch.optim.Adam(params, lr=lr, fused=True)

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

    if variant == "compiled":
        compiler = torch.compile(mode="max-autotune-no-cudagraphs")
        forward, project, renormalise = compiler(forward), compiler(project), compiler(renormalise)

    def step(x: Tensor) -> Tensor:
        with torch.autocast(device, products, enabled=products != torch.float32):
            loss = forward(x)
        adam.zero_grad(set_to_none=True)
        loss.backward()
        with torch.no_grad():
            project()
            nn.utils.clip_grad_norm_(params, 1.0)
            adam.step()
            renormalise()
        return loss.detach()

    return Peer(
        step,
        mse=lambda loss, x: float(loss),
        moment=lambda: adam.state[w_enc]["exp_avg"],
        tensors=lambda: [p.detach() for p in params],
        state=AUTOCAST,
    )


def sparsify(p: Problem, w: Tensor, device: str, variant: str) -> Peer:
    """SparseCoder in the order of its trainer; torch's Adam in place of its default signum."""
    from sparsify import SparseCoder, SparseCoderConfig

    sae = SparseCoder(p.d, SparseCoderConfig(num_latents=p.f, k=p.k), device=device, dtype=torch.float32)
    with torch.no_grad():
        sae.encoder.weight.copy_(w)
        sae.encoder.bias.zero_()
        sae.W_dec.copy_(w)
        sae.b_dec.zero_()
    adam = torch.optim.Adam(sae.parameters(), lr=LR, fused=True)
    since_fired = torch.zeros(p.f, dtype=torch.long, device=device)
    fired = torch.zeros(p.f, dtype=torch.bool, device=device)
    logged = 0.0

    def step(x: Tensor) -> Tensor:
        nonlocal logged
        sae.set_decoder_norm_to_unit_norm()
        variance = (x - x.mean(0)).pow(2).sum()
        with torch.autocast(device, torch.bfloat16):
            out = sae(x=x, y=x, dead_mask=None, total_variance=variance)
        fired[out.latent_indices.flatten()] = True
        if variant == "as shipped":
            logged += float(out.fvu.detach())
        (out.fvu + out.multi_topk_fvu / 8).backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        adam.step()
        adam.zero_grad()
        with torch.no_grad():
            since_fired.add_(len(x)).masked_fill_(fired, 0)
            fired.zero_()
        return out.fvu.detach()

    def mse(fvu: Tensor, x: Tensor) -> float:
        return float(fvu.double() * (x - x.mean(0)).double().pow(2).sum() / x.numel())

    return Peer(
        step,
        mse=mse,
        moment=lambda: adam.state[sae.encoder.weight]["exp_avg"],
        tensors=lambda: [t.detach() for t in sae.parameters()],
        state=AUTOCAST,
    )


def dictionary_learning(p: Problem, w: Tensor, device: str, variant: str) -> Peer:
    """`update` of its TopKTrainer under autocast; its loop hands it rows in the autocast dtype."""
    from dictionary_learning.trainers import top_k

    trainer = top_k.TopKTrainer(
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
    ae = trainer.ae
    with torch.no_grad():
        ae.encoder.weight.copy_(w)
        ae.decoder.weight.copy_(w.T)
    if variant == "no syncs":
        trainer.auxk_alpha = 0.0  # it would ask how many are dead
        del ae.k  # on the device, where topk would have to fetch it from
        ae.k = p.k
    done = 0

    def without_syncs(x: Tensor) -> Tensor:
        loss = trainer.loss(x, step=done)
        loss.backward()
        sizes = (ae.activation_dim, ae.dict_size)
        weight = ae.decoder.weight
        weight.grad = top_k.remove_gradient_parallel_to_decoder_directions(weight, weight.grad, *sizes)
        nn.utils.clip_grad_norm_(ae.parameters(), 1.0)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        trainer.scheduler.step()
        weight.data = top_k.set_decoder_norm_to_unit_norm(weight, *sizes)
        return loss.detach()

    def step(x: Tensor) -> Any:
        nonlocal done
        done = (
            done % 1000 + 1
        )  # step 0 would replace b_dec, and above 1000 it keeps a threshold for inference
        with torch.autocast(device, torch.bfloat16):
            return without_syncs(x) if variant == "no syncs" else trainer.update(done, x)

    return Peer(
        step,
        mse=lambda loss, x: float(loss) / p.d,
        moment=lambda: trainer.optimizer.state[ae.encoder.weight]["exp_avg"],
        tensors=lambda: [t.detach() for t in ae.parameters()],
        state=AUTOCAST,
    )


def saelens(p: Problem, w: Tensor, device: str, variant: str) -> Peer:
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
    if variant == "no syncs":  # it would ask how many are dead
        sae.calculate_topk_aux_loss = lambda sae_out, **others: sae_out.new_zeros(())

    def step(x: Tensor) -> Tensor:
        trainer.maybe_reset_sparsity()
        out = trainer.step(x)
        trainer.n_training_steps += 1
        return out.losses["mse_loss"].detach()

    return Peer(
        step,
        mse=lambda loss, x: float(loss) / p.d,
        moment=lambda: trainer.optimizer.state[sae.W_enc]["exp_avg"].T,
        tensors=lambda: [t.detach() for t in sae.parameters()],
        state=AUTOCAST,
    )


BUILDERS = {  # name -> module and function that build it, what has to be importable
    "trainer": ("gpu_trainer", "trainer", "sae_train"),
    "dense": ("gpu_peers", "dense", "torch"),
    "sparsify": ("gpu_peers", "sparsify", "sparsify"),
    "dictionary_learning": ("gpu_peers", "dictionary_learning", "dictionary_learning"),
    "saelens": ("gpu_peers", "saelens", "sae_lens"),
    "openai": ("gpu_openai", "openai", "sparse_autoencoder.train"),
}


def missing(name: str) -> str | None:
    """What a peer needs and this Python cannot import."""
    package = BUILDERS[name][2]
    top = package.partition(".")[0]
    # Another package of the same name has no such module.
    return None if find_spec(top) and (top == package or find_spec(package)) else package


def build(p: Problem, case: dict[str, Any], device: str, **options: Any) -> Peer:
    module, function, _ = BUILDERS[case["impl"]]
    builder = getattr(import_module(module), function)
    peer: Peer = builder(p, dictionary(p, device), device, case["variant"], **options)
    return peer


def prepare(p: Problem, case: dict[str, Any], device: str, job: dict[str, Any]) -> Prepared:
    """Build twice and compare the bits after three steps; compare the first step with float64."""
    options = {"backend": job["backend"]} if case["impl"] == "trainer" else {}
    # Batches are made in bfloat16; every format of rows holds these numbers.
    batches = [x.to(ROWS[case["rows"]]) for x in make_batches(p, dictionary(p, device))]
    digests, kept = [], []
    for _ in range(2):
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
        peer = build(p, case, device, **options)
        outs = [peer.step(batches[0])]
        if not digests:
            moment = peer.moment() if peer.moment is not None else None
            first = gpu_reference.compare(job["reference"], peer.mse(outs[0], batches[0]), moment)
            del moment
        outs += [peer.step(batches[i]) for i in range(1, BITS_STEPS)]
        digests.append(digest(peer.tensors()))
        kept.append(max(peer.tensors(), key=Tensor.numel)[:256].double().cpu())
        if len(digests) == 1:
            del peer
    found = {
        "state": {"rows": case["rows"]} | peer.state,
        "first_step": first,
        "bits": "same" if digests[0] == digests[1] else "differ",
        "runs_differ_by": float((kept[0] - kept[1]).norm() / kept[0].norm()),
    }
    step: Part = lambda i: peer.step(batches[i % len(batches)])  # noqa: E731
    return Prepared({"step": step}, found | {"peak_bytes": peak_bytes(step, device)})
