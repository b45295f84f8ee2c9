"""OpenAI's kernels (github.com/openai/sparse_autoencoder), unmodified, in the order of its training loop.

The model, its Triton kernels and its loss are the package's own. Its loop prints the loss of every step;
that, the logging and the average of weights are left out. It trains in float16 with a loss scale.

As published, one process without torch.distributed fails: the encoder asks an absent process group for its
size. The call is redirected to the branch that the package has for this case, which is also the cheaper one.
"""

import torch
from gpu_peers import LR, Peer
from gpu_problem import Problem
from torch import Tensor


def openai(p: Problem, w: Tensor, device: str, variant: str) -> Peer:
    """FastAutoencoder without AuxK; no clipping, as its defaults have it."""
    from sparse_autoencoder import kernels, train

    select = getattr(train, "_sae_bench_topk", train.sharded_topk)
    train._sae_bench_topk = select
    train.sharded_topk = lambda x, k, sh_comm, capacity_factor=None: select(x, k, sh_comm)
    sae = train.FastAutoencoder(n_dirs_local=p.f, d_model=p.d, k=p.k, auxk=None, dead_steps_threshold=10**6)
    sae.to(device)
    with torch.no_grad():
        sae.encoder.weight.copy_(w)
        sae.decoder.weight.data = w.clone().T  # the layout that its kernels ask for
    half = device == "cuda"  # torch has no float16 products worth the name elsewhere
    scaler = torch.amp.GradScaler(device, enabled=half)
    adam = torch.optim.Adam(sae.parameters(), lr=LR, eps=6.25e-10, fused=True)

    def step(x: Tensor) -> Tensor:
        with torch.autocast(device, torch.float16, enabled=half):
            recons, _ = sae(x)
            loss = kernels.mse(recons, x)
        scaler.scale(loss).backward()
        train.unit_norm_decoder_(sae)
        train.unit_norm_decoder_grad_adjustment_(sae)
        scaler.unscale_(adam)
        scaler.step(adam)
        scaler.update()
        adam.zero_grad(set_to_none=True)
        return loss.detach()

    products = "fp16 autocast, loss scale" if half else "fp32"
    return Peer(
        step,
        mse=lambda loss, x: float(loss),
        moment=lambda: adam.state[sae.encoder.weight]["exp_avg"],
        tensors=lambda: [t.detach() for t in sae.parameters()],
        state={"masters": "fp32", "moments": "fp32", "products": products},
    )
