"""No bytes make a reader fail in a way that is not its own: hypothesis searches, the same way every time.

HYPOTHESIS_PROFILE=long searches at random and a hundred times as long. `fuzz_atheris.py` feeds the same
readers, guided by coverage.
"""

import json
import math
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from faults.fuzz_atheris import READERS, Bench
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from sae_train.checkpoint import Checkpointer
from sae_train.errors import InputError
from sae_train.harvest.corpus import CorpusConfig, Documents
from sae_train.harvest.windows import WindowStream

LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"
MOST_BYTES = 64 << 20


def searched(examples: int) -> settings:
    """So many inputs, always the same ones; in the long run many more, and other ones each time."""
    return settings(
        max_examples=examples * 100 if LONG else examples,
        derandomize=not LONG,
        database=None,
        deadline=None,
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    trees.validate()  # hypothesis makes tables of all characters, once and not within `little_memory`
    return Bench(tmp_path_factory.mktemp("bench"))


@contextmanager
def little_memory() -> Iterator[None]:
    """What takes this process 64 MB past what it has fails, with the input that asked for it."""
    if LONG:
        yield
        return
    private = int(Path("/proc/self/status").read_text().split("VmData:")[1].split()[0]) * 1024
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (private + MOST_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


WORDS = [
    *("format", "kind", "files", "meta", "digest", "bytes", "xxh3_128", "rows.safetensors", "index", "hooks"),
    *("rows", "counts", "cursor", "fingerprint", "dims", "lanes", "complete", "shards", "$tensor", "$float"),
    *("$dict", "/a", "dtype", "shape", "data_offsets", "F32", "BF16", "I64", "F8_E4M3", "F4", "BOOL", "C64"),
    *(
        "activations",
        "0.x",
        "ids",
        "__metadata__",
        "d_in",
        "sae",
        "name",
        "linear",
        "topk",
        "activation",
        "k",
    ),
    *("_target_", "${oc.env:HOME}", "status", "config", "chosen", "steps", "../x", "nan", "\ud800", ""),
]
leaves = (
    st.none()
    | st.booleans()
    | st.integers(-3, 40)
    | st.sampled_from([2**31, 2**53, 2**62, 2**63, 2**64, -(2**63), 10**30])
    | st.floats()
    | st.sampled_from(WORDS)
    | st.text(max_size=6)
)
keys = st.sampled_from(WORDS) | st.text(max_size=4)
trees = st.recursive(
    leaves, lambda t: st.lists(t, max_size=4) | st.dictionaries(keys, t, max_size=5), max_leaves=12
)


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a tree."""
    if not isinstance(tree, dict | list):
        return []
    items = list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree))
    return [(tree, key) for key, _ in items] + [place for _, value in items for place in places(value)]


@st.composite
def edited_json(draw: st.DrawFn, good: bytes) -> bytes:
    """A whole file with some of its values, at any depth, replaced, removed or added."""
    tree = json.loads(good)
    for _ in range(draw(st.integers(1, 3))):
        if not (found := places(tree)):
            break
        holder, key = draw(st.sampled_from(found))
        what = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if what == "remove":
            del holder[key]
        elif what == "replace" or isinstance(holder, list):
            holder[key] = draw(trees)
        else:
            holder[draw(keys)] = draw(trees)
    return json.dumps(tree).encode()


@st.composite
def damaged(draw: st.DrawFn, good: bytes) -> bytes:
    """The same bytes with some of them replaced, removed, repeated or put in."""
    raw = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        first = draw(st.integers(0, len(raw)))
        last = draw(st.integers(first, min(len(raw), first + 30)))
        new = st.binary(max_size=8) | st.sampled_from([b"NaN", b"9" * 5000, b"[" * 3000, b'"a":', b"\\ud800"])
        raw[first:last] = draw(new) * draw(st.sampled_from([1, 1, 1, 50]))
    return bytes(raw)


JSON_READERS = [reader for reader in READERS if reader not in ("text", "override")]


@pytest.mark.parametrize("reader", JSON_READERS)
def test_no_values_make_a_reader_fail_in_a_way_that_is_not_its_own(bench: Bench, reader: str) -> None:
    bench.restore()
    assert bench.read(reader, bench.good[reader])

    @searched(120)
    @given(edited_json(bench.good[reader]) | trees.map(lambda tree: json.dumps(tree).encode()))
    def attempt(data: bytes) -> None:
        bench.read(reader, data)

    with little_memory():
        attempt()


@pytest.mark.parametrize("reader", READERS)
def test_no_bytes_make_a_reader_fail_in_a_way_that_is_not_its_own(bench: Bench, reader: str) -> None:
    bench.restore()
    assert bench.read(reader, bench.good[reader])

    @searched(10 if reader == "override" else 60)
    @given(damaged(bench.good[reader]) | st.binary(max_size=100))
    def attempt(data: bytes) -> None:
        bench.read(reader, data)

    with little_memory():
        attempt()


# -- state ----------------------------------------------------------------------------------------

tensors = st.builds(
    lambda dtype, shape: torch.arange(math.prod(shape)).reshape(shape).to(dtype),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool]),
    st.lists(st.integers(0, 3), max_size=3).map(tuple),
)
state_keys = (
    st.text(max_size=5) | st.integers() | st.sampled_from(["$tensor", "$dict", "/", "#1", "1", "a/b", "%"])
)
states = st.dictionaries(
    state_keys,
    st.recursive(
        leaves | tensors,
        lambda s: st.lists(s, max_size=3) | st.dictionaries(state_keys, s, max_size=4),
        max_leaves=10,
    ),
    max_size=5,
)


def same(one: Any, two: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(two, torch.Tensor) and one.dtype == two.dtype and torch.equal(one, two)
    if type(one) is not type(two):
        return False
    if isinstance(one, dict):
        return list(one) == list(two) and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two or (one != one and two != two)


def test_any_state_comes_back_from_a_checkpoint_as_it_was(tmp_path: Path) -> None:
    @searched(40)
    @given(states)
    @example({"$x": [math.nan, math.inf, -math.inf, -0.0, 2**70], 1: {"1": True, "#1": 1.0, "": None}})
    def attempt(state: dict[Any, Any]) -> None:
        shutil.rmtree(tmp_path / "steps", ignore_errors=True)
        (tmp_path / "steps").mkdir()
        Checkpointer(tmp_path / "steps").save(1, state, {})
        loaded = Checkpointer(tmp_path / "steps").load()
        assert loaded is not None and same(state, loaded[1]), (state, loaded[1])

    attempt()


# -- text -----------------------------------------------------------------------------------------

characters = st.text(max_size=200) | st.text("w0123456789 \n\x00\ufeff\u2028\U0001f600\x1b<", max_size=200)
words = st.lists(st.sampled_from([f"w{i}" for i in range(30)]), max_size=60).map(" ".join)


def test_any_text_becomes_windows_of_known_tokens_or_is_refused(tiny_tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"

    @searched(15)
    @given(
        st.lists(characters | words, min_size=1, max_size=20), st.sampled_from(["document", "window", "none"])
    )
    def attempt(texts: list[str], bos: str) -> None:
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        config = CorpusConfig(name=str(path), context_length=8, holdout=0.0, bos=bos, shuffle_windows=4)
        try:
            stream = WindowStream(Documents(config), tiny_tokenizer, config)
            taken = stream.take(10**6)
        except InputError:
            return
        assert taken is not None and taken.tokens.shape[1] == 8
        assert int(taken.tokens.min()) >= 0 and int(taken.tokens.max()) < len(tiny_tokenizer)
        boses = len(taken.tokens) if bos == "window" else 0
        assert int(taken.valid.sum()) == stream.counts["tokens"] + boses

    attempt()


def test_any_bytes_in_a_file_of_texts_are_read_or_refused(tiny_tokenizer: Any, tmp_path: Path) -> None:
    good = b'{"text": "w1 w2 w3"}\n' * 5

    @searched(15)
    @given(
        damaged(good) | st.binary(max_size=200), st.sampled_from(["x.txt", "x.jsonl", "x.json", "x.parquet"])
    )
    def attempt(data: bytes, name: str) -> None:
        path = tmp_path / name
        path.write_bytes(data)
        config = CorpusConfig(name=str(path), context_length=4, holdout=0.0, documents="line")
        try:
            WindowStream(Documents(config), tiny_tokenizer, config).take(100)
        except InputError:
            return

    attempt()


# -- overrides ------------------------------------------------------------------------------------

ODD_VALUES = """1 -1 0 null nan 1e400 [] {} [1,{a:b}] 'x ${oc.env:HOME} ${x} ??? true a,b glob(*) range(1,3)
    1010101010101010101010101010101010101010 é ${oc.decode:1} choice(1,2) int(x) \\ x=y"""
NAMES = """sae sae.activation sae.activation.k sae.d_sae hook saes saes.a run.dir run.seed corpus.sources
    source.paths train.tokens optim.lr model.name hydra.run.dir logger x.y sae/activation experiment +extra
    ~optim ++a.b sae@x eval.metrics kernels filter"""
values = st.sampled_from(ODD_VALUES.split()) | st.text(max_size=8)
names = st.sampled_from(NAMES.split()) | st.text(max_size=6)


def test_any_override_is_taken_or_refused_in_one_line(bench: Bench) -> None:
    @searched(25)
    @given(st.tuples(names, values).map("=".join) | values)
    def attempt(text: str) -> None:
        bench.read("override", text.encode(errors="replace"))

    attempt()
