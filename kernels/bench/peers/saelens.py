"""SAELens: TopKTrainingSAE and the `step` of its SAETrainer, as its `fit` calls it.

Variant `sparse` sets use_sparse_activations, which its documentation advises in float32 alone. It then has to
leave rescale_acts_by_decoder_norm off, since the backward pass of the two together fails (torch 2.13, CPU).
"""

import torch
from peers.protocol import Job, Start, Step, serve
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor


def build(job: Job, start: Start) -> Step:
    d_sae, d_in = start["w_enc"].shape
    sparse = job.variant == "sparse"
    config = TopKTrainingSAEConfig(
        d_in=d_in,
        d_sae=d_sae,
        k=job.k,
        device="cpu",
        use_sparse_activations=sparse,
        rescale_acts_by_decoder_norm=not sparse,
    )
    sae = TopKTrainingSAE(config)
    with torch.no_grad():
        sae.W_enc.copy_(start["w_enc"].T)
        sae.b_enc.copy_(start["b_enc"])
        sae.W_dec.copy_(start["w_dec"])
        sae.b_dec.copy_(start["b_dec"])
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=10**9,
            train_batch_size_samples=job.rows,
            lr=job.lr,
            lr_end=job.lr,
            autocast=job.bf16,
            device="cpu",
            logger=LoggingConfig(log_to_wandb=False),
        ),
        sae,
        data_provider=iter(()),
    )

    def step(x: Tensor) -> Tensor:
        trainer.maybe_reset_sparsity()
        out = trainer.step(x)
        trainer.n_training_steps += 1
        return out.losses["mse_loss"].detach()

    return step


if __name__ == "__main__":
    serve("sae-lens", build)
