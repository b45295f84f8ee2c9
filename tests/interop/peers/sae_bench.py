"""SAEBench: its core evaluation, in SAELens' environment; by its own name, so that this file is not taken
for it."""

import os
import sys
from pathlib import Path

sys.path = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]
sys.path.append(os.environ["PEER_PACKAGES"])
import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from sae_bench.evals.core.eval_config import CoreEvalConfig  # noqa: E402
from sae_bench.evals.core.main import run_evals  # noqa: E402
from sae_bench.sae_bench_utils.general_utils import load_and_format_sae  # noqa: E402
from sae_lens import SAE  # noqa: E402
from sae_lens.training.activations_store import ActivationsStore  # noqa: E402

sys.path.append(str(Path(__file__).resolve().parent))
from rows_model import CONTEXT, model_of, tokens_of  # noqa: E402
from work import Peer, work  # noqa: E402


def whole(folder: Path) -> SAE:
    loaded = load_and_format_sae("ours", SAE.load_from_disk(str(folder), device="cpu"), "cpu")
    assert loaded is not None
    return loaded[1]


def load(folder: Path) -> Peer:
    sae = whole(folder)
    return sae.encode, lambda x, codes: sae.decode(codes)


def measure(folder: Path, x: torch.Tensor) -> dict[str, float]:
    """What it reports of the SAE on the rows of a test."""
    sae, model, tokens = whole(folder), model_of(x), tokens_of(x)
    store = ActivationsStore.from_sae(
        model, sae, Dataset.from_dict({"tokens": tokens.tolist()}), context_size=CONTEXT, streaming=False
    )
    config = CoreEvalConfig(
        model_name="rows",
        batch_size_prompts=len(tokens),
        n_eval_reconstruction_batches=1,
        n_eval_sparsity_variance_batches=1,
        compute_kl=True,
        compute_ce_loss=True,
        compute_l2_norms=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
        compute_featurewise_density_statistics=True,
        compute_featurewise_weight_based_metrics=True,
        context_size=CONTEXT,
    )
    found, latents = run_evals(sae, store, model, config)
    assert len(latents["feature_density"]) == sae.cfg.d_sae
    return {name: value for group in found.values() for name, value in group.items()}


if __name__ == "__main__":
    work(load, measure=measure)
