"""SAELens: TopKTrainingSAE and the `fit` of its SAETrainer.

Defaults, with `lr_end` given (the default fails). Tuned: learning rate 1e-3 (synthetic rows 2e-3), warm-up
over 40 steps, decay over the last fifth, the rows' norm taken out, latents dead after 50 steps.
"""

from peers.protocol import Job, Trained, work
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor


def train(job: Job, batches: list[Tensor]) -> Trained:
    assert job.activation == "topk"
    steps = len(batches)
    config = TopKTrainingSAEConfig(
        d_in=batches[0].shape[1],
        d_sae=job.d_sae,
        k=job.k,
        device="cpu",
        normalize_activations="expected_average_only_in" if job.tuned else "none",
    )
    sae = TopKTrainingSAE(config)
    tuned = {
        "lr": job.lr,
        "lr_end": 0.0,
        "lr_warm_up_steps": 40,
        "lr_decay_steps": steps // 5,
        "dead_feature_window": 50,
        "n_batches_for_norm_estimate": 100,
    }
    trainer_config = SAETrainerConfig(
        total_training_samples=steps * job.batch,
        train_batch_size_samples=job.batch,
        device="cpu",
        logger=LoggingConfig(log_to_wandb=False),
        **(tuned if job.tuned else {"lr_end": 3e-5}),
    )
    # The norm is estimated from rows that come again in training.
    first = batches[:100] if job.tuned else []
    trained = SAETrainer(trainer_config, sae, data_provider=iter([*first, *batches])).fit()
    if trained.cfg.rescale_acts_by_decoder_norm:
        trained.fold_W_dec_norm()
    w_enc, b_enc, b_dec = trained.W_enc.T, trained.b_enc, trained.b_dec
    if not trained.cfg.apply_b_dec_to_input:
        b_enc = b_enc + w_enc @ b_dec
    return Trained(w_enc, b_enc, trained.W_dec, b_dec, trained)


if __name__ == "__main__":
    work("sae-lens", train)
