"""Folders of other formats that lie: one line each, no code run, and no memory taken for what they claim."""

import io
import json
import os
import random
import resource
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faults.hostile_files import NOT_FILES, instead
from format_cases import about, built
from safetensors.torch import load_file, save_file

from sae_train import load_sae
from sae_train.errors import InputError
from sae_train.formats.base import FORMATS, FormatConfig
from sae_train.formats.plain import of_sae

pytestmark = pytest.mark.usefixtures("one_thread")

FILES = {
    "saelens": ("cfg.json", "sae_weights.safetensors", ("linear", "autoencoder", "jumprelu")),
    "sparsify": ("cfg.json", "sae.safetensors", ("linear", "autoencoder", "topk")),
    "dictionary_learning": ("config.json", "ae.pt", ("linear", "autoencoder", "topk")),
    "openmoss": ("config.json", "sae_weights.safetensors", ("linear", "autoencoder", "jumprelu")),
    "gemma_scope": ("config.json", "params.safetensors", ("linear", "autoencoder", "jumprelu")),
    "circuit_tracer": ("config.yaml", "layer_0.safetensors", ("linear", "transcoder", "jumprelu")),
    "npz": ("params.npz", "params.npz", ("linear", "autoencoder", "jumprelu")),
}
SAFETENSORS = [name for name, (_, weights, _) in FILES.items() if weights.endswith(".safetensors")]
JSON = [name for name, (config, _, _) in FILES.items() if config.endswith(".json")]


@pytest.fixture(params=FILES)
def name(request) -> str:
    return request.param


@pytest.fixture
def folder(name: str, tmp_path: Path) -> Path:
    """A folder that loads."""
    make(name, tmp_path)
    assert load(tmp_path) is not None
    return tmp_path


def make(name: str, folder: Path) -> None:
    plain = of_sae(built(*FILES[name][2]))
    format_name = "gemma_scope" if name == "npz" else name
    kind = FILES[name][2][1]
    FORMATS.build(FormatConfig(format_name)).write([(plain, about(kind))], folder, torch.float32)
    if name == "npz":
        tensors = load_file(folder / "params.safetensors")
        for path in folder.iterdir():
            path.unlink()
        np.savez(folder / "params.npz", **arrays(tensors))


def arrays(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {n.replace("w_", "W_"): t.numpy() for n, t in tensors.items()}


def load(folder: Path) -> Any:
    return load_sae(folder)


def refused(folder: Path, *words: str) -> None:
    """load_sae says so in one short line, and takes next to nothing."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError) as caught:
        load(folder)
    line = str(caught.value)
    assert "\n" not in line and line.isprintable() and len(line) < 1500, line
    for word in words:
        assert word in line, (word, line)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64_000


@pytest.mark.parametrize("kind", NOT_FILES)
@pytest.mark.parametrize("which", [0, 1])
def test_what_is_no_regular_file_is_never_opened(folder, name, which, kind):
    instead(folder / FILES[name][which], NOT_FILES[kind])
    refused(folder)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_file_cut_off_is_refused(folder, name, share):
    path = folder / FILES[name][1]
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    refused(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(folder, name, value):
    change_weights(
        folder, name, lambda t: {**t, "b_dec": t["b_dec"] * value} if "b_dec" in t else spoil(t, value)
    )
    refused(folder, "finite")


def spoil(tensors: dict[str, Any], value: float) -> dict[str, Any]:
    first = next(n for n in tensors if n.startswith("b"))
    return {**tensors, first: tensors[first] * value}


def change_weights(folder: Path, name: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    path = folder / FILES[name][1]
    if name == "npz":
        with np.load(path) as stored:
            found = {n: torch.from_numpy(stored[n]) for n in stored.files}
        np.savez(path, **{n: t.numpy() for n, t in change(found).items()})
    elif name == "dictionary_learning":
        torch.save(change(torch.load(path, weights_only=True)), path)
    else:
        save_file(change(load_file(path)), path)


def test_a_tensor_too_many_or_too_few_or_of_another_shape_is_refused(folder, name):
    path = folder / FILES[name][1]
    data = path.read_bytes()
    if name != "npz":  # other arrays of an archive are not looked at
        change_weights(folder, name, lambda t: {**t, "extra": torch.zeros(3)})
        refused(folder, "extra")
        path.write_bytes(data)
    for victim in weights_of(folder, name):
        change_weights(folder, name, lambda t, v=victim: {n: x for n, x in t.items() if n != v})
        if not (name == "circuit_tracer" and "threshold" in victim):  # a relu has none
            refused(folder, victim)
        path.write_bytes(data)
        change_weights(folder, name, lambda t, v=victim: {**t, v: torch.zeros(3, 2, 2, dtype=t[v].dtype)})
        refused(folder)
        path.write_bytes(data)


def weights_of(folder: Path, name: str) -> list[str]:
    seen: list[str] = []
    change_weights(folder, name, lambda t: (seen.extend(t), t)[1])
    return seen


@pytest.mark.parametrize("name", SAFETENSORS)
def test_integers_in_the_place_of_weights_are_refused(name, tmp_path):
    make(name, tmp_path)
    change_weights(tmp_path, name, lambda t: {n: x.long() for n, x in t.items()})
    refused(tmp_path, "dtype")


@pytest.mark.parametrize("name", SAFETENSORS)
def test_a_header_that_claims_terabytes_takes_no_memory(name, tmp_path):
    make(name, tmp_path)
    path = tmp_path / FILES[name][1]
    first = next(n for n, t in load_file(path).items() if t.dim() == 2)
    header = {first: {"dtype": "F32", "shape": [2**20, 2**20], "data_offsets": [0, 2**42]}}
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + 2**42)  # sparse: it costs its sender nothing
    refused(tmp_path)


@pytest.mark.parametrize("name", JSON)
@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "{", '{"a": 1, "a": 1}', '{"a": NaN}', '{"a": 1e999}', "[" * 10_000, " " * (1 << 21)],
)
def test_a_configuration_that_is_no_plain_object_is_refused(name, text, tmp_path):
    make(name, tmp_path)
    (tmp_path / FILES[name][0]).write_text(text)
    if text == '{"a": 1e999}' and name == "gemma_scope":
        return  # says nothing that it reads
    refused(tmp_path)


WRONG = [None, True, -1, 0, 2**70, 1.5, "x" * 10_000, "__import__", [], {}, [[[[]]]], "\n\x1b[31m"]


def leaves(table: dict[str, Any], path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    out = []
    for key, value in table.items():
        out.append((*path, key))
        if isinstance(value, dict):
            out += leaves(value, (*path, key))
    return out


@pytest.mark.parametrize("name", JSON)
def test_every_value_of_a_configuration_may_be_anything(name, tmp_path):
    """Either it is refused in one line, or nothing that is computed depends on it."""
    make(name, tmp_path)
    path = tmp_path / FILES[name][0]
    table, x = json.loads(path.read_text()), torch.randn(20, 12)
    said: list[str] = []
    want, refusals = load(tmp_path)(x), 0
    for place in leaves(table):
        for value in [*WRONG, "missing"]:
            changed = json.loads(json.dumps(table))
            node = changed
            for key in place[:-1]:
                node = node[key]
            node[place[-1]] = value
            if value == "missing":
                del node[place[-1]]
            path.write_text(json.dumps(changed))
            try:
                got = load(tmp_path)
            except InputError as error:
                refusals += 1
                said.append(str(error))
                continue
            defaults = {("k",), ("apply_b_dec_to_input",), ("rescale_acts_by_decoder_norm",)}
            if place in defaults and (value in ("missing", True, -1) or type(value) is bool):
                continue  # another rule, and said so
            if got.d_sae == 40 and got.config.kind == "autoencoder" and place[-1] != "use_decoder_bias":
                torch.testing.assert_close(got(x), want, msg=f"{place} {value!r}")
    assert refusals > 10
    assert all("\n" not in line and "\x1b" not in line and len(line) < 1500 for line in said)


class Evil:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (self.command,)


@pytest.mark.parametrize("old_format", [False, True])
def test_a_pickle_that_would_run_something_runs_nothing(old_format, tmp_path):
    make("dictionary_learning", tmp_path)
    marker = tmp_path / "ran"
    state = torch.load(tmp_path / "ae.pt", weights_only=True)
    evil = {**state, "x": Evil(f"touch {marker}")}
    torch.save(evil, tmp_path / "ae.pt", _use_new_zipfile_serialization=not old_format)
    refused(tmp_path)
    assert not marker.exists()


@pytest.mark.parametrize(
    "code",
    [b"K\x01Q.", b"0.", b")Q.", b"(X\x07\x00\x00\x00storageK\x01K\x02K\x03K\x04tQ."],
    ids=["a number as storage", "nothing to drop", "an empty storage", "a storage of strange parts"],
)
def test_a_pickle_that_torch_stumbles_over_is_refused(code, tmp_path):
    make("dictionary_learning", tmp_path)
    with zipfile.ZipFile(tmp_path / "ae.pt") as old:
        parts = {member.filename: old.read(member) for member in old.infolist()}
    with zipfile.ZipFile(tmp_path / "ae.pt", "w") as new:
        for name, body in parts.items():
            new.writestr(name, b"\x80\x02" + code if name.endswith("data.pkl") else body)
    refused(tmp_path)


@pytest.mark.parametrize(
    "value",
    [
        [1, 2],
        "text",
        {"a": {"b": torch.zeros(3)}},
        {1: torch.zeros(3)},
        torch.zeros(3),
        {"a": torch.zeros(1).expand(2**40)},
        {"encoder.weight": torch.zeros(3, 3).to_sparse()},
        {"encoder.weight": torch.quantize_per_tensor(torch.zeros(3, 3), 0.1, 0, torch.qint8)},
        OrderedDict((str(i), torch.zeros(1)) for i in range(1200)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_state_dict_of_anything_but_plain_tensors_is_refused(value, tmp_path):
    make("dictionary_learning", tmp_path)
    torch.save(value, tmp_path / "ae.pt")
    refused(tmp_path)


def test_a_state_dict_that_contradicts_its_configuration_or_its_size_is_refused(tmp_path):
    make("dictionary_learning", tmp_path)
    path = tmp_path / "config.json"
    table = json.loads(path.read_text())
    path.write_text(json.dumps({"trainer": table["trainer"] | {"k": 5}}))
    refused(tmp_path, "trainer.k=5", "4")
    size = {"activation_dim": 2**20, "dict_size": 2**20}
    path.write_text(json.dumps({"trainer": table["trainer"] | size}))
    state = torch.load(tmp_path / "ae.pt", weights_only=True)
    state["encoder.weight"] = torch.zeros(1, 1).expand(2**20, 2**20)
    state["decoder.weight"] = state["encoder.weight"]
    state |= {"encoder.bias": torch.zeros(1).expand(2**20), "b_dec": torch.zeros(1).expand(2**20)}
    torch.save(state, tmp_path / "ae.pt")
    refused(tmp_path, "plain tensors")


def test_an_archive_that_unpacks_to_more_than_it_is_is_never_unpacked(tmp_path):
    make("dictionary_learning", tmp_path)
    buffer = io.BytesIO()
    torch.save({"encoder.weight": torch.zeros(1 << 22)}, buffer)
    with (
        zipfile.ZipFile(buffer) as old,
        zipfile.ZipFile(tmp_path / "ae.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for member in old.infolist():
            new.writestr(member.filename, old.read(member))
    assert (tmp_path / "ae.pt").stat().st_size < 1 << 17
    refused(tmp_path, "nothing packed")


def test_an_npz_of_objects_or_of_packed_zeros_is_refused(tmp_path):
    make("npz", tmp_path)
    path = tmp_path / "params.npz"
    with np.load(path) as stored:
        whole = {n: stored[n] for n in stored.files}
    marker = tmp_path / "ran"
    objects = np.empty(3, dtype=object)
    objects[:] = [Evil(f"touch {marker}")] * 3
    np.savez(path, **{**whole, "threshold": objects})
    refused(tmp_path)
    assert not marker.exists()
    np.savez_compressed(path, **{**whole, "more": np.zeros(1 << 25, dtype=np.float32)})
    refused(tmp_path, "files of")
    np.savez(path, **{**whole, "threshold": whole["threshold"].astype(np.int64)})
    refused(tmp_path, "threshold")
    np.savez(path, **{**whole, "b_enc": np.full(40, 1e300)})
    refused(tmp_path, "finite")
    np.savez_compressed(path, **whole)
    assert load(tmp_path) is not None, "packed weights are fine"


@pytest.mark.parametrize(
    "text",
    [
        "model_kind: !!python/object/apply:os.system [touch ran]",
        "a: &a [x, x]\nb: &b [*a, *a]\nmodel_kind: *b",
        "model_kind: cross_layer_transcoder",
        "model_kind: transcoder_set\ntranscoders: ['hf://x/y/z']",
        "model_kind: transcoder_set\nfeature_input_hook: 3\nfeature_output_hook: b",
        "- a",
        "\t: x",
        "x: " + "[" * 5000,
        "x: 1\n" * 300_000,
        "x: 1" + ":1" * 500_000,
    ],
)
def test_yaml_that_is_no_set_of_layers_is_refused(text, tmp_path):
    make("circuit_tracer", tmp_path)
    (tmp_path / "config.yaml").write_text(text)
    refused(tmp_path)
    assert not Path("ran").exists()


def test_a_set_whose_layers_are_of_several_widths_is_refused(tmp_path):
    make("circuit_tracer", tmp_path)
    change = {
        n: (t[:20] if t.dim() == 2 else t[: 20 if n != "b_dec" else 12])
        for n, t in load_file(tmp_path / "layer_0.safetensors").items()
    }
    save_file({n: t.contiguous() for n, t in change.items()}, tmp_path / "layer_1.safetensors")
    refused(tmp_path, "of one width")


def test_flipped_bytes_never_end_in_an_error_that_is_not_ours(folder, name):
    draw, loaded, said = random.Random(7), 0, []
    for which in {FILES[name][0], FILES[name][1]}:
        path = folder / which
        data = path.read_bytes()
        for _ in range(150):
            broken = bytearray(data)
            for _ in range(draw.randint(1, 4)):
                broken[draw.randrange(min(len(broken), 2000))] = draw.randrange(256)
            path.write_bytes(broken)
            try:
                load(folder)
                loaded += 1
            except InputError as error:
                said.append(str(error))
        path.write_bytes(data)
    assert loaded + len(said) >= 150 and all("\n" not in line for line in said)
