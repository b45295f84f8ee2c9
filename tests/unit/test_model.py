"""Loading: what was loaded is what was asked for, complete and recorded; what cannot be is one line."""

import http.server
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file

from sae_train.errors import InputError
from sae_train.harvest.kinds import is_causal_lm
from sae_train.harvest.load_errors import redact
from sae_train.harvest.model import (
    ModelConfig,
    check_context,
    load_config,
    load_model,
    load_tokenizer,
    pick_device,
    pick_dtype,
)
from sae_train.harvest.provenance import tokenizer_digest

CANARY = "hf_canary0123456789"


@pytest.fixture
def folder(tiny_model_dir, tmp_path) -> Path:
    """A copy of a tiny Llama's folder, to be damaged."""
    return Path(shutil.copytree(tiny_model_dir("llama"), tmp_path / "model"))


def edit(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def load(folder: Path, **settings):
    return load_model(ModelConfig(name=str(folder), device="cpu", dtype="float32", **settings))


def refused(folder: Path, **settings) -> str:
    """The message with which loading is refused: one line, naming a key."""
    with pytest.raises(InputError) as caught:
        load(folder, **settings)
    assert "\n" not in str(caught.value)
    assert caught.value.field.startswith("model.")
    return str(caught.value)


@pytest.mark.parametrize(
    ("model_type", "name"),
    [("llama", "LlamaForCausalLM"), ("gpt2", "GPT2LMHeadModel"), ("bert", "BertModel")],
)
def test_causal_models_come_with_their_head_and_encoders_without(
    model_type, name, tiny_model_dir, tiny_model
):
    model, info = load(tiny_model_dir(model_type))
    assert type(model).__name__ == name
    assert info.causal_lm == is_causal_lm(model) == (model_type != "bert")
    assert not model.training
    assert not any(weight.requires_grad for weight in model.parameters())
    for key, weight in tiny_model(model_type).state_dict().items():
        assert torch.equal(model.state_dict()[key], weight), key


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_are_in_the_dtype_asked_for(dtype, tiny_model_dir):
    model, info = load_model(ModelConfig(name=str(tiny_model_dir("gpt2")), device="cpu", dtype=dtype))
    assert {weight.dtype for weight in model.parameters()} == {getattr(torch, dtype)}
    assert info.dtype == info.fingerprint["dtype"] == dtype


def test_auto_dtype_is_bfloat16_only_where_the_processor_has_it(monkeypatch):
    cpu = torch.device("cpu")
    for avx512, amx, dtype in [
        (True, False, "bfloat16"),
        (False, True, "bfloat16"),
        (False, False, "float32"),
    ]:
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx512=avx512: avx512)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        assert pick_dtype("auto", cpu) == getattr(torch, dtype)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_refused():
    for name in ("cuda", "cuda:3"):
        with pytest.raises(InputError, match="0 CUDA devices"):
            pick_device(name)
    assert pick_device("auto").type == "cpu"


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "meta", ""])
def test_a_device_that_is_no_device_is_refused(name):
    with pytest.raises(InputError, match=r"model\.device"):
        pick_device(name)


def test_wrong_settings_are_refused_by_key():
    with pytest.raises(InputError, match=r"model\.dtype='int8'"):
        ModelConfig(name="x", dtype="int8")
    with pytest.raises(InputError, match=r"model\.micro_batch=0"):
        ModelConfig(name="x", micro_batch=0)


def test_the_fingerprint_is_stable_and_follows_weights_configuration_and_tokenizer(folder):
    _, first = load(folder)
    _, again = load(folder)
    assert first.fingerprint == again.fingerprint
    assert set(first.fingerprint) == {"model", "model_revision", "tokenizer", "dtype", "attn_implementation"}

    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _, other_weights = load(folder)
    assert other_weights.revision != first.revision

    edit(folder / "config.json", rms_norm_eps=1e-5)
    _, other_config = load(folder)
    assert other_config.revision not in (first.revision, other_weights.revision)
    assert other_config.fingerprint["tokenizer"] == first.fingerprint["tokenizer"]

    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace('"w7"', '"x7"'))
    _, other_tokenizer = load(folder)
    assert other_tokenizer.fingerprint["tokenizer"] != first.fingerprint["tokenizer"]


def test_flipping_truncation_is_not_another_tokenizer(folder):
    tokenizer = load_tokenizer(ModelConfig(name=str(folder)))
    before = tokenizer_digest(tokenizer)
    tokenizer(["w1 w2 w3"], truncation=True, max_length=2, padding="max_length")
    assert tokenizer_digest(tokenizer) == before


def test_a_folder_that_is_not_there_or_has_no_model_is_refused(tmp_path):
    assert "a folder that exists" in refused(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "a folder with config.json in it" in refused(tmp_path / "empty")
    assert "a folder with m.gguf in it" in refused(tmp_path / "empty", gguf_file="m.gguf")


def test_damaged_folders_are_refused_in_one_line(folder, tmp_path):
    def damaged(file: str, content: bytes) -> str:
        copy = Path(shutil.copytree(folder, tmp_path / f"damaged-{len(list(tmp_path.iterdir()))}"))
        (copy / file).write_bytes(content)
        return refused(copy)

    whole = (folder / "model.safetensors").read_bytes()
    damaged("model.safetensors", whole[: len(whole) // 2])
    damaged("model.safetensors", b"\xff" * 64)
    damaged("config.json", b"{")
    damaged("config.json", b'{"model_type": "nothing_of_the_kind"}')
    damaged("config.json", b"{}")
    damaged("tokenizer.json", b"{")
    (folder / "model.safetensors").unlink()
    refused(folder)


def test_weights_that_are_missing_or_misshapen_are_not_made_up(folder):
    weights = load_file(folder / "model.safetensors")
    norm = weights.pop("model.norm.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "model.norm.weight" in refused(folder)
    save_file(
        weights | {"model.norm.weight": norm[:5]}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    refused(folder)


def test_an_encoder_without_its_pooler_is_complete(tiny_model_dir, tmp_path):
    folder = Path(shutil.copytree(tiny_model_dir("bert"), tmp_path / "bert"))
    weights = load_file(folder / "model.safetensors")
    kept = {key: value for key, value in weights.items() if not key.startswith("pooler")}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    model, _ = load(folder)
    assert type(model).__name__ == "BertModel"


def test_code_in_a_model_folder_never_runs_on_the_folders_own_word(folder, tmp_path):
    canary = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w').close()\nclass Evil: pass\n")
    auto_map = {
        "AutoConfig": "evil.Evil",
        "AutoModelForCausalLM": "evil.Evil",
        "AutoTokenizer": ["evil.Evil", None],
    }
    edit(folder / "config.json", auto_map=auto_map, trust_remote_code=True)
    edit(folder / "tokenizer_config.json", auto_map=auto_map, trust_remote_code=True)
    model, _ = load(folder)  # a type that transformers knows: its own class is used
    assert type(model).__module__.startswith("transformers.")
    edit(folder / "config.json", model_type="nothing_of_the_kind")
    assert "model.trust_remote_code=False" in refused(folder)
    assert not canary.exists()


def test_encoder_decoders_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(
        '{"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}'
    )
    with pytest.raises(InputError, match="causal language model or an encoder"):
        load_model(ModelConfig(name=str(tmp_path), device="cpu"), tokenizer=VocabularyOnly())


class VocabularyOnly:
    """A tokenizer with a vocabulary and nothing else; it is only asked for its digest."""

    def __init__(self) -> None:
        self.special_tokens_map: dict[str, str] = {}

    def get_vocab(self) -> dict[str, int]:
        return {"a": 0}


@pytest.mark.parametrize(
    ("model_type", "limit"), [("llama", 64), ("gpt2", 64), ("gemma3", 64), ("roberta", 63)]
)
def test_a_context_longer_than_the_models_positions_is_refused(model_type, limit, tiny_model):
    config = tiny_model(model_type).config
    check_context(config, limit)
    with pytest.raises(InputError, match=f"at most {limit}"):
        check_context(config, limit + 1)


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[type]:
    """A hub on this machine that answers everything with `hub.status` and repeats the token it was sent."""

    class Hub(http.server.BaseHTTPRequestHandler):
        status = 404
        asked = 0

        def do_GET(self) -> None:
            type(self).asked += 1
            self.send_response(self.status)
            self.send_header("X-Error-Code", {401: "GatedRepo", 404: "RepoNotFound"}.get(self.status, ""))
            self.send_header("X-Error-Message", f"you sent {self.headers.get('Authorization')}")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *args) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    monkeypatch.setattr(
        huggingface_hub.constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        url + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", CANARY)
    yield Hub
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_a_hub_refuses_is_one_line_without_the_token(status, hub):
    hub.status = status
    config = ModelConfig(name="someone/private-model")
    for ask in (load_config, load_tokenizer):
        with pytest.raises(InputError, match="someone/private-model") as caught:
            ask(config)
        assert CANARY not in str(caught.value)
        assert "\n" not in str(caught.value)
    assert hub.asked


def test_offline_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=r"model\.name='someone/model'"):
        load_config(ModelConfig(name="someone/model"))


@pytest.mark.parametrize(
    "message",
    [
        f"401 for token {CANARY}",
        "Authorization: Bearer secret-canary",
        "https://me:secret-canary@hub/x",
        "token=secret-canary-of-env",
    ],
)
def test_no_secret_survives_redaction(message):
    line = redact(f"\n {message} \x1b[31m\nmore\n", {"HF_TOKEN": "secret-canary-of-env"})
    assert "canary" not in line
    assert "\x1b" not in line
    assert "more" not in line
