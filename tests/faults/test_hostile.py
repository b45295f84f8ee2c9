"""Files from a stranger: refused in one line, at once, without memory, and nothing in them is ever run.

What a command reads is replaced by what somebody hostile might have put there; the command itself is run
as a user runs it. That a stranger's manifest fits its files is part of the attack: digests vouch for nobody.
"""

import copy
import html.parser
import json
import os
import pickle
import re
import runpy
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from faults.hostile_files import (
    CANARY,
    JSON_ATTACKS,
    MODULE,
    NOT_FILES,
    PICKLE,
    TENSOR_ATTACKS,
    edited,
    instead,
    join,
    numpy_file,
    seal,
    split,
    torch_file,
)
from faults.tools import SMALL, TINY
from omegaconf import DictConfig
from safetensors.torch import save_file

from sae_train.checkpoint import Checkpointer
from sae_train.cli import compose as compose_module
from sae_train.cli import eval as eval_module
from sae_train.cli.main import main
from sae_train.files import MAX_FILES, CorruptFile, CorruptFolder, read_json, read_tensors, verify
from sae_train.harvest.corpus import CorpusConfig, Documents
from sae_train.harvest.model import ModelConfig, load_model

MOST_BYTES = 64 << 20
MOST_SECONDS = 5.0
"""Of a core: other processes may be busy."""


def peak_bytes() -> int:
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


@pytest.fixture(scope="module", autouse=True)
def composed_once() -> Iterator[None]:
    """Hydra takes most of the time of a command that is refused: what it made of the same words is kept."""
    made: dict[tuple[str, ...], DictConfig] = {}
    compose = compose_module.compose

    def kept(verb: str, overrides: list[str]) -> DictConfig:
        key = (verb, *overrides)
        if key not in made:
            made[key] = compose(verb, overrides)
        return copy.deepcopy(made[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compose_module, "compose", kept)
        patch.setattr(eval_module, "compose", kept)
        yield


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows, a harvest of them, and a run on them that is whole: what the attacks begin with."""
    folder = tmp_path_factory.mktemp("good")
    generator = torch.Generator().manual_seed(0)
    save_file({"activations": torch.randn(4000, 12, generator=generator)}, folder / "rows.safetensors")
    source = ["source=tensors", f"source.paths=[{folder / 'rows.safetensors'}]"]
    assert main(["harvest", *source, *SMALL, f"out={folder / 'shards'}"]) == 0
    assert main(["train", *source, *SMALL, f"run.dir={folder / 'run'}"]) == 0
    return folder


@pytest.fixture
def here(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to damage, in which commands are run."""
    shutil.copytree(good, tmp_path / "here", symlinks=True)
    monkeypatch.chdir(tmp_path / "here")
    edited(Path("run/run.json"), lambda record: record["config"]["source"].update(paths=["rows.safetensors"]))
    return tmp_path / "here"


EVAL = ["eval", "run=run"]
STATUS = ["status", "run=run"]
FROM_SHARDS = ["train", "source=shards", "source.path=shards", *SMALL, "run.dir=new"]
FROM_TENSORS = ["train", "source=tensors", "source.paths=[rows.safetensors]", *SMALL, "run.dir=new"]

Refused = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run a command; it must answer with one line that holds the words, quickly, and without memory."""

    def run(args: list[str], *words: str, code: int = 2) -> str:
        capsys.readouterr()
        forget_peak()
        before, began = peak_bytes(), time.process_time()
        found = main(args)
        seconds, grown = time.process_time() - began, peak_bytes() - before
        err = capsys.readouterr().err
        lines = [line for line in err.splitlines() if line.startswith("sae-train ")]
        assert found == code, (found, err)
        assert len(lines) == 1 and "Traceback" not in err, err
        assert lines[0].isprintable() and len(lines[0]) < 1500, lines[0][:2000]
        for word in words:
            assert word in lines[0], (word, lines[0])
        assert not CANARY.exists(), "what the file holds was run"
        assert grown < MOST_BYTES, f"{grown >> 20} MB for: {lines[0]}"
        assert seconds < MOST_SECONDS, f"{seconds:.1f} s for: {lines[0]}"
        return lines[0]

    return run


@pytest.mark.usefixtures("no_pictures")
def test_the_commands_work_on_what_the_attacks_begin_with(here: Path) -> None:
    for args in (EVAL, STATUS, FROM_SHARDS, [*FROM_TENSORS[:-1], "run.dir=other"]):
        assert main(args) == 0, args


def test_a_canary_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is run by the reader that it is made for, so its absence after our readers means something."""
    monkeypatch.chdir(tmp_path)
    Path("file").write_bytes(PICKLE)
    with open("file", "rb") as file:
        pickle.load(file)
    CANARY.rmdir()
    Path("file").write_bytes(torch_file())
    torch.load("file", weights_only=False)
    CANARY.rmdir()
    Path("file").write_bytes(numpy_file())
    np.load("file", allow_pickle=True)
    CANARY.rmdir()
    Path("file.py").write_text(MODULE)
    runpy.run_path("file.py")
    CANARY.rmdir()


# -- H1, H2: tensors that lie, and pickles in their place ---------------------------------------


@pytest.mark.parametrize("attack", TENSOR_ATTACKS)
def test_hostile_tensors_are_refused_by_every_command_that_reads_some(
    here: Path, refused: Refused, attack: str
) -> None:
    sae, shard = Path("run/saes/main/sae.safetensors"), Path("shards/shard-00000000/rows.safetensors")
    for path in (sae, shard, Path("rows.safetensors")):
        path.write_bytes(TENSOR_ATTACKS[attack](*split(path)))
    seal(shard.parent)
    refused(FROM_TENSORS, "source.")
    if (
        attack != "only NaN"
    ):  # as the filters may have let them through, rows are judged by what comes of them
        refused(FROM_SHARDS, "source.path", "shard-00000000")
    shutil.copy(here.parent / "here" / "shards/shard-00000001/rows.safetensors", "rows.safetensors")
    edited(Path("run/run.json"), lambda record: record["config"]["source"].update(key="0.activations"))
    edited(Path("run/run.json"), lambda record: record.update(fingerprint={}))  # else it says: other rows
    refused(EVAL, "finite" if attack == "only NaN" else "sae")


def test_shards_of_nothing_but_nan_end_the_run_with_the_code_for_bad_numbers(
    here: Path, refused: Refused
) -> None:
    for shard in Path("shards").glob("shard-*"):
        path = shard / "rows.safetensors"
        path.write_bytes(TENSOR_ATTACKS["only NaN"](*split(path)))
        seal(shard)
    refused([*FROM_SHARDS, "logger.every=1"], code=3)


PICKLE_SLOTS = [
    "run/saes/main/config.json",
    "run/run.json",
    "shards/harvest.json",
    "shards/shard-00000000/MANIFEST.json",
    "shards/shard-00000000/rows.safetensors",
]


@pytest.mark.parametrize("kind", ["pickle", "torch", "numpy"])
@pytest.mark.parametrize("slot", PICKLE_SLOTS)
def test_a_pickle_in_any_slot_is_never_run(here: Path, refused: Refused, slot: str, kind: str) -> None:
    raw = {"pickle": PICKLE, "torch": torch_file(), "numpy": numpy_file()}[kind]
    Path(slot).write_bytes(raw)
    if slot.endswith("rows.safetensors"):
        seal(Path(slot).parent)
    refused(EVAL if slot.startswith("run") else FROM_SHARDS)


def test_a_pickle_in_a_checkpoint_is_never_run(here: Path, refused: Refused) -> None:
    """In the slots that are read, and under the names that other libraries would read."""
    newest = sorted(Path("run/checkpoints").iterdir())[-1]
    checkpointer = Checkpointer(Path("run/checkpoints"))
    for name in ("state.json", "state.safetensors", ".metadata", "optimizer.pt", "trainer.bin"):
        kept = (newest / name).read_bytes() if (newest / name).exists() else None
        for raw in (PICKLE, torch_file()):
            (newest / name).write_bytes(raw)
            for sealed in (False, True):
                if sealed:
                    seal(newest)
                try:
                    checkpointer.load(newest)
                except ValueError as error:  # InputError or CorruptFile: anything else would end the test
                    assert str(newest) in str(error)  # noqa: PT017 (an error is one of two right answers)
                else:
                    assert sealed and kept is None, f"{name}: a pickle was taken for a state"
                assert not CANARY.exists(), name
        (newest / name).unlink()
        if kept is not None:
            (newest / name).write_bytes(kept)
        seal(newest)
    assert checkpointer.load(newest) is not None


def test_a_resume_from_hostile_checkpoints_is_refused(here: Path, refused: Refused) -> None:
    edited(Path("run/run.json"), lambda record: record.update(status="stopped"))
    for step in Path("run/checkpoints").iterdir():
        (step / "state.json").write_bytes(b'{"members": {"$tensor": "no such"}}')
        seal(step)
    refused([*FROM_TENSORS[:-1], "run.dir=run"], "checkpoints", "damaged")


# -- H3: configurations -------------------------------------------------------------------------

JSON_SLOTS = {
    "run/saes/main/config.json": EVAL,
    "run/run.json": EVAL,
    "shards/harvest.json": FROM_SHARDS,
    "shards/shard-00000000/MANIFEST.json": FROM_SHARDS,
}


@pytest.mark.parametrize("attack", JSON_ATTACKS)
def test_hostile_json_is_refused_by_every_command_that_reads_some(
    here: Path, refused: Refused, attack: str
) -> None:
    for slot, args in JSON_SLOTS.items():
        raw = Path(slot).read_bytes()
        Path(slot).write_bytes(JSON_ATTACKS[attack](raw))
        line = refused(args)
        assert Path(slot).name in line or str(Path(slot).parent) in line, (slot, line)
        Path(slot).write_bytes(raw)


@pytest.mark.parametrize("key", ["config", "fingerprint", "chosen", "steps", "step", "versions", "command"])
def test_no_value_of_another_type_escapes_as_another_error(
    here: Path, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = json.loads(Path("run/run.json").read_text())
    for value in (None, -1, 0, 10**12, "x", [], {"x": []}):
        Path("run/run.json").write_text(json.dumps(whole | {key: value}))
        for args in (EVAL, STATUS):
            assert main(args) in (0, 2), (key, value)
            assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest.update(files=[1]),
        lambda manifest: manifest.update(files={"rows.safetensors": 5}),
        lambda manifest: manifest.update(files={"rows.safetensors": {"bytes": "many", "xxh3_128": None}}),
        lambda manifest: manifest.update(kind=["shard"]),
        lambda manifest: manifest.update(meta=[]),
        lambda manifest: manifest.update(meta={}),
        lambda manifest: manifest.update(format=0),
        lambda manifest: manifest.update(format=True),
        lambda manifest: manifest["meta"].update(index="0"),
        lambda manifest: manifest["meta"].update(hooks={}),
        lambda manifest: manifest["meta"].update(hooks={"activations": "ids"}),
        lambda manifest: manifest["meta"].update(hooks={"activations": ["0.activations"]}),
        lambda manifest: manifest["meta"].update(rows=-1),
        lambda manifest: manifest["meta"].update(rows=10**12),
        lambda manifest: manifest["meta"].update(counts={"seen": "all"}),
        lambda manifest: manifest["meta"].update(cursor=[]),
        lambda manifest: manifest["meta"].update(fingerprint={}),
    ],
)
def test_a_manifest_that_is_sealed_again_is_still_a_strangers(
    here: Path, refused: Refused, change: Callable[[dict[str, Any]], object]
) -> None:
    seal(Path("shards/shard-00000000"), lambda manifest: change(manifest) and None)
    refused(FROM_SHARDS, "shard-00000000")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["sae"].update(_target_="os.system"), ("_target_",)),
        (lambda c: c["sae"]["activation"].update(_target_="os.system"), ("_target_",)),
        (lambda c: c["sae"].update(name="os.system"), ("os.system",)),
        (lambda c: c["sae"].update(name="${oc.env:CANARY_NAME}"), ("${oc.env",)),
        (lambda c: c["sae"]["activation"].update(k=10**12), ("10",)),
        (lambda c: c["sae"].update(d_sae=10**12), ("sae.d_sae", "10")),
        (lambda c: c.update(d_in="${oc.env:CANARY_NAME}"), ("d_in",)),
        (lambda c: c["meta"].update(hook={"_target_": "os.system"}), ("hook",)),
        (lambda c: c["meta"].update(hook="../../etc/passwd"), ("hook",)),
    ],
)
def test_a_published_configuration_names_nothing_but_names(
    here: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], object], words: Any
) -> None:
    monkeypatch.setenv("CANARY_NAME", "linear-canary")
    edited(Path("run/saes/main/config.json"), lambda config: change(config) and None)
    assert "linear-canary" not in refused(EVAL, *words)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["corpus"].update(name="https://localhost/${oc.env:CANARY_NAME}"),
        lambda c: c["run"].update(name="${oc.env:CANARY_NAME}"),
        lambda c: c["source"].update(paths=["${oc.env:CANARY_NAME}"]),
        lambda c: c["source"].update({"${oc.env:CANARY_NAME}": 1}),
        lambda c: c.update(_target_="os.system"),
        lambda c: c["sae"].update(_target_="os.system"),
        lambda c: c.update(sae={"name": "os.system"}),
        lambda c: c.update(sae=None),
        lambda c: c.update(source="tensors"),
        lambda c: c.update(source={"name": "os.system"}),
        lambda c: c["model"].update(name=5, trust_remote_code="${oc.env:CANARY_NAME}"),
        lambda c: c["train"].update(batch_tokens="${oc.decode:'[1]'}"),
    ],
)
def test_the_configuration_in_a_run_folder_refers_to_nothing(
    here: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], object]
) -> None:
    """It was resolved when the run began: a reference in it was put there to read this machine's secrets."""
    monkeypatch.setenv("CANARY_NAME", "value-canary")
    edited(Path("run/run.json"), lambda record: change(record["config"]) and None)
    assert "value-canary" not in refused(EVAL)


def test_a_run_folder_cannot_ask_for_remote_code(here: Path, refused: Refused) -> None:
    edited(Path("run/run.json"), lambda record: record["config"]["model"].update(trust_remote_code=True))
    refused(EVAL, "trust_remote_code")
    assert main([*EVAL, "trust_remote_code=true"]) == 0


# -- H4: names, links, devices and sizes ---------------------------------------------------------

NAMES = ["../escape", "/etc/passwd", "a/b", "..", ".", "", "a\0b", "a\nb", "\x1b[2J", "x" * 300, "é", "a b"]


@pytest.mark.parametrize("name", NAMES)
def test_a_manifest_names_no_file_outside_its_folder(here: Path, refused: Refused, name: str) -> None:
    def add(manifest: dict[str, Any]) -> None:
        manifest["files"][name] = manifest["files"]["rows.safetensors"]

    seal(Path("shards/shard-00000000"), add)
    refused(FROM_SHARDS, "shard-00000000", "outside")


@pytest.mark.parametrize("what", NOT_FILES)
def test_what_is_no_file_is_refused_without_opening_it(here: Path, refused: Refused, what: str) -> None:
    slots = JSON_SLOTS | {
        "run/saes/main/sae.safetensors": EVAL,
        "shards/shard-00000000/rows.safetensors": FROM_SHARDS,
    }
    for slot, args in slots.items():
        path = Path(slot)
        raw = path.read_bytes()
        instead(path, NOT_FILES[what])
        refused(args)
        instead(path, lambda path, raw=raw: path.write_bytes(raw))
        shutil.rmtree("new", ignore_errors=True)
    instead(Path("rows.safetensors"), NOT_FILES[what])
    refused(FROM_TENSORS, "rows.safetensors")


def test_links_in_place_of_folders_lead_nowhere(here: Path, refused: Refused) -> None:
    Path("shards/shard-00000000").rename("elsewhere")
    Path("shards/shard-00000000").symlink_to(here / "elsewhere")
    refused(FROM_SHARDS, "shard-00000000")
    for step in Path("run/checkpoints").iterdir():
        step.rename(here / f"moved-{step.name}")
        (Path("run/checkpoints") / step.name).symlink_to(here / f"moved-{step.name}")
    assert Checkpointer.steps(Path("run/checkpoints")) == []


def test_sizes_that_lie_are_found_before_anything_is_read(here: Path, refused: Refused) -> None:
    shard = Path("shards/shard-00000000")
    rows = shard / "rows.safetensors"
    os.truncate(rows, 2**42)  # sparse: four terabytes that take no room
    refused(FROM_SHARDS, "shard-00000000", str(2**42))

    def agree(manifest: dict[str, Any]) -> None:
        manifest["files"][rows.name] = {"bytes": 2**42, "xxh3_128": "0" * 32}

    seal(shard, agree)
    refused(FROM_SHARDS, "shard-00000000", "memory")
    with pytest.raises(CorruptFile, match="memory"):
        read_tensors(rows)


def test_a_million_entries_are_not_listed(here: Path, refused: Refused) -> None:
    shard = Path("shards/shard-00000000")
    one = ",".join(f'"f{i}": {{"bytes": 0, "xxh3_128": ""}}' for i in range(1_000_000))
    (shard / "MANIFEST.json").write_text(
        f'{{"format": 1, "kind": "shard", "files": {{{one}}}, "meta": {{}}}}'
    )
    refused(FROM_SHARDS, "shard-00000000", "bytes of JSON")
    seal_good = Path("shards/shard-00000001")
    for i in range(MAX_FILES):
        (seal_good / f"f{i}").touch()
    with pytest.raises(CorruptFolder, match="more than"):
        verify(seal_good)
    edited(Path("shards/harvest.json"), lambda found: found.update(shards=10**18))
    shutil.rmtree(shard)
    refused(FROM_SHARDS, "shard-00000000")


def test_a_file_with_very_many_names_is_answered_in_one_line_of_bearable_length(
    here: Path, refused: Refused
) -> None:
    header = {f"n{i}": {"dtype": "F32", "shape": [0, 1], "data_offsets": [0, 0]} for i in range(10_000)}
    Path("rows.safetensors").write_bytes(join(header, b""))
    refused(FROM_TENSORS, "source.key", "activations")


@pytest.mark.parametrize("depth", [64, 65])
def test_json_is_read_to_a_depth_that_whatever_walks_it_can_bear(tmp_path: Path, depth: int) -> None:
    (tmp_path / "x.json").write_text("[" * (depth - 1) + "1" + "]" * (depth - 1))
    if depth <= 64:
        read_json(tmp_path / "x.json")
    else:
        with pytest.raises(CorruptFile, match="deeper"):
            read_json(tmp_path / "x.json")


# -- H5: models ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded_once(tiny_model_dir: Callable[[str], Path], tiny_corpus_dir: Path) -> None:
    """What transformers and datasets import when they are first used is no memory of an attack."""
    load_model(ModelConfig(name=str(tiny_model_dir("llama"))))
    Documents(CorpusConfig(name=str(tiny_corpus_dir)))


@pytest.fixture
def model(
    loaded_once: None,
    tiny_model_dir: Callable[[str], Path],
    tiny_corpus_dir: Path,
    tmp_path: Path,
    monkeypatch: Any,
) -> Path:
    shutil.copytree(tiny_model_dir("llama"), tmp_path / "here" / "model")
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here/corpus").symlink_to(tiny_corpus_dir)
    (tmp_path / "here/model/evil.py").write_text(MODULE)
    return tmp_path / "here" / "model"


FROM_MODEL = ["train", "model.name=model", "corpus.name=corpus", *TINY, "train.tokens=320", "run.dir=new"]
AUTO_MAP = {
    "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", None]},
    "trust_remote_code": True,
    "custom_pipelines": {"x": {"impl": "evil.P"}},
}
CHAT = "{{ ''.__class__.__mro__[1].__subclasses__() }}{% for i in range(10**9) %}{% endfor %}"


def test_a_models_own_code_is_not_run_where_transformers_knows_the_model(model: Path, capsys: Any) -> None:
    """Nor its chat template, or what its files say about trusting them."""
    edited(model / "config.json", lambda config: config.update(AUTO_MAP))
    edited(model / "tokenizer_config.json", lambda config: config.update(chat_template=CHAT, **AUTO_MAP))
    edited(model / "generation_config.json", lambda config: config.update(custom_generate="evil", **AUTO_MAP))
    (model / "chat_template.jinja").write_text(CHAT)
    (model / "custom_generate").mkdir()
    (model / "custom_generate/generate.py").write_text(MODULE)
    code = main(FROM_MODEL)
    err = capsys.readouterr().err
    assert code in (0, 2) and "Traceback" not in err, err
    assert not CANARY.exists() and not [name for name in sys.modules if "evil" in name]


def _index(model: Path, target: str) -> None:
    header, _ = split(model / "model.safetensors")
    shutil.move(model / "model.safetensors", model.parent / "outside.safetensors")
    names = {name: target for name in header if name != "__metadata__"}
    index = {"metadata": {"total_size": 1}, "weight_map": names}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def _only_pickled(model: Path, name: str) -> None:
    (model / "model.safetensors").unlink()
    (model / name).write_bytes(torch_file())


MODEL_ATTACKS: dict[str, Callable[[Path], object]] = {
    "a kind only its code knows": lambda m: edited(
        m / "config.json", lambda c: c.update(AUTO_MAP, model_type="evil")
    ),
    "a tokenizer only its code knows": lambda m: edited(
        m / "tokenizer_config.json", lambda c: c.update(AUTO_MAP, tokenizer_class="Evil")
    ),
    "attention from another repository": lambda m: edited(
        m / "config.json", lambda c: c.update(attn_implementation="evil/attention")
    ),
    "attention of a part from another repository": lambda m: edited(
        m / "config.json", lambda c: c.update(text_config={"_attn_implementation": "evil/attention@main"})
    ),
    "only pickled weights": lambda m: _only_pickled(m, "pytorch_model.bin"),
    "pickled weights under another name": lambda m: _only_pickled(m, "model.safetensors"),
    "an index that leads out": lambda m: _index(m, "../outside.safetensors"),
    "an index that leads to a file of the system": lambda m: _index(m, "/etc/passwd"),
    "layers without end": lambda m: edited(m / "config.json", lambda c: c.update(num_hidden_layers=10**9)),
    "a width in words": lambda m: edited(m / "config.json", lambda c: c.update(hidden_size="x")),
    "a width below nothing": lambda m: edited(m / "config.json", lambda c: c.update(hidden_size=-1)),
    "no heads": lambda m: edited(m / "config.json", lambda c: c.update(num_attention_heads=0)),
    "a vocabulary without end": lambda m: edited(m / "config.json", lambda c: c.update(vocab_size=10**13)),
    "a dtype that runs": lambda m: edited(m / "config.json", lambda c: c.update(dtype="os.system")),
    "a configuration ten thousand lists deep": lambda m: (m / "config.json").write_bytes(
        b"[" * 10_000 + b"]" * 10_000
    ),
    "a tokenizer that is a list": lambda m: (m / "tokenizer.json").write_text("[]"),
    "a tokenizer that is a pickle": lambda m: (m / "tokenizer.json").write_bytes(PICKLE),
    "tokenizer settings that are a list": lambda m: (m / "tokenizer_config.json").write_text("[]"),
}


@pytest.mark.parametrize("attack", MODEL_ATTACKS)
def test_a_hostile_model_is_refused(model: Path, refused: Refused, attack: str) -> None:
    MODEL_ATTACKS[attack](model)
    # Where the package `kernels` is not installed, transformers refuses too; it is to be refused everywhere.
    refused(FROM_MODEL, "code from elsewhere" if "another repository" in attack else "model")
    assert not [name for name in sys.modules if "evil" in name]


# -- H6, H7: text ---------------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
    """Tags with their attributes, as a browser would see them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


@pytest.fixture
def asked() -> Iterator[tuple[str, list[str]]]:
    """A server and the paths that it was asked for: a page that shows text asks for nothing."""
    paths: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            self.send_error(404)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", paths
    server.shutdown()
    server.server_close()


CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e]")
LOG_LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ [A-Z]+ [\w.]+: ")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def test_text_from_strangers_stays_text_in_everything_that_a_run_writes(
    model: Path,
    tiny_corpus_dir: Path,
    tmp_path: Path,
    asked: tuple[str, list[str]],
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Documents, names of files and folders, of the model and of the hook: each with all that might work."""
    address, paths = asked
    script = f"document.title='owned';fetch('{address}/fetch')"
    markup = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'"
    forged = "\n---\nlicense: mit\n---\n2026-01-01T00:00:00Z ERROR x: \x1b]0;owned\x07"
    cell = "=HYPERLINK(1)|@SUM(1)|\u202egpj.exe"
    corpus = tmp_path / "here" / f"{markup}{cell}{forged}"
    shutil.copytree(tiny_corpus_dir, corpus)
    for i, path in enumerate(sorted(corpus.iterdir())):
        path.write_text(
            f"{path.read_text()} </title><script>{script}</script> {forged} {cell} \x1b[2J \x00 {i}"
        )
    path.rename(corpus / f"--- {cell}.txt")
    named = model.rename(model.parent / f"model{markup}{forged}{cell}")

    def quoted(path: Path) -> str:
        return "'" + str(path).replace("\\", "\\\\").replace("'", "\\'") + "'"

    args = [f"model.name={quoted(named)}", f"corpus.name={quoted(corpus)}", "logger.every=1", "run.dir=new"]
    assert main(["train", *TINY, "train.tokens=640", *args]) == 0
    assert main(["status", "run=new"]) == 0
    told = capfd.readouterr()
    run = Path("new")
    log = (run / "train.log").read_text()
    card = (run / "saes/main/README.md").read_text()
    report = (run / "report.html").read_text()
    for where, text in {
        "stdout": told.out,
        "stderr": told.err,
        "log": log,
        "card": card,
        "page": report,
    }.items():
        assert not CONTROLS.search(text), where
    assert all(LOG_LINE.match(line) for line in log.splitlines() if not line.startswith((" ", "Traceback")))
    assert not [line for line in (*log.splitlines(), *told.err.splitlines()) if line.startswith("2026-01-01")]

    assert card.startswith("# ") and "\n---\n" not in card and "\nlicense" not in card
    (about,) = [line for line in card.splitlines() if line.startswith("Model `")]
    assert not set("<>[]|*#\\") & set(about) and "owned" in about

    page = Page(report)
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base", "form", "a"}
    assert all((attrs["src"] or "").startswith("data:image/png") for tag, attrs in page.tags if tag == "img")
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    (policy,) = [a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None and policy.startswith("default-src 'none'")
    assert "onerror" in report, "the names are shown, as text"

    for record in (run / "metrics.jsonl").read_text().splitlines():
        assert set(json.loads(record)) >= {"step", "tokens", "time"}
    assert yaml.safe_load((run / "config.yaml").read_text())["corpus"]["name"] == str(corpus)
    assert not [path for path in run.rglob("*") if path.suffix in {".csv", ".tsv"}]
    if CHROMIUM is None:
        return
    trap = tmp_path / "trap.html"
    trap.write_text(f"<title>x</title><img src='{address}/trap'>")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--virtual-time-budget=2000"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    for file in (trap, run / "report.html"):
        done = subprocess.run(
            [CHROMIUM, *flags, f"file://{file.resolve()}"], capture_output=True, text=True, timeout=100
        )
        assert "<title>" in done.stdout and "<title>owned" not in done.stdout
    assert paths == ["/trap"], "the browser works, and only the trap made it ask"


def test_names_in_a_record_do_not_drive_the_terminal(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`status` of a run folder from somebody else, whose numbers are no numbers either."""
    edited(Path("run/run.json"), lambda record: record.update(status="\x1b[2J\x1b]0;owned\x07\nstatus done"))
    strange = [
        '{"tokens_per_s": 1.0, "step": "\\u001b[2J"}',
        '{"tokens_per_s": 1.0, "step": 1e999}',
        "[" * 10**5,
    ]
    Path("run/metrics.jsonl").write_text("\n".join(strange) + "\n")
    with open("run/metrics.jsonl", "r+b") as file:
        file.truncate(2**40)  # a terabyte of NULs follows
    began = time.process_time()
    forget_peak()
    before = peak_bytes()
    assert main(STATUS) == 0
    out = capsys.readouterr().out
    assert not CONTROLS.search(out) and out.count("\nstatus") == 1
    assert time.process_time() - began < MOST_SECONDS and peak_bytes() - before < MOST_BYTES


# -- H8: secrets in what would be published --------------------------------------------------------


def test_a_saved_configuration_with_a_secret_in_it_is_refused_without_showing_it(
    here: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "canary-0123456789")
    edited(
        Path("run/run.json"), lambda r: r["config"]["corpus"].update(name="https://u:canary-0123456789@h/x")
    )
    assert "canary-0123456789" not in refused(EVAL, "corpus.name", "HF_TOKEN", "***")
