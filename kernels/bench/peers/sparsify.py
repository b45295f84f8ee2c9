"""sparsify: its SparseCoder, in the order of its trainer with optimizer=adam, without model and logging.

Its bfloat16 is an autocast around the forward pass, written for CUDA only; here the same for the CPU.
"""

import torch
from peers.protocol import Job, Start, Step, serve
from sparsify import SparseCoder, SparseCoderConfig
from torch import Tensor
from transformers import get_linear_schedule_with_warmup


def build(job: Job, start: Start) -> Step:
    num_latents, d_in = start["w_enc"].shape
    sae = SparseCoder(d_in, SparseCoderConfig(num_latents=num_latents, k=job.k), dtype=torch.float32)
    with torch.no_grad():
        sae.encoder.weight.copy_(start["w_enc"])
        sae.encoder.bias.copy_(start["b_enc"])
        sae.W_dec.copy_(start["w_dec"])
        sae.b_dec.copy_(start["b_dec"])
    adam = torch.optim.Adam([{"params": sae.parameters(), "lr": job.lr}])
    schedule = get_linear_schedule_with_warmup(adam, 0, 10**6)
    tokens_since_fired = torch.zeros(num_latents, dtype=torch.long)
    did_fire = torch.zeros(num_latents, dtype=torch.bool)

    def step(x: Tensor) -> float:
        sae.set_decoder_norm_to_unit_norm()
        variance = (x - x.mean(0)).pow(2).sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=job.bf16):
            out = sae(x=x, y=x, dead_mask=None, total_variance=variance)
        did_fire[out.latent_indices.flatten()] = True
        fvu = float(out.fvu.detach())
        (out.fvu + 0.0 * out.auxk_loss + out.multi_topk_fvu / 8).backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        adam.step()
        adam.zero_grad()
        schedule.step()
        with torch.no_grad():
            tokens_since_fired.add_(len(x))
            tokens_since_fired[did_fire] = 0
            did_fire.zero_()
        return fvu * float(variance) / len(x)

    return step


if __name__ == "__main__":
    serve("eai-sparsify", build)
