"""The readers of strangers' bytes, and a long search for bytes that make one fail in a way it must not.

    python tests/faults/fuzz_atheris.py --seconds 120 [--reader header ...]

A reader refuses bytes by one of this package's errors, or takes them. Anything else that is raised, more
than 64 MB or more than 5 s for one input is a finding: it is printed with its bytes, and the exit code is
1 (0 without findings, 2 where atheris is not installed). `test_fuzz.py` feeds the same readers by hypothesis.
"""

import argparse
import importlib
import importlib.util
import inspect
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from faults.hostile_files import join, seal, split
from format_cases import about, built

from sae_train.activations.topk import TopKConfig
from sae_train.checkpoint import Checkpointer
from sae_train.cli.compose import compose
from sae_train.config import to_config
from sae_train.errors import InputError
from sae_train.files import (
    CorruptFile,
    committed_folder,
    read_json,
    read_tensors,
    verify,
    write_json,
    write_tensors,
)
from sae_train.formats.base import FORMATS, FormatConfig
from sae_train.formats.plain import of_sae
from sae_train.harvest.texts import clean
from sae_train.harvest.windows import pieces
from sae_train.load import load_sae as load_any
from sae_train.member_set import members
from sae_train.sae.io import CONFIG, WEIGHTS, load_sae, save_sae
from sae_train.sae.linear import LinearConfig, LinearSAE
from sae_train.shards.disk import DiskShards
from sae_train.shards.tensors import TensorRows
from sae_train.train.record import RunRecord

OURS = (InputError, CorruptFile, FileNotFoundError)
"""What a reader may raise, whatever it is given."""
MOST_SECONDS, MOST_MIB = 5, 64
NEW_LINES = "\n"
FOREIGN: dict[str, tuple[str, str, tuple[str, str, str]]] = {
    "saelens": ("cfg.json", "sae_weights.safetensors", ("linear", "autoencoder", "jumprelu")),
    "sparsify": ("cfg.json", "sae.safetensors", ("linear", "autoencoder", "topk")),
    "dictionary_learning": ("config.json", "ae.pt", ("linear", "autoencoder", "batch_topk")),
    "openmoss": ("config.json", "sae_weights.safetensors", ("linear", "crosscoder", "relu")),
    "gemma_scope": ("config.json", "params.safetensors", ("linear", "skip transcoder", "jumprelu")),
    "gemma_scope npz": ("params.npz", "params.npz", ("linear", "autoencoder", "jumprelu")),
    "circuit_tracer": ("config.yaml", "layer_0.safetensors", ("linear", "transcoder", "jumprelu")),
}
"""What other libraries write: configuration, weights, and the SAE that is in them here."""


class Bench:
    """One of everything that is read, whole, in a folder of its own.

    Attributes:
        good: reader -> bytes that it takes, to begin the search with.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sae, self.shards, self.steps = folder / "sae", folder / "shards", folder / "steps"
        self.sae.mkdir()
        sae = LinearSAE(LinearConfig(d_sae=6, activation=TopKConfig(k=2)), 4)
        sae.initialise(torch.arange(64.0).reshape(16, 4) % 7, torch.Generator().manual_seed(0))
        save_sae(sae, self.sae, {"hook": "resid_post.1"})
        self.rows = folder / "rows.safetensors"
        save_file({"activations": torch.arange(80.0).reshape(20, 4)}, self.rows)
        harvest = {"dims": {"x": 4}, "lanes": 2, "fingerprint": {"a": "b"}, "complete": True, "shards": 1}
        self.shards.mkdir()
        write_json(self.shards / "harvest.json", harvest | {"rows": 8, "counts": {"seen": 8}})
        meta = {"index": 0, "cursor": {}, "hooks": {"x": "0.x"}, "rows": 8, "counts": {"seen": 8}}
        self.shard = self.shards / "shard-00000000"
        with committed_folder(self.shard, "shard", meta | {"fingerprint": {"a": "b"}}) as temp:
            tensors = {"0.x": torch.arange(32.0).reshape(8, 4), "ids": torch.arange(8)}
            write_tensors(temp / "rows.safetensors", tensors)
        self.checkpointer = Checkpointer(self.steps)
        state = {"a": torch.arange(3), 1: [None, 2.5, float("nan"), {"b": True}], "$x": "y"}
        self.step = self.checkpointer.save(7, state, {"steps": 9})
        self.record = folder / "run"
        self.record.mkdir()
        RunRecord("done", {"sae": {"name": "linear"}}, {"a": "b"}, {"threads": 1}, 10).write(self.record)
        self.good = {
            "json": b'{"a": [1, 2.5, null, "\\u00e9"]}',
            "manifest": (self.shard / "MANIFEST.json").read_bytes(),
            "sealed manifest": (self.shard / "MANIFEST.json").read_bytes(),
            "harvest": (self.shards / "harvest.json").read_bytes(),
            "state": (self.step / "state.json").read_bytes(),
            "record": (self.record / "run.json").read_bytes(),
            "SAE configuration": (self.sae / CONFIG).read_bytes(),
            "header of an SAE": json.dumps(split(self.sae / WEIGHTS)[0]).encode(),
            "header of a shard": json.dumps(split(self.shard / "rows.safetensors")[0]).encode(),
            "header of tensors": json.dumps(split(self.rows)[0]).encode(),
            "text": "\ufeffA text,\x00 with \U0001f600 and \r\n ends. ".encode(),
            "override": b"sae.activation.k=3",
        }
        stored = [self.sae / WEIGHTS, self.shard / "rows.safetensors", self.rows]
        self.foreign = folder / "foreign"
        for name, (config, weights, _) in FOREIGN.items():
            place = self._write_foreign(name)
            self.good[f"{name}: configuration"] = (place / config).read_bytes()
            self.good[f"{name}: weights"] = (place / weights).read_bytes()
            if weights.endswith(".safetensors"):
                stored.append(place / weights)
                self.good[f"{name}: weights"] = json.dumps(split(place / weights)[0]).encode()
        self.bodies = {path: split(path)[1] for path in stored}
        self.whole = folder / "whole"
        for part in (self.shards, self.sae, self.foreign):
            shutil.copytree(part, self.whole / part.name)

    def _write_foreign(self, name: str) -> Path:
        place = self.foreign / name
        place.mkdir(parents=True)
        config, weights, case = FOREIGN[name]
        format_name, _, as_npz = name.partition(" ")
        kind = case[1]
        FORMATS.build(FormatConfig(format_name)).write(
            [(of_sae(built(*case)), about(kind))], place, torch.float32
        )
        if as_npz:
            tensors = load_file(place / "params.safetensors")
            shutil.rmtree(place)
            place.mkdir()
            np.savez(place / weights, **{n.replace("w_", "W_"): t.numpy() for n, t in tensors.items()})
        elif config == "config.yaml":  # which JSON is, too
            table = {"model_name": "m/m", "model_kind": "transcoder_set", "scan": "m/m"}
            write_json(place / config, table | {"feature_input_hook": "a", "feature_output_hook": "b"})
        return place

    def restore(self) -> None:
        """Have the files whole again that more than one reader reads."""
        for name in ("shards", "sae", "foreign"):
            shutil.copytree(self.whole / name, self.folder / name, dirs_exist_ok=True)

    def read(self, reader: str, data: bytes) -> bool:
        """Give bytes to a reader; whether it took them.

        Raises:
            Anything but `OURS`: a finding.
        """
        try:
            ALL[reader](self, data)
        except OURS as error:
            message = str(error)
            assert len(message) < 4000 + 2 * len(data), f"a message of {len(message)} characters"
            return False
        return True


def _header(path: Path, data: bytes, bench: Bench) -> None:
    path.write_bytes(join(data, bench.bodies[path]))


def _manifest(bench: Bench, data: bytes) -> None:
    (bench.shard / "MANIFEST.json").write_bytes(data)
    verify(bench.shard)


def _sealed_manifest(bench: Bench, data: bytes) -> None:
    with suppress(ValueError, RecursionError):
        if isinstance(value := json.loads(data), dict):
            seal(bench.shard, lambda manifest: value)
            _drain(bench)


def _drain(bench: Bench) -> None:
    shards = DiskShards(bench.shards)
    while (shard := shards.next_shard()) is not None:
        assert shard.rows["x"].shape == (len(shard.ids), 4)


def _harvest(bench: Bench, data: bytes) -> None:
    (bench.shards / "harvest.json").write_bytes(data)
    shards = DiskShards(bench.shards)
    while shards.next_shard() is not None:
        pass


def _state(bench: Bench, data: bytes) -> None:
    (bench.step / "state.json").write_bytes(data)
    seal(bench.step)
    loaded = bench.checkpointer.load(bench.step)
    assert loaded is not None and isinstance(loaded[1], dict)


def _record(bench: Bench, data: bytes) -> None:
    (bench.record / "run.json").write_bytes(data)
    RunRecord.read(bench.record)


def _json(bench: Bench, data: bytes) -> None:
    (bench.folder / "x.json").write_bytes(data)
    read_json(bench.folder / "x.json")


def _sae_configuration(bench: Bench, data: bytes) -> None:
    (bench.sae / CONFIG).write_bytes(data)
    load_sae(bench.sae)


def _sae_header(bench: Bench, data: bytes) -> None:
    _header(bench.sae / WEIGHTS, data, bench)
    load_sae(bench.sae)


def _shard_header(bench: Bench, data: bytes) -> None:
    _header(bench.shard / "rows.safetensors", data, bench)
    seal(bench.shard)
    _drain(bench)


def _tensors_header(bench: Bench, data: bytes) -> None:
    _header(bench.rows, data, bench)
    with suppress(CorruptFile):
        read_tensors(bench.rows)
    rows = TensorRows([bench.rows], "activations", 8, 2)
    while rows.next_rows() is not None:
        pass


def _text(bench: Bench, data: bytes) -> None:
    text, replaced = clean(data.decode(errors="surrogateescape"))
    assert text.encode().decode() == text and text.count("\ufffd") == replaced
    for size in (1, 7, 1000):
        parts = list(pieces(text, size))
        assert "".join(parts) == text and all(len(part) <= size for part in parts)


def _override(bench: Bench, data: bytes) -> None:
    text = data.decode(errors="replace").replace("\x00", "")
    if not text.startswith("-"):  # a flag is Hydra's own, and never reaches `compose`
        composed = compose("train", ["hook=resid_post.1", "model.name=x", "corpus.name=x", text])
        members(to_config(composed), composed)


def _foreign(name: str, file: str) -> Callable[[Bench, bytes], None]:
    """A reader of one file of another library's folder; of weights in safetensors, of their header."""

    def read(bench: Bench, data: bytes) -> None:
        path = bench.foreign / name / file
        if path in bench.bodies:
            _header(path, data, bench)
        else:
            path.write_bytes(data)
        load_any(path.parent)

    return read


Readers = dict[str, Callable[[Bench, bytes], None]]
READERS: Readers = {
    "json": _json,
    "manifest": _manifest,
    "sealed manifest": _sealed_manifest,
    "harvest": _harvest,
    "state": _state,
    "record": _record,
    "SAE configuration": _sae_configuration,
    "header of an SAE": _sae_header,
    "header of a shard": _shard_header,
    "header of tensors": _tensors_header,
    "text": _text,
    "override": _override,
}
FOREIGN_READERS: Readers = {
    f"{name}: {part}": _foreign(name, file)
    for name, (config, weights, _) in FOREIGN.items()
    for part, file in (("configuration", config), ("weights", weights))
    if part == "weights" or config != weights
}
"""For this search alone: `unit/test_formats_hostile.py` breaks the same files one by one."""
ALL = READERS | FOREIGN_READERS


def instrument(module: ModuleType) -> None:
    """Let the search see which lines of a module run."""
    import atheris

    holders = [module, *(c for _, c in inspect.getmembers(module, inspect.isclass))]
    for holder in holders:
        for member in vars(holder).values():
            function = inspect.unwrap(
                member.__func__ if isinstance(member, classmethod | staticmethod) else member
            )
            if inspect.isfunction(function) and function.__module__ == module.__name__:
                atheris.instrument_func(function)


def search(reader: str, seconds: int) -> None:
    """Search in this process, which ends with the search: libFuzzer never returns."""
    import atheris

    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    bench = Bench(folder)
    seeds = folder / "seeds"
    seeds.mkdir()
    (seeds / "good").write_bytes(bench.good[reader])
    atheris.instrument_func(ALL[reader])
    for function in (read_json, verify, load_sae, clean, pieces, read_tensors):
        atheris.instrument_func(function)
    if (format_name := reader.partition(":")[0].partition(" ")[0]) in FORMATS:
        for name in ("base", "blocks", "plain", "torch_file", "numpy_file", format_name):
            instrument(importlib.import_module(f"sae_train.formats.{name}"))
    options = [f"-max_total_time={seconds}", f"-timeout={MOST_SECONDS}", f"-malloc_limit_mb={MOST_MIB}"]
    options += ["-rss_limit_mb=0", "-max_len=20000", "-print_final_stats=1", f"-artifact_prefix={folder}/"]
    atheris.Setup([sys.argv[0], *options, str(seeds)], lambda data: bench.read(reader, data) and None)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description="Search for bytes that a reader does not survive.")
    parser.add_argument("--seconds", type=int, default=600, help="for all readers together")
    parser.add_argument("--reader", action="append", choices=list(ALL), help="only this one (repeatable)")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if importlib.util.find_spec("atheris") is None:
        print("fuzz_atheris: atheris is missing: pip install atheris", file=sys.stderr)
        return 2
    readers = args.reader or list(ALL)
    if args.here:
        search(readers[0], args.seconds)
    findings = 0
    for reader in readers:
        seconds = max(1, args.seconds // len(readers))
        command = [sys.executable, __file__, "--here", "--reader", reader, "--seconds", str(seconds)]
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            environment = os.environ | {"TMPDIR": folder}  # libFuzzer leaves without cleaning up
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment)
        stats = [line for line in done.stderr.splitlines() if "number_of_executed_units" in line]
        runs = stats[-1].split()[-1] if stats else "?"
        print(f"{reader}: {runs} runs, {time.monotonic() - began:.0f} s, exit {done.returncode}", flush=True)
        if done.returncode:
            findings += 1
            tail = (done.stdout + done.stderr).splitlines()[-60:]
            print(NEW_LINES.join(tail), file=sys.stderr)
    print(f"{findings} of {len(readers)} readers failed")
    return min(1, findings)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
