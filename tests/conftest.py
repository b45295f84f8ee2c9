"""Shared fixtures: tiny models of every family, a tiny tokenizer, a tiny corpus; all made here, offline.

Uninitialised memory is filled with NaN in every test, so code that reads what it never wrote fails.
"""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not torch.cuda.is_available():  # read once, when Triton is first imported, by whichever test that is
    os.environ["TRITON_INTERPRET"] = "1"

# Beside other workers of pytest-xdist each has its share of the cores: more threads than cores only wait for
# each other. Children that a test starts inherit the variable.
THREADS = max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))
torch.set_num_threads(min(THREADS, torch.get_num_threads()))

VOCABULARY = 128
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GPT2_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 2,
    "n_positions": 64,
}
SPECIALS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GEMMA_SIZES = SIZES | {"head_dim": 16, "num_key_value_heads": 1}
EXPERT_SIZES = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 0,
    "n_group": 1,
    "topk_group": 1,
    "head_dim": 16,
}
LATENT_ATTENTION = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
}
VISION_SIZES = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "image_size": 28,
    "patch_size": 14,
}


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A process with everything imported, out of which commands start at once (`faults/zygote.py`)."""
    from faults.tools import Zygote

    made = Zygote(tmp_path_factory.mktemp("zygote"))
    yield made
    assert made.server.stdin is not None
    made.server.stdin.close()
    made.server.wait(60)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread of torch: a second one only costs time in tensors as small as most tests'."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are empty files: drawing those of its report is two thirds of a tiny run in this process."""

    def empty(figure: Any, path: Any, **kwargs: Any) -> None:
        Path(path).write_bytes(b"")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", empty)


@pytest.fixture
def optional_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `make test` installs beside the environment: see the Makefile."""
    monkeypatch.syspath_prepend(str(Path(sys.prefix) / "optional"))


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN (the largest integer for integer types) instead of whatever was there."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def tiny_config(model_type: str) -> Any:
    """A configuration of a model with 3 layers of width 32 and 128 tokens."""
    from transformers import AutoConfig

    from sae_train.harvest.families.experts import EXPERTS

    if model_type == "gpt2":
        return AutoConfig.for_model(model_type, **GPT2_SIZES, **SPECIALS)
    if model_type == "gemma3":
        text = GEMMA_SIZES | SPECIALS
        return AutoConfig.for_model(
            model_type, text_config=text, vision_config=VISION_SIZES, mm_tokens_per_image=4
        )
    sizes = GEMMA_SIZES if model_type.startswith("gemma") else SIZES
    if model_type in EXPERTS.model_types:
        sizes = SIZES | EXPERT_SIZES | (LATENT_ATTENTION if model_type.startswith("deepseek") else {})
    if model_type == "ministral":
        sizes = SIZES | {"head_dim": 16}
    return AutoConfig.for_model(model_type, **sizes, **SPECIALS)


@pytest.fixture(scope="session")
def tiny_model() -> Callable[[str], Any]:
    """model type -> a model with random weights in evaluation mode; made once, so leave it as it was."""
    from transformers import AutoModel, AutoModelForCausalLM

    made: dict[str, Any] = {}

    def make(model_type: str) -> Any:
        if model_type not in made:
            config = tiny_config(model_type)
            encoder = model_type in ("bert", "roberta", "xlm-roberta", "camembert")
            torch.manual_seed(0)
            model = (AutoModel if encoder else AutoModelForCausalLM).from_config(config)
            with torch.no_grad():
                for weight in model.parameters():  # the usual 0.02 would make every layer nearly an identity
                    weight.add_(torch.randn_like(weight), alpha=0.1)
            made[model_type] = model.eval().requires_grad_(False)
        return made[model_type]

    return make


@pytest.fixture(scope="session")
def tiny_model_dir(
    tiny_model: Callable[[str], Any], tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """model type -> a folder with that model and the tiny tokenizer, as `from_pretrained` reads it."""
    root = tmp_path_factory.mktemp("models")

    def save(model_type: str) -> Path:
        folder = root / model_type
        if not folder.exists():
            tiny_model(model_type).save_pretrained(folder)
            tiny_tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """One word, one token: <pad> <bos> <eos> <unk> w0 ... w123; a document begins with <bos>."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    specials = ["<pad>", "<bos>", "<eos>", "<unk>"]
    words = specials + [f"w{i}" for i in range(VOCABULARY - len(specials))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


@pytest.fixture(scope="session")
def tiny_corpus_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 text files of 20 to 59 words of the tiny tokenizer, Zipf-distributed, always the same."""
    folder = tmp_path_factory.mktemp("corpus")
    generator = torch.Generator().manual_seed(0)
    odds = 1.0 / torch.arange(1, VOCABULARY - 3)
    for i in range(40):
        words = torch.multinomial(odds, 20 + i, replacement=True, generator=generator).tolist()
        (folder / f"{i:02}.txt").write_text(" ".join(f"w{word}" for word in words) + "\n")
    return folder
