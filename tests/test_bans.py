"""What the source must not do, found by its syntax: run what a file says, or leave a door for it.

Every rule is shown to find a planted line. The names are resolved through imports, so neither
`from torch import load as l` nor `import pickle as p` passes.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
"""They run what a file says."""
CALLS = {
    "__import__": "imports what a value says",
    "eval": "runs text",
    "exec": "runs text",
    "compile": "prepares text to be run",
    "builtins.eval": "runs text",
    "builtins.exec": "runs text",
    "builtins.compile": "prepares text to be run",
    "torch.load": "unpickles",
    "torch.jit.load": "runs what a file says",
    "torch.hub.load": "runs what a repository says",
    "torch.serialization.load": "unpickles",
    "pandas.read_pickle": "unpickles",
    "yaml.load": "makes any object; safe_load does not",
    "yaml.load_all": "makes any object; safe_load_all does not",
    "yaml.unsafe_load": "makes any object",
    "yaml.full_load": "makes more than plain values",
    "hydra.utils.instantiate": "makes whatever a configuration names",
    "hydra.utils.call": "calls whatever a configuration names",
    "hydra.utils.get_class": "imports whatever a configuration names",
    "hydra.utils.get_method": "imports whatever a configuration names",
    "hydra.utils.get_object": "imports whatever a configuration names",
    "tempfile.mktemp": "gives a name that another can take first",
    "os.system": "goes through a shell",
    "os.popen": "goes through a shell",
    "subprocess.getoutput": "goes through a shell",
    "subprocess.getstatusoutput": "goes through a shell",
}
METHODS = {"extractall": "lets an archive choose where it writes"}
FLAGS = {
    "shell": "goes through a shell",
    "trust_remote_code": "runs a model's code unasked",
    "allow_pickle": "unpickles",
}
"""Keyword arguments that must not be the constant True."""
FIXED = ("/tmp", "/var/tmp", "/dev/shm")
"""Shared folders: a fixed name in one can be taken first by another user."""
SAFE_LOAD = {"kernels/bench/peers/protocol.py", "kernels/bench/gpu_reference.py"}
SAFE_LOAD |= {"sae_train/formats/torch_file.py"}
"""Where torch.load may be called, and only with weights_only=True: benchmarks, for tensors of their own, and
the one format that is a pickle."""


def names(tree: ast.Module) -> dict[str, str]:
    """What each imported name stands for, dotted: {"np": "numpy", "load": "torch.load"}."""
    known: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                known[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and node.module:
            known |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return known


def dotted(node: ast.expr, known: dict[str, str]) -> str:
    """The full name of what is called, or "" where it is no plain name."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return ""
    return ".".join([known.get(node.id, node.id), *reversed(parts)])


def is_true(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def docstrings(tree: ast.Module) -> set[int]:
    """Identities of string constants that stand alone: documentation, which may speak of anything."""
    return {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}


def banned(text: str, where: str = "") -> Iterator[str]:
    """Every banned thing in a source text, one line each."""
    tree = ast.parse(text)
    known, said = names(tree), docstrings(tree)
    for node in ast.walk(tree):
        at = f"{where}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            for module in modules:
                if module.split(".")[0] in MODULES:
                    yield f"{at}: imports {module}"
        elif isinstance(node, ast.Call):
            name = dotted(node.func, known)
            safely = any(k.arg == "weights_only" and is_true(k.value) for k in node.keywords)
            if name in CALLS and not (name == "torch.load" and safely and where in SAFE_LOAD):
                yield f"{at}: {name} {CALLS[name]}"
            if isinstance(node.func, ast.Attribute) and node.func.attr in METHODS:
                yield f"{at}: {node.func.attr} {METHODS[node.func.attr]}"
            for keyword in node.keywords:
                if keyword.arg in FLAGS and is_true(keyword.value):
                    yield f"{at}: {keyword.arg}=True {FLAGS[keyword.arg]}"
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value in FLAGS and is_true(value):
                    yield f"{at}: {key.value}=True {FLAGS[key.value]}"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in said:
            first = "/".join(node.value.split("/")[: 3 if node.value.startswith(("/var", "/dev")) else 2])
            if first in FIXED:
                yield f"{at}: {node.value!r} is a fixed name in a shared folder"


def sources() -> list[Path]:
    return [path for folder in ("sae_train", "kernels") for path in sorted((ROOT / folder).rglob("*.py"))]


def test_the_source_runs_nothing_that_a_file_says() -> None:
    found = [
        line for path in sources() for line in banned(path.read_text(), path.relative_to(ROOT).as_posix())
    ]
    assert found == []


def test_there_is_a_source_to_look_at() -> None:
    there = {path.relative_to(ROOT).as_posix() for path in sources()}
    assert {"sae_train/files.py", "sae_train/sae/io.py", "kernels/sae_kernels/__init__.py"} <= there
    assert there >= SAFE_LOAD


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        *((f"import {module}", module) for module in sorted(MODULES)),
        *((f"from {module} import loads", module) for module in sorted(MODULES)),
        *((f"import {name.split('.')[0]}\n{name}(x)", name) for name in CALLS if "." in name),
        *((f"{name}(x)", name) for name in CALLS if "." not in name),
        *((f"f(x, {flag}=True)", flag) for flag in FLAGS),
        *((f"options = {{'{flag}': True}}", flag) for flag in FLAGS),
        *((f"open('{folder}/x')", folder) for folder in FIXED),
        ("import torch as t\nt.load(x, weights_only=True)", "torch.load"),
        ("from torch import load as l\nl(x)", "torch.load"),
        ("from hydra.utils import instantiate\ninstantiate(x)", "hydra.utils.instantiate"),
        ("import hydra\nhydra.utils.instantiate(x)", "hydra.utils.instantiate"),
        ("import yaml\nyaml.load(x, Loader=yaml.SafeLoader)", "yaml.load"),
        ("import numpy as np\nnp.load(x, allow_pickle=True)", "allow_pickle"),
        ("import subprocess as s\ns.run(x, shell=True)", "shell"),
        ("import tarfile\ntarfile.open(x).extractall()", "extractall"),
        ("def f():\n    import pickle", "pickle"),
        ("path = f'/tmp/{x}'", "/tmp"),
    ],
)
def test_a_planted_line_is_found(text: str, complaint: str) -> None:
    found = list(banned(text, "sae_train/planted.py"))
    assert found and any(complaint in line for line in found), found


@pytest.mark.parametrize(
    "text",
    [
        "model.eval()",
        "import re\nre.compile(x)",
        "import torch\ntorch.compile(x)",
        "import yaml\nyaml.safe_load(x)",
        "f(trust_remote_code=config.trust_remote_code, shell=False)",
        "import numpy as np\nnp.load(x)",
        "'''About /tmp and pickle.'''",
        "def f():\n    '''/tmp/x'''",
        "x = 'tmp/x'",
        "from safetensors.torch import load",
    ],
)
def test_what_is_harmless_is_left_alone(text: str) -> None:
    assert list(banned(text, "sae_train/planted.py")) == []


def test_only_the_allowed_files_may_load_and_only_weights() -> None:
    for where in SAFE_LOAD:
        assert list(banned("import torch\ntorch.load(x, weights_only=True)", where)) == []
        for text in ("torch.load(x)", "torch.load(x, weights_only=False)", "torch.load(x, weights_only=y)"):
            assert list(banned(f"import torch\n{text}", where)), text
