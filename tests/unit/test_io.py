"""A published SAE folder: what was saved comes back, and whatever a stranger made of it is refused."""

import json
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from sae_train.activations.topk import TopKConfig
from sae_train.errors import InputError
from sae_train.sae.base import SAE
from sae_train.sae.io import CONFIG, MAX_CONFIG_BYTES, MAX_HEADER_BYTES, WEIGHTS, load_sae, save_sae
from sae_train.sae.linear import LinearConfig, LinearSAE

D, F = 6, 10
DELETE = object()


def trained() -> SAE:
    sae = LinearSAE(LinearConfig(d_sae=F, activation=TopKConfig(k=3)), D)
    generator = torch.Generator().manual_seed(0)
    sae.initialise(torch.randn(64, D, generator=generator) * 3 + 1, generator)
    return sae


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    save_sae(trained(), folder, {"hook": "resid_post.3"})
    return folder


@pytest.fixture
def folder(published, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(published, tmp_path / "sae"))


def edit(folder: Path, key: str, value: Any) -> None:
    """Set one key of config.json, given as a dotted path."""
    data = json.loads((folder / CONFIG).read_text())
    *parents, last = key.split(".")
    table = data
    for parent in parents:
        table = table[parent]
    if value is DELETE:
        del table[last]
    else:
        table[last] = value
    (folder / CONFIG).write_text(json.dumps(data))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / WEIGHTS)


def header_of(folder: Path) -> tuple[dict[str, Any], bytes]:
    raw = (folder / WEIGHTS).read_bytes()
    size_bytes = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + size_bytes]), raw[8 + size_bytes :]


def write_header(folder: Path, header: dict[str, Any] | bytes, body: bytes) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(raw)) + raw + body)


def refused(folder: Path, *words: str) -> str:
    """Loading must answer with one short line that holds all the words."""
    started = time.monotonic()
    with pytest.raises(InputError) as caught:
        load_sae(folder)
    assert time.monotonic() - started < 5
    line = str(caught.value)
    assert line.isprintable() and len(line) < 500, line
    for word in words:
        assert word in line, (word, line)
    return line


def test_what_was_saved_comes_back_with_the_same_bits(published):
    sae, loaded = trained().folded(), load_sae(published)
    assert loaded.config == sae.config and not loaded.training
    assert loaded.state_dict().keys() == sae.state_dict().keys()
    for name, tensor in sae.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert loaded.input_scale.device.type == "cpu" and loaded.input_scale == 1
    assert all(isinstance(p, torch.nn.Parameter) and not p.requires_grad for p in loaded.parameters())


def test_a_loaded_sae_can_be_saved_again_and_outlives_its_files(folder, tmp_path):
    loaded = load_sae(folder)
    x = torch.randn(5, D)
    want = loaded(x)
    (folder / WEIGHTS).write_bytes(b"")
    assert torch.equal(loaded(x), want)
    again = tmp_path / "again"
    again.mkdir()
    save_sae(loaded, again, {})
    assert torch.equal(load_sae(again)(x), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float32])
def test_weights_of_every_floating_dtype_load_as_float32(folder, dtype):
    exact = load_file(folder / WEIGHTS)
    edit_weights(folder, lambda tensors: tensors.update({n: t.to(dtype) for n, t in tensors.items()}))
    for name, tensor in load_sae(folder).state_dict().items():
        assert torch.equal(tensor, exact[name].to(dtype).float()), name


def test_whole_numbers_are_accepted_for_floats_and_null_where_the_annotation_allows_it(folder):
    edit(folder, "sae.expansion", 8)
    edit(folder, "sae.k_aux", None)
    config = load_sae(folder).config
    assert type(config.expansion) is float and config.k_aux is None
    edit(folder, "sae.k_aux", 4)
    assert load_sae(folder).config.k_aux == 4


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format_version", True),
        ("format_version", 1.0),
        ("format_version", 2),
        ("format_version", "1"),
        ("format_version", DELETE),
        ("kind", "stats"),
        ("kind", ["sae"]),
        ("kind", DELETE),
        ("meta", [1]),
        ("d_in", 0),
        ("d_in", -1),
        ("d_in", True),
        ("d_in", 6.0),
        ("d_in", 2**24 + 1),
        ("d_in", "6"),
        ("d_in", DELETE),
        ("sae", []),
        ("sae", None),
        ("sae", DELETE),
        ("sae.name", ["linear"]),
        ("sae.name", {"linear": 1}),
        ("sae.name", None),
        ("sae.name", 5),
        ("sae.name", "lineer"),
        ("sae.name", "x" * 100_000),
        ("sae.name", "\ud800\n\x1b[2J"),
        ("sae.name", DELETE),
        ("sae.d_sae", 0),
        ("sae.d_sae", True),
        ("sae.d_sae", 10.0),
        ("sae.d_sae", None),
        ("sae.d_sae", 2**24 + 1),
        ("sae.d_sae", 10**400),
        ("sae.d_sae", DELETE),
        ("sae.expansion", "8"),
        ("sae.expansion", True),
        ("sae.expansion", -1),
        ("sae.expansion", 10**400),
        ("sae.expansion", None),
        ("sae.b_dec_init", 1),
        ("sae.b_dec_init", None),
        ("sae.b_dec_init", "median"),
        ("sae.input_scale", 1),
        ("sae.auxk_coefficient", "0"),
        ("sae.auxk_coefficient", False),
        ("sae.k_aux", 1.5),
        ("sae.k_aux", True),
        ("sae.k_aux", "none"),
        ("sae.dead_after_tokens", 1e7),
        ("sae.dead_after_tokens", 2**63),
        ("sae.dead_after_tokens", [1]),
        ("sae.activation", "topk"),
        ("sae.activation", None),
        ("sae.activation", DELETE),
        ("sae.activation.name", ["topk"]),
        ("sae.activation.name", False),
        ("sae.activation.name", "topkk"),
        ("sae.activation.name", DELETE),
        ("sae.activation.k", 4.0),
        ("sae.activation.k", True),
        ("sae.activation.k", "4"),
        ("sae.activation.k", None),
        ("sae.activation.k", [4]),
        ("sae.activation.k", {"k": 4}),
        ("sae.activation.k", 0),
        ("sae.activation.k", F + 1),
        ("sae.activation.k", 10**12),
    ],
)
def test_a_wrong_value_is_refused_and_its_key_named(folder, key, value):
    edit(folder, key, value)
    refused(folder, key)


@pytest.mark.parametrize(
    ("key", "where"),
    [
        ("_target_", "config.json="),
        ("hydra", "config.json="),
        ("line\nbreak", "config.json="),
        ("k" * 100_000, "config.json="),
        ("sae._target_", "sae="),
        ("sae.defaults", "sae="),
        ("sae.activation._target_", "sae.activation="),
        ("sae.activation.${oc:env}", "sae.activation="),
    ],
)
def test_an_unknown_key_is_refused(folder, key, where):
    edit(folder, key, "os.system")
    refused(folder, where, "only the keys")


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: "null",
        lambda text: '"sae"',
        lambda text: "\ufeff" + text,
        lambda text: text + text,
        lambda text: text.replace('"k": 3', '"k": 3, "k": 4'),
        lambda text: text.replace('"k": 3', '"k": NaN'),
        lambda text: text.replace('"expansion": 8.0', '"expansion": Infinity'),
        lambda text: text.replace('"expansion": 8.0', '"expansion": 1e999'),
        lambda text: text.replace('"k": 3', '"k": ' + "9" * 10_000),
        lambda text: text.replace('"k": 3', '"k": ' + "[" * 10_000 + "]" * 10_000),
        lambda text: text.replace('"resid_post.3"', "[" * 100_000 + "]" * 100_000),
        lambda text: text + " " * MAX_CONFIG_BYTES,
    ],
)
def test_a_damaged_configuration_is_refused(folder, change):
    before = (folder / CONFIG).read_text()
    after = change(before)
    assert after != before
    (folder / CONFIG).write_text(after)
    refused(folder)


def test_a_configuration_in_another_encoding_is_refused(folder):
    (folder / CONFIG).write_bytes((folder / CONFIG).read_text().encode("utf-16"))
    refused(folder, CONFIG)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("b_dec"), ("b_dec", "is missing")),
        (lambda t: t.update({"evil\n": torch.zeros(1)}), ("evil", "is not one of them")),
        (lambda t: t.update({"x" * 1000: torch.zeros(1)}), ("xxx", "is not one of them")),
        (lambda t: t.update(w_enc=t["w_enc"].T), ("w_enc", str([D, F]), str([F, D]))),
        (lambda t: t.update(b_enc=t["b_enc"][None]), ("b_enc", str([F]))),
        (lambda t: t.update(b_enc=t["b_enc"][:0]), ("b_enc", str([F]))),
        (lambda t: t.update(input_scale=torch.ones(1)), ("input_scale", "[]")),
        (lambda t: t.update(w_dec=t["w_dec"].long()), ("w_dec", "I64", "F32")),
        (lambda t: t.update(w_dec=t["w_dec"].to(torch.float8_e4m3fn)), ("w_dec", "F8_E4M3")),
        (lambda t: t.update(w_dec=t["w_dec"].to(torch.complex64)), ("w_dec", "C64")),
        (lambda t: t.update(b_dec=t["b_dec"] > 0), ("b_dec", "BOOL")),
        (lambda t: t["w_enc"][3, 2].fill_(torch.nan), ("w_enc", "finite")),
        (lambda t: t["b_enc"][9].fill_(-torch.inf), ("b_enc", "finite")),
        (lambda t: t.update(b_dec=t["b_dec"].double() + 1e300), ("b_dec", "finite")),
        (lambda t: t["input_scale"].fill_(2.0), ("input_scale", "2.0")),
        (lambda t: t["input_scale"].fill_(0.0), ("input_scale", "0.0")),
        (lambda t: t["input_scale"].fill_(torch.nan), ("input_scale", "finite")),
        (lambda t: t.update(input_scale=torch.tensor(1)), ("input_scale", "I64")),
    ],
)
def test_tensors_that_do_not_fit_are_refused(folder, change, words):
    edit_weights(folder, change)
    refused(folder, *words)


def gap(header: dict[str, Any], body: bytes) -> tuple[Any, bytes]:
    last = max(header, key=lambda name: header[name]["data_offsets"][1])
    header[last]["data_offsets"] = [offset + 4 for offset in header[last]["data_offsets"]]
    return header, body + b"\0" * 4


def overlap(header: dict[str, Any], body: bytes) -> tuple[Any, bytes]:
    header["w_enc"]["data_offsets"] = header["w_dec"]["data_offsets"]
    return header, body


def twice(header: dict[str, Any], body: bytes) -> tuple[Any, bytes]:
    text = json.dumps(header)
    other = json.dumps(header["b_dec"] | {"shape": [D, 1]})
    return ('{"b_dec":' + other + "," + text[1:]).encode(), body


def negative(header: dict[str, Any], body: bytes) -> tuple[Any, bytes]:
    header["b_dec"]["shape"] = [-D]
    return header, body


def many_axes(header: dict[str, Any], body: bytes) -> tuple[Any, bytes]:
    header["b_dec"]["shape"] = [D] + [1] * 100_000
    return header, body


def overflowing(header: dict[str, Any], body: bytes) -> tuple[Any, bytes]:
    header["b_dec"]["shape"] = [2**62, 2**62]
    return header, body


def lying(header: dict[str, Any], body: bytes) -> tuple[Any, bytes]:
    header["b_dec"]["dtype"] = "F64"
    return header, body


def unknown_dtype(header: dict[str, Any], body: bytes) -> tuple[Any, bytes]:
    header["b_dec"]["dtype"] = "F32\n\x1b[2J"
    return header, body


@pytest.mark.parametrize(
    "attack",
    [
        gap,
        overlap,
        twice,
        negative,
        many_axes,
        overflowing,
        lying,
        unknown_dtype,
        lambda header, body: (header, body[:-1]),
        lambda header, body: (header, body + b"\0"),
        lambda header, body: (b"", b""),
        lambda header, body: (b"[1]", b""),
        lambda header, body: (b"{}", b""),
        lambda header, body: (b'{"\xff": 1}', b""),
        lambda header, body: (b"{" + json.dumps(header).encode(), body),
        lambda header, body: (b'{"a":' * 100_000, b""),
        lambda header, body: (json.dumps(header).encode() + b" " * MAX_HEADER_BYTES, body),
    ],
)
def test_a_header_that_lies_is_refused(folder, attack):
    write_header(folder, *attack(*header_of(folder)))
    refused(folder)


@pytest.mark.parametrize("raw", [b"", b"\0" * 7, b"\xff" * 8, struct.pack("<Q", 2**63), b"PK\3\4" * 100])
def test_a_file_that_is_no_safetensors_file_is_refused(folder, raw):
    (folder / WEIGHTS).write_bytes(raw)
    refused(folder, WEIGHTS)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_missing_or_linked_or_special_file_is_refused(folder, name, tmp_path):
    os.rename(folder / name, tmp_path / name)
    refused(folder, name)
    (folder / name).symlink_to(tmp_path / name)
    refused(folder, name, "regular")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    refused(folder, name, "regular")
    (folder / name).unlink()
    (folder / name).mkdir()
    refused(folder, name, "regular")


@pytest.mark.parametrize("path", ["nowhere", "a\0b", "n" * 5000, "/dev/null"])
def test_a_path_that_is_no_folder_is_refused(path):
    with pytest.raises(InputError, match="config"):
        load_sae(path)


def claim(folder: Path, d_in: int, d_sae: int) -> None:
    edit(folder, "d_in", d_in)
    edit(folder, "sae.d_sae", d_sae)


def sparse(folder: Path, d_in: int, d_sae: int) -> None:
    """Weights of any size that cost their sender one block of disk: all zero, header and size right."""
    shapes = {
        "w_enc": [d_sae, d_in],
        "w_dec": [d_sae, d_in],
        "b_enc": [d_sae],
        "b_dec": [d_in],
        "input_scale": [],
    }
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    write_header(folder, header, b"")
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size + offset)


def million_tensors(folder: Path) -> None:
    one = '"{:07d}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    write_header(folder, ("{" + ",".join(one.format(i) for i in range(1_000_000)) + "}").encode(), b"")


def wide(folder: Path) -> None:
    claim(folder, D, 2**24)


def too_wide(folder: Path) -> None:
    claim(folder, D, 30_000_000)


def widest(folder: Path) -> None:
    claim(folder, 2**24, 2**24)


def long_file(folder: Path) -> None:
    os.truncate(folder / WEIGHTS, 2**40)


def large_tensors(folder: Path) -> None:
    sparse(folder, 2**12, 2**18)


def eight_tebibytes(folder: Path) -> None:
    claim(folder, 2**16, 2**24)
    sparse(folder, 2**16, 2**24)


def many_lists(folder: Path) -> None:
    edit(folder, "x", [[]] * (MAX_CONFIG_BYTES // 4 - 1000))


def many_objects(folder: Path) -> None:
    edit(folder, "x", [{"": 0}] * (MAX_CONFIG_BYTES // 9 - 1000))


MEASURE = """
import sys, time
from pathlib import Path
from sae_train.errors import InputError
from sae_train.sae.io import load_sae

def peak_kib():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

load_sae(sys.argv[1])
for folder in sys.argv[2:]:
    before, started = peak_kib(), time.monotonic()
    try:
        load_sae(folder)
    except InputError:
        print(Path(folder).name, peak_kib() - before, time.monotonic() - started)
"""


def test_a_refusal_is_quick_and_takes_no_memory_whatever_size_is_claimed(published, tmp_path):
    attacks = [wide, too_wide, widest, long_file, large_tensors, eight_tebibytes, many_lists, many_objects]
    attacks.append(million_tensors)
    folders = []
    for attack in attacks:
        folders.append(tmp_path / attack.__name__)
        shutil.copytree(published, folders[-1])
        attack(folders[-1])
    command = [sys.executable, "-c", MEASURE, str(published), *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == [attack.__name__ for attack in attacks]
    for name, grown_kib, seconds in lines:
        assert int(grown_kib) < 64 * 1024 and float(seconds) < 5, (name, grown_kib, seconds)


plain = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-2, 12),
    st.sampled_from([2**24, 2**31, 2**63, -(2**63), 10**400]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8),
    st.sampled_from(["linear", "topk", "sae", "???", "mean", "${oc.env:HOME}", "\ud800"]),
)
values = st.recursive(
    plain,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def tables(data: dict[str, Any]) -> list[dict[str, Any]]:
    return [data, *(table for v in data.values() if isinstance(v, dict) for table in tables(v))]


def survives(folder: Path) -> None:
    """Either the SAE that the weights hold, or InputError in one line."""
    try:
        sae = load_sae(folder)
    except InputError as error:
        assert str(error).isprintable()  # noqa: PT017 (an error is one of two right answers)
    else:
        assert (sae.d_in, sae.d_sae) == (D, F) and type(sae.config.activation.k) is int


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_edit_of_the_configuration_escapes_as_another_error(published, folder, data):
    config = json.loads((published / CONFIG).read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        table = data.draw(st.sampled_from(tables(config)))
        key = data.draw(st.sampled_from([*table, "d_in", "k", "_target_"]) | st.text(max_size=5))
        if data.draw(st.booleans()):
            table[key] = data.draw(values)
        else:
            table.pop(key, None)
    (folder / CONFIG).write_text(json.dumps(config))
    survives(folder)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damaged_bytes_escape_as_another_error(published, folder, data):
    for name in (CONFIG, WEIGHTS):
        shutil.copy(published / name, folder / name)
    name = data.draw(st.sampled_from([CONFIG, WEIGHTS]))
    raw = bytearray((published / name).read_bytes())
    at = data.draw(st.integers(0, len(raw) - 1))
    length = data.draw(st.integers(0, 4))
    raw[at : at + length] = data.draw(
        st.binary(max_size=6) | st.sampled_from([b"NaN", b"[" * 5000, b"9" * 5000])
    )
    (folder / name).write_bytes(raw)
    survives(folder)
