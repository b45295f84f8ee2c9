"""sparsify: its Trainer, which takes a model and its tokens: here a model whose only layer looks rows up.

Defaults (schedule-free Signum). Tuned: Adam with learning rate 1e-3 (2e-3 on synthetic rows), warm-up over 40
steps, AuxK 1/32 for latents dead for 100,000 rows.
"""

import tempfile

import torch
from datasets import Dataset
from peers.protocol import Job, Trained, work
from sparsify import SparseCoderConfig, TrainConfig, Trainer
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

WINDOW = 128


class RowsConfig(PretrainedConfig):
    model_type = "rows"


class Rows(PreTrainedModel):
    """Token i "has" row i: what a language model would compute, computed before."""

    config_class = RowsConfig

    def __init__(self, rows: Tensor) -> None:
        super().__init__(RowsConfig())
        self.layer = nn.Embedding.from_pretrained(rows)

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        return {"input_ids": torch.zeros(1, 8, dtype=torch.long)}

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.layer(input_ids)


def train(job: Job, batches: list[Tensor]) -> Trained:
    assert job.activation == "topk"
    rows = torch.cat(batches)
    windows = torch.arange(len(rows)).view(-1, WINDOW)
    dataset = Dataset.from_dict({"input_ids": windows.numpy()}).with_format("torch")
    tuned = {
        "optimizer": "adam",
        "lr": job.lr,
        "lr_warmup_steps": 40,
        "auxk_alpha": 1 / 32,
        "dead_feature_threshold": 100_000,
    }
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            SparseCoderConfig(num_latents=job.d_sae, k=job.k),
            batch_size=job.batch // WINDOW,
            hookpoints=["layer"],
            init_seeds=[job.seed],
            log_to_wandb=False,
            save_every=10**9,
            save_dir=folder,
            **(tuned if job.tuned else {}),
        )
        trainer = Trainer(config, dataset, Rows(rows))
        trainer.fit()
    (sae,) = trainer.saes.values()
    for optimizer in trainer.optimizers:
        if hasattr(optimizer, "eval"):
            optimizer.eval()  # schedule-free: the averaged weights, which its checkpoint has
    return Trained(sae.encoder.weight, sae.encoder.bias, sae.W_dec, sae.b_dec, lambda x: sae(x).sae_out)


if __name__ == "__main__":
    work("eai-sparsify", train)
