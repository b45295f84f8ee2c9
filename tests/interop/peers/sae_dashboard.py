"""sae-dashboard: a whole run of its SaeVisRunner, in SAELens' environment; by its own name, so that this file
is not taken for it."""

import os
import sys
from pathlib import Path

sys.path = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]
sys.path.append(os.environ["PEER_PACKAGES"])
import torch  # noqa: E402
from sae_dashboard.sae_vis_data import SaeVisConfig  # noqa: E402
from sae_dashboard.sae_vis_runner import FeatureDataGeneratorFactory, SaeVisRunner  # noqa: E402
from sae_lens import SAE  # noqa: E402

sys.path.append(str(Path(__file__).resolve().parent))
from rows_model import HOOK, model_of, tokens_of  # noqa: E402
from work import Peer, work  # noqa: E402


def load(folder: Path) -> Peer:
    sae = SAE.load_from_disk(str(folder), device="cpu")
    assert sae.cfg.metadata.hook_name == HOOK

    def encode(x: torch.Tensor) -> torch.Tensor:
        """What its pages show: all latents, in groups of 7, after the fold that it begins with."""
        latents = list(range(sae.cfg.d_sae))
        config = SaeVisConfig(hook_point=HOOK, features=latents, minibatch_size_features=7)
        examples = config.feature_centric_layout.seq_cfg
        examples.buffer, examples.top_acts_group_size, examples.n_quantiles = None, 5, 0  # prompts are short
        model, tokens = model_of(x), tokens_of(x)
        pages = SaeVisRunner(config).run(encoder=sae, model=model, tokens=tokens)
        generator = FeatureDataGeneratorFactory.create(config, model, sae, tokens)
        groups = [generator.get_feature_data(latents[i : i + 7])[0] for i in range(0, len(latents), 7)]
        codes = torch.cat(groups, dim=-1).flatten(0, 1)
        for i in latents:
            title = pages.feature_data_dict[i].acts_histogram_data.title
            density = float((codes[:, i] > 0).double().mean())
            assert title is None if density == 0 else f"{density:.3%}" in title, (title, density)
        return codes.clone()

    return encode, lambda x, codes: sae.decode(codes)


if __name__ == "__main__":
    work(load)
