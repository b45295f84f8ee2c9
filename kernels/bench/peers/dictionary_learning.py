"""dictionary_learning: its TopKTrainer's `update`.

Its bfloat16 on a CPU is what its training loop makes of autocast_dtype=bfloat16 there: rows in bfloat16 and
no autocast, so the products are still float32.
"""

import torch
from dictionary_learning.trainers.top_k import TopKTrainer
from peers.protocol import Job, Start, Step, serve
from torch import Tensor


def build(job: Job, start: Start) -> Step:
    dict_size, d_in = start["w_enc"].shape
    trainer = TopKTrainer(
        steps=10**6,
        activation_dim=d_in,
        dict_size=dict_size,
        k=job.k,
        layer=0,
        lm_name="none",
        lr=job.lr,
        warmup_steps=0,
        device="cpu",
    )
    with torch.no_grad():
        trainer.ae.encoder.weight.copy_(start["w_enc"])
        trainer.ae.encoder.bias.copy_(start["b_enc"])
        trainer.ae.decoder.weight.copy_(start["w_dec"].T)
        trainer.ae.b_dec.copy_(start["b_dec"])
    done = 0

    def step(x: Tensor) -> float:
        nonlocal done
        done += 1  # step 0 would replace b_dec
        return trainer.update(done, x.to(torch.bfloat16 if job.bf16 else torch.float32))

    return step


if __name__ == "__main__":
    serve("dictionary-learning", build)
