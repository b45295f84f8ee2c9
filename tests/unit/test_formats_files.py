"""What each format's files say where other libraries' defaults would change codes in silence."""

import json
import math

import numpy as np
import pytest
import torch
from format_cases import KINDS, F, about, built, rows
from safetensors.torch import load_file, save_file

from sae_train import load_sae, save_sae
from sae_train.cli.export import PROOF
from sae_train.errors import InputError
from sae_train.files import write_json, write_tensors
from sae_train.formats.about import about_of, our_hook
from sae_train.formats.base import FORMATS, About, FormatConfig, Place
from sae_train.formats.blocks import Matrix, Stored, TensorFile, write_file
from sae_train.formats.circuit_tracer import in_layers
from sae_train.formats.openmoss import factor
from sae_train.formats.plain import Plain, of_sae
from sae_train.formats.proof import compare
from sae_train.load import recognise

pytestmark = pytest.mark.usefixtures("one_thread")

AUTO = ("linear", "autoencoder", "topk")


def written(case, format_name, folder, told=None, dtype=torch.float32):
    """Write an SAE in a format; its plain form."""
    plain = of_sae(built(*case))
    FORMATS.build(FormatConfig(format_name)).write([(plain, told or about(case[1]))], folder, dtype)
    return plain


def config(folder, name="cfg.json"):
    return json.loads((folder / name).read_text())


def test_saelens_is_told_everything_that_it_would_otherwise_assume(tmp_path):
    plain = written(AUTO, "saelens", tmp_path)
    table, tensors = config(tmp_path), load_file(tmp_path / "sae_weights.safetensors")
    assert table["k"] == 4 and table["apply_b_dec_to_input"] is True
    assert table["rescale_acts_by_decoder_norm"] is True
    assert table["normalize_activations"] == table["reshape_activations"] == "none"
    assert int(table["metadata"]["sae_lens_version"].split(".")[0]) >= 6
    assert table["metadata"]["hook_name"] == "blocks.0.mlp.hook_in"
    assert table["metadata"]["hf_hook_name"] == "transformer.h.0.mlp"
    assert table["metadata"]["training"] == {"tokens": 1000, "seed": 0}
    assert tensors.keys() == {"W_enc", "b_enc", "W_dec", "b_dec"}
    assert torch.equal(tensors["W_enc"], plain.w_enc.whole().T) and tensors["W_dec"].shape == (F, 12)
    sparsity = load_file(tmp_path / "sparsity.safetensors")["sparsity"]
    assert sparsity.shape == (F,) and float(sparsity[0]) == pytest.approx(-10) and float(sparsity[-1]) == 0


def test_a_decoder_that_is_not_of_unit_rows_is_not_called_so(tmp_path):
    plain = of_sae(built(*AUTO))
    longer = Plain(**{**vars(plain), "w_dec": plain.w_dec.scaled(torch.full((F,), 1.1))})
    FORMATS.build(FormatConfig("saelens")).write([(longer, about("autoencoder"))], tmp_path, torch.float32)
    assert config(tmp_path)["rescale_acts_by_decoder_norm"] is False
    (found,) = FORMATS.build(FormatConfig("saelens")).read(tmp_path)
    assert compare(longer, found.plain, rows(KINDS["autoencoder"]), torch.float32).holds


def test_saelens_top_k_by_decoder_norm_is_read_as_it_computes(tmp_path):
    """h |d| decides, codes are h |d|, and decoder rows count as unit vectors."""
    plain = written(AUTO, "saelens", tmp_path)
    weights = tmp_path / "sae_weights.safetensors"
    tensors = load_file(weights)
    norms = torch.linspace(0.5, 2, F)
    tensors["W_dec"] *= norms[:, None]
    save_file(tensors, weights)
    sae, x = load_sae(tmp_path), rows(KINDS["autoencoder"])
    h = torch.relu((x - plain.b_dec) @ tensors["W_enc"] + tensors["b_enc"]) * norms
    values, places = h.topk(4, dim=-1)
    want = torch.zeros_like(h).scatter(1, places, values)
    torch.testing.assert_close(sae.encode(x).dense(), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sae(x), (want / norms) @ tensors["W_dec"] + plain.b_dec, rtol=1e-4, atol=1e-4)


EARLIER = {"hook_point": "blocks.3.hook_resid_post", "model_name": "gpt2", "activation_fn_str": "relu"}
"""As release 2 wrote it, beside the widths."""


@pytest.mark.parametrize("rule", ["relu", "topk", "jumprelu"])
def test_a_saelens_folder_of_before_release_6_is_read_as_6_reads_it(rule, tmp_path):
    plain = written(("linear", "autoencoder", rule), "saelens", tmp_path)
    table = {key: value for key, value in config(tmp_path).items() if key in ("d_in", "d_sae", "dtype")}
    table |= EARLIER | {"normalize_activations": False, "finetuning_scaling_factor": False}
    if rule == "topk":
        table |= {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}}
    if rule == "jumprelu":
        table |= {"architecture": "jumprelu"}
    weights = tmp_path / "sae_weights.safetensors"
    save_file(load_file(weights) | {"scaling_factor": torch.ones(F)}, weights)
    (tmp_path / "cfg.json").write_text(json.dumps(table))
    (found,) = FORMATS.build(FormatConfig("saelens")).read(tmp_path)
    assert (found.hook, found.model) == ("blocks.3.hook_resid_post", "gpt2")
    assert compare(plain, found.plain, rows(KINDS["autoencoder"]), torch.float32).holds


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"normalize_activations": True}, "normalize_activations='expected_average_only_in'"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations='layer_norm'"),
        ({"finetuning_scaling_factor": True}, "finetuning_scaling_factor=True"),
        ({"activation_fn_str": "tanh-relu"}, "activation_fn='tanh-relu'"),
        ({"activation_fn_str": "topk"}, "k=None: expected a whole number"),
        ({"activation_fn_str": "topk", "activation_fn_kwargs": {"k": "4"}}, "k='4'"),
        ({"sae_lens_version": "six"}, "sae_lens_version='six'"),
        ({"sae_lens_version": "\u0666.0"}, "sae_lens_version="),
    ],
)
def test_what_release_6_would_misread_in_an_earlier_folder_is_refused(wrong, words, tmp_path):
    written(("linear", "autoencoder", "relu"), "saelens", tmp_path)
    table = {key: value for key, value in config(tmp_path).items() if key in ("d_in", "d_sae", "dtype")}
    (tmp_path / "cfg.json").write_text(json.dumps(table | EARLIER | wrong))
    with pytest.raises(InputError, match=words):
        load_sae(tmp_path)


def test_factors_that_were_never_folded_are_refused(tmp_path):
    written(("linear", "autoencoder", "relu"), "saelens", tmp_path)
    weights = tmp_path / "sae_weights.safetensors"
    save_file(load_file(weights) | {"scaling_factor": torch.full((F,), 1.5)}, weights)
    with pytest.raises(InputError, match="scaling_factor="):
        load_sae(tmp_path)


@pytest.mark.parametrize(
    ("case", "architecture"),
    [
        (("linear", "autoencoder", "relu"), "standard"),
        (("matryoshka", "autoencoder", "batch_topk"), "jumprelu"),
        (("gated", "autoencoder", "jumprelu"), "gated"),
        (("linear", "transcoder", "relu"), "transcoder"),
        (("gated", "transcoder", "relu"), "jumprelu_transcoder"),
        (("linear", "skip transcoder", "relu"), "skip_transcoder"),
        (("linear", "skip transcoder", "batch_topk"), "jumprelu_skip_transcoder"),
    ],
)
def test_saelens_gets_the_class_that_computes_the_same(case, architecture, tmp_path):
    written(case, "saelens", tmp_path)
    table = config(tmp_path)
    assert table["architecture"] == architecture
    assert table["apply_b_dec_to_input"] is ("transcoder" not in architecture)
    assert ("d_out" in table) == ("transcoder" in architecture)
    if "transcoder" in architecture:
        assert table["metadata"]["hook_name_out"] == "blocks.0.hook_mlp_out"


def test_the_merged_folder_has_one_configuration_for_both(tmp_path):
    written(AUTO, "merged", tmp_path)
    table = config(tmp_path)
    assert table["d_in"] == 12 and table["d_sae"] == table["num_latents"] == F and table["k"] == 4
    assert table["activation"] == "topk" and table["transcode"] is False
    lens, other = (load_file(tmp_path / n) for n in ("sae_weights.safetensors", "sae.safetensors"))
    assert torch.equal(lens["W_enc"].T, other["encoder.weight"]) and torch.equal(
        lens["W_dec"], other["W_dec"]
    )


def test_dictionary_learning_gets_its_k_in_both_places_and_no_strangers_objects(tmp_path):
    for rule, name, level in (("topk", "AutoEncoderTopK", -1), ("batch_topk", "BatchTopKSAE", None)):
        folder = tmp_path / rule
        folder.mkdir()
        plain = written(("linear", "autoencoder", rule), "dictionary_learning", folder)
        trainer = config(folder, "config.json")["trainer"]
        state = torch.load(folder / "ae.pt", weights_only=True)
        assert trainer["dict_class"] == name and trainer["k"] == int(state["k"]) == 4
        assert state["k"].dtype == torch.int32
        assert float(state["threshold"]) == (level or float(plain.rule.threshold[0]))
        assert state["decoder.weight"].shape == (12, F) and state["decoder.weight"].is_contiguous()


def test_dictionary_learning_s_own_renormalisation_is_done_when_reading(tmp_path):
    plain = written(("linear", "autoencoder", "relu"), "dictionary_learning", tmp_path)
    state = torch.load(tmp_path / "ae.pt", weights_only=True)
    norms = torch.linspace(0.5, 2, F)
    state["decoder.weight"] = state["decoder.weight"] * norms
    torch.save(state, tmp_path / "ae.pt")
    sae, x = load_sae(tmp_path), rows(KINDS["autoencoder"])
    h = torch.relu((x - plain.b_dec) @ plain.w_enc.whole().T + plain.b_enc)
    torch.testing.assert_close(sae.encode(x).dense(), h * norms, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sae.w_dec.norm(dim=-1), torch.ones(F))


def test_dictionary_learning_s_matryoshka_keeps_its_groups(tmp_path):
    plain = written(("linear", "autoencoder", "batch_topk"), "dictionary_learning", tmp_path)
    table = config(tmp_path, "config.json")
    table["trainer"]["dict_class"] = "MatryoshkaBatchTopKSAE"
    write_json(tmp_path / "config.json", table)
    state = {"W_enc": plain.w_enc.whole().T, "b_enc": plain.b_enc, "W_dec": plain.w_dec.whole()}
    state |= {"b_dec": plain.b_dec, "k": torch.tensor(4), "threshold": plain.rule.threshold[0]}
    torch.save(state | {"group_sizes": torch.tensor([5, 15, 20])}, tmp_path / "ae.pt")
    sae = load_sae(tmp_path)
    assert (sae.config.name, sae.config.activation.name) == ("matryoshka", "batch_topk")
    assert sae.ends == [5, 20, 40] and sae.config.activation.k == 4
    assert compare(sae, plain, rows(KINDS["autoencoder"]), torch.float32).holds


def test_openmoss_counts_latents_by_a_factor_that_comes_out_right():
    for d_model in (7, 12, 49, 768, 2304, 4096):
        for d_sae in (1, 10, 41, 100, 24576, 65535, 99991, 2**20, 2**24):
            assert int(d_model * factor(d_sae, d_model)) == d_sae, (d_model, d_sae)


def test_openmoss_gets_logarithms_and_nothing_to_scale(tmp_path):
    plain = written(("linear", "autoencoder", "jumprelu"), "openmoss", tmp_path)
    table = config(tmp_path, "config.json")
    assert table["norm_activation"] == "inference" and table["sparsity_include_decoder_norm"] is False
    tensors = load_file(tmp_path / "sae_weights.safetensors")
    level = tensors["activation_function.log_jumprelu_threshold"]
    torch.testing.assert_close(level.exp(), plain.rule.threshold, rtol=1e-5, atol=1e-37)
    assert torch.isfinite(level).all()
    h = rows(KINDS["autoencoder"]) @ tensors["W_E"] + tensors["b_E"]
    z = h * (h > level.exp())
    y = z @ tensors["W_D"] + tensors["b_D"]
    torch.testing.assert_close(y, built("linear", "autoencoder", "jumprelu")(rows(KINDS["autoencoder"])))


def test_openmoss_crosscoders_are_written_as_its_own_code_reads_them(tmp_path):
    sae = built("linear", "crosscoder", "relu")
    written(("linear", "crosscoder", "relu"), "openmoss", tmp_path)
    t = load_file(tmp_path / "sae_weights.safetensors")
    x = rows(KINDS["crosscoder"]).view(-1, 2, 12)
    norms = t["W_D"].norm(dim=-1)
    hidden = (torch.einsum("nld,ldf->nlf", x, t["W_E"]) + t["b_E"]).sum(dim=1, keepdim=True)
    z = torch.relu(hidden * norms) / norms
    y = torch.einsum("nlf,lfd->nld", z, t["W_D"]) + t["b_D"]
    torch.testing.assert_close(y.flatten(1), sae(rows(KINDS["crosscoder"])), rtol=1e-4, atol=1e-4)


def test_gemma_scope_1_and_2_are_read_as_the_same(tmp_path):
    plain = written(("linear", "autoencoder", "jumprelu"), "gemma_scope", tmp_path)
    assert config(tmp_path, "config.json")["architecture"] == "jump_relu"
    tensors = load_file(tmp_path / "params.safetensors")
    old = tmp_path / "old"
    old.mkdir()
    names = {"w_enc": "W_enc", "w_dec": "W_dec", "b_enc": "b_enc", "b_dec": "b_dec", "threshold": "threshold"}
    np.savez(old / "params.npz", **{names[name]: tensor.numpy() for name, tensor in tensors.items()})
    x = rows(KINDS["autoencoder"])
    for folder in (tmp_path, old):
        proof = compare(load_sae(folder), plain, x, torch.float32)
        assert proof.holds and proof.codes < 1e-5


def test_gemma_scope_stores_its_affine_map_the_other_way_round(tmp_path):
    plain = written(("linear", "skip transcoder", "jumprelu"), "gemma_scope", tmp_path)
    stored = load_file(tmp_path / "params.safetensors")["affine_skip_connection"]
    assert torch.equal(stored, plain.w_skip.T) and not torch.equal(stored, plain.w_skip)
    assert config(tmp_path, "config.json")["hf_hook_point_in"] == "transformer.h.0.mlp.input"


def layer(number, rule="relu", d_sae=None, kind="transcoder"):
    plain = of_sae(built("linear", kind, rule))
    if d_sae is not None:
        plain = Plain(**{**vars(plain), "w_enc": Matrix.of(plain.w_enc.whole()[:d_sae])})
    return plain, about(kind, number)


@pytest.mark.parametrize(
    ("saes", "layers", "words"),
    [
        ([layer(0), layer(2)], None, "none of 1"),
        ([layer(0), layer(1)], 4, "none of 2, 3"),
        ([layer(0), layer(0)], None, "two of 0"),
        ([layer(0), layer(1, d_sae=20)], None, "of one width"),
        ([layer(0), (layer(1)[0], About(inputs=(Place("embed"),)))], None, "within a layer"),
    ],
)
def test_a_set_that_is_not_complete_says_what_is_missing(saes, layers, words):
    with pytest.raises(InputError, match=words):
        in_layers(saes, layers)


def test_an_about_holds_hub_names_and_facts_and_no_path_or_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "s3cret-and-long")
    meta = {
        "model": "/home/me/models/llama",
        "hook": "mlp_in.3",
        "target": "mlp_out.3",
        "hooks": {"mlp_in.3": {"module": "model.layers.3.mlp", "side": "in", "transformer_lens": None}},
        "corpus": "~/texts",
        "tokens": 5,
        "seed": 1,
        "fingerprint": {"by": "s3cret-and-long"},
        "context_length": 64,
    }
    save_sae(built("linear", "transcoder", "relu"), tmp_path, meta)
    write_json(tmp_path / "metrics.json", {"l0": 3.5})
    write_tensors(tmp_path / "features.safetensors", {"train_density": torch.rand(F)})
    found = about_of(tmp_path)
    assert found.model is None and found.corpus is None and found.l0 == 3.5 and found.context_length == 64
    assert found.place == Place("mlp_in.3", "blocks.3.mlp.hook_in", "model.layers.3.mlp", "in")
    assert found.place.below_base == "layers.3.mlp" and found.place.layer == 3
    assert found.outputs[0].tl == "blocks.3.hook_mlp_out" and found.density.shape == (F,)
    text = json.dumps(found.facts)
    assert "home" not in text and "s3cret" not in text and found.facts["tokens"] == 5
    assert about_of(tmp_path, "me/llama").model == "me/llama"


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("blocks.12.hook_resid_post", "resid_post.12"),
        ("blocks.3.hook_out", "resid_post.3"),
        ("blocks.3.mlp.hook_in", "mlp_in.3"),
        ("model.layers.3", "model.layers.3"),
        ("blocks.3.attn.hook_z", "blocks.3.attn.hook_z"),
        (None, None),
    ],
)
def test_hooks_of_other_libraries_are_spelt_as_ours_where_we_have_a_name(theirs, ours):
    assert our_hook(theirs) == ours


@pytest.mark.parametrize(
    ("files", "name"),
    [
        ({"config.json", "sae.safetensors"}, None),
        ({"config.json", "sae.safetensors", "cfg.json", "sae_weights.safetensors"}, None),
        ({"cfg.json", "sae_weights.safetensors"}, "saelens"),
        ({"cfg.json", "sae_weights.safetensors", "sae.safetensors"}, "saelens"),
        ({"cfg.json", "sae.safetensors"}, "sparsify"),
        ({"config.json", "sae_weights.safetensors"}, "openmoss"),
        ({"config.json", "ae.pt"}, "dictionary_learning"),
        ({"config.json", "params.safetensors"}, "gemma_scope"),
        ({"params.npz"}, "gemma_scope"),
        ({"config.yaml", "layer_0.safetensors", "layer_1.safetensors"}, "circuit_tracer"),
    ],
)
def test_a_folder_is_known_by_its_files(files, name, tmp_path):
    for file in files:
        (tmp_path / file).touch()
    assert recognise(tmp_path) == name


@pytest.mark.parametrize("files", [(), ("ae.pt",), ("config.json",), ("model.safetensors", "config.json")])
def test_a_folder_of_no_format_is_refused_with_what_would_do(files, tmp_path):
    for file in files:
        (tmp_path / file).touch()
    with pytest.raises(InputError, match=r"config.json and sae.safetensors.*params.npz"):
        load_sae(tmp_path)
    with pytest.raises(InputError, match="a folder that holds an SAE"):
        load_sae(tmp_path / "nowhere")
    with pytest.raises(InputError, match="a folder that holds an SAE"):
        load_sae("x\0y")


def test_a_set_has_no_one_sae_to_load(tmp_path):
    format_ = FORMATS.build(FormatConfig("circuit_tracer"))
    format_.write([layer(0), layer(1)], tmp_path, torch.float32)
    assert [found.name for found in format_.read(tmp_path)] == ["layer_0", "layer_1"]
    with pytest.raises(InputError, match="sae-train import makes a folder of each"):
        load_sae(tmp_path)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16])
def test_blocks_written_and_read_are_what_safetensors_reads(transposed, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr("sae_train.formats.blocks.BLOCK_ELEMENTS", 7 * 30)
    weights = torch.randn(101, 30, generator=torch.Generator().manual_seed(0))
    small = torch.arange(5.0)
    matrix = Matrix.of(weights)
    assert [first for first, _ in matrix.blocks()] == list(range(0, 101, 7))
    write_file(tmp_path / "a", {"v": small, "w": Stored(matrix, transposed), "s": torch.tensor(2.0)}, dtype)
    whole = load_file(tmp_path / "a")
    assert torch.equal(whole["w"], (weights.T if transposed else weights).to(dtype))
    assert torch.equal(whole["v"], small.to(dtype)) and whole["s"].shape == ()
    file = TensorFile(tmp_path / "a")
    read = file.matrix("w", transposed)
    assert read.shape == (101, 30) and read.dtype == dtype
    assert torch.equal(read.whole(), weights.to(dtype).float())
    assert torch.equal(read.rows(13, 20), weights[13:20].to(dtype).float())
    assert torch.equal(read.columns(3, 5).rows(0, 101), read.whole()[:, 3:5])
    torch.testing.assert_close(read.times(torch.ones(30)), read.whole().double().sum(dim=-1))
    assert float(file.tensor("s")) == 2 and math.prod(file.tensor("v").shape) == 5


def test_the_proof_has_a_name_that_no_format_uses():
    assert all(PROOF not in FORMATS.build(FormatConfig(name)).files for name in FORMATS)
