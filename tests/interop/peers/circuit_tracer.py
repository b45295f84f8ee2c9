"""circuit-tracer: its readers of sets and of Gemma Scope 2, and a set from the hub in a model that it traces.

By its own name, so that this file is not taken for it.
"""

import sys
from pathlib import Path

sys.path = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]
import torch  # noqa: E402
import yaml  # noqa: E402
from circuit_tracer import attribute  # noqa: E402
from circuit_tracer.replacement_model.replacement_model_transformerlens import (  # noqa: E402
    TransformerLensReplacementModel,
)
from circuit_tracer.transcoder.single_layer_transcoder import (  # noqa: E402
    load_gemma_scope_2_transcoder,
    load_transcoder_set,
)
from circuit_tracer.utils.hf_utils import load_transcoder_from_hub  # noqa: E402
from tokenizers import Tokenizer, models  # noqa: E402
from transformer_lens import HookedTransformerConfig  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

sys.path.append(str(Path(__file__).resolve().parent))
from work import Peer, work  # noqa: E402

CPU = torch.device("cpu")
LAYERS, WORDS = 2, 50


def load(folder: Path) -> Peer:
    if (folder / "params.safetensors").exists():
        sae = load_gemma_scope_2_transcoder(str(folder / "params.safetensors"), 0, CPU)
    else:
        config = yaml.safe_load((folder / "config.yaml").read_text())
        assert config["model_kind"] == "transcoder_set" and "scan" in config
        paths = {i: str(folder / f"layer_{i}.safetensors") for i in range(2)}
        hooks = {key: config[key] for key in ("feature_input_hook", "feature_output_hook")}
        whole = load_transcoder_set(paths, scan=config["scan"], device=CPU, dtype=torch.float32, **hooks)
        sae = whole[1]
    return sae.encode, lambda x, codes: sae.decode(codes, x)


def from_hub(address: str, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """A set by its address, in place of the MLPs of a small random model.

    Returns:
        rows.L, codes.L and y.L: what layer L's transcoder read, coded and wrote, at all positions but the
        first, which the tool leaves out; and how many latents an attribution graph found active.
    """
    transcoders, config = load_transcoder_from_hub(address, device=CPU)
    torch.manual_seed(0)
    d = transcoders[0].W_enc.shape[1]
    sizes = {"n_layers": LAYERS, "d_model": d, "d_head": d // 2, "d_mlp": 2 * d, "n_heads": 2, "n_ctx": 16}
    model = TransformerLensReplacementModel.from_config(
        HookedTransformerConfig(
            **sizes, d_vocab=WORDS, act_fn="relu", normalization_type="LN", device="cpu", model_name="small"
        ),
        transcoders,
    )
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w1"))
    model.tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w0", unk_token="w1")
    read = [f"blocks.{layer}.{config['feature_input_hook']}" for layer in range(LAYERS)]
    tokens = torch.arange(12)[None] % WORDS
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter=read)
        _, codes = model.get_activations(tokens[0])
    answer = {}
    for layer, hook in enumerate(read):
        rows, found = cache[hook][0, 1:], codes[layer, 1:]
        answer |= {f"rows.{layer}": rows, f"codes.{layer}": found}
        answer[f"y.{layer}"] = transcoders[layer].decode(found, rows)
    with torch.enable_grad():
        graph = attribute(tokens[0], model, max_n_logits=2)
    assert bool(torch.isfinite(graph.adjacency_matrix).all()) and bool((graph.adjacency_matrix != 0).any())
    answer["active"] = graph.active_features.clone()
    return {name: tensor.clone().contiguous() for name, tensor in answer.items()}


if __name__ == "__main__":
    work(load, ask=from_hub)
