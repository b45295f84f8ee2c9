"""dictionary_learning: trainSAE with its TopK, BatchTopK and JumpReLU trainers.

Defaults, but for a warm-up of a tenth of the steps: the default, 1,000 steps, is refused in a run as short.
Tuned: norm of rows taken out, learning rate 1e-3 (2e-3 on synthetic rows), warm-up over 40 steps, decay in
the last fifth, latents dead after 100,000 rows.
"""

from dictionary_learning.trainers import batch_top_k, jumprelu, top_k
from dictionary_learning.training import trainSAE
from peers.protocol import Job, Trained, work
from torch import Tensor

TRAINERS = {
    "topk": top_k.TopKTrainer,
    "batch_topk": batch_top_k.BatchTopKTrainer,
    "jumprelu": jumprelu.JumpReluTrainer,
}
DEAD_AFTER_ROWS = 100_000


def train(job: Job, batches: list[Tensor]) -> Trained:
    steps = len(batches)
    trainers = []

    def trainer(**config: object) -> object:
        made = TRAINERS[job.activation](**config)
        if job.tuned and hasattr(made, "dead_feature_threshold"):
            made.dead_feature_threshold = DEAD_AFTER_ROWS
        trainers.append(made)
        return made

    config: dict[str, object] = {
        "trainer": trainer,
        "steps": steps,
        "activation_dim": batches[0].shape[1],
        "dict_size": job.d_sae,
        "layer": 0,
        "lm_name": "none",
        "seed": job.seed,
        "device": "cpu",
        "warmup_steps": 40 if job.tuned else steps // 10,
    }
    if job.activation == "jumprelu":
        config |= {"target_l0": job.k, "sparsity_warmup_steps": steps // 5}
    else:
        config |= {"k": job.k, "threshold_start_step": steps // 2}
    if job.tuned:
        config |= {"lr": job.lr, "decay_start": steps * 8 // 10}
    trainSAE(batches, [config], steps, device="cpu", normalize_activations=job.tuned)
    ae = trainers[0].ae
    if job.activation == "jumprelu":
        w_enc, b_enc, w_dec, b_dec = ae.W_enc.T, ae.b_enc, ae.W_dec, ae.b_dec
        if not ae.apply_b_dec_to_input:
            b_enc = b_enc + w_enc @ b_dec
        return Trained(w_enc, b_enc, w_dec, b_dec, ae, ae.threshold)
    threshold = ae.threshold if job.activation == "batch_topk" else None
    encoder, decoder = ae.encoder, ae.decoder
    return Trained(encoder.weight, encoder.bias, decoder.weight.T, ae.b_dec, ae, threshold)


if __name__ == "__main__":
    work("dictionary-learning", train)
