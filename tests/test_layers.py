"""The layer table of docs/architecture.md, enforced on the source, and proof that violations are caught.

A module imports from the rows above its own, or from its own group. Row 1 is one group of small
modules; in row 2 the data side (`harvest`, `shards`) and the model side never meet.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Row by row: groups of modules that may import each other, and the third-party packages they may use.
LAYERS: list[list[tuple[set[str], set[str]]]] = [
    [({"sae_kernels"}, {"torch", "triton"})],
    [
        (
            {"errors", "registry", "seeds", "devices", "codes", "batch", "places", "stop", "ranks", "split"}
            | {"files", "verified", "redact", "sinks", "log", "ops", "meeting"},
            {"torch", "safetensors", "xxhash", "wandb"},
        )
    ],
    [
        ({"activations"}, {"torch"}),
        ({"losses"}, {"torch"}),
        (
            {"harvest"},
            {"torch", "numpy", "safetensors", "xxhash", "tenacity", "fsspec", "zstandard"}
            | {"transformers", "datasets", "pyarrow", "huggingface_hub"},
        ),
        ({"shards"}, {"torch", "numpy", "safetensors", "xxhash"}),
    ],
    [({"sae"}, {"torch", "safetensors", "psutil"})],
    [({"stats"}, {"torch"}), ({"attach"}, {"torch"})],
    [({"metrics"}, {"torch"}), ({"checkpoint"}, {"torch", "safetensors"})],
    [
        ({"train"}, {"torch", "numpy", "rich", "psutil", "pynvml", "schedulefree", "torchao"}),
        ({"evaluate"}, {"torch"}),
    ],
    [({"report"}, {"numpy", "rich", "jinja2", "matplotlib", "yaml"})],
    [
        (
            {"formats", "hub"},
            {"torch", "numpy", "safetensors", "yaml", "psutil", "filelock", "huggingface_hub"},
        )
    ],
    [({"load"}, {"torch"}), ({"launch"}, {"torch", "psutil"})],
    [({"config", "member_set", "plan", "plan_job", "plan_step"}, {"hydra", "omegaconf"})],
    [({"sweep"}, {"hydra", "omegaconf", "rich", "yaml", "jinja2", "filelock", "optuna"})],
    [
        (
            {"cli", "demo", "__main__"},
            {"torch", "hydra", "omegaconf", "rich", "yaml", "psutil", "filelock", "transformers"},
        )
    ],
]
TOP = "sae_train"  # its __init__ gathers names for users; nothing inside may import it
HEAVY = {"transformers", "datasets", "pyarrow", "huggingface_hub", "wandb", "matplotlib", "jinja2"}
HEAVY |= {"schedulefree", "torchao", "optuna", "tenacity", "zstandard"}
"""May be imported inside a function, so that `import sae_train` and `--help` stay fast; the last two, so that
the benchmark for GPUs runs where little more than torch is installed."""
HEAVY_MODULES = {"torch.utils.tensorboard"}
MAX_LINES = 400


def sources(root: Path) -> Iterator[tuple[str, Path]]:
    """(dotted module name, file) of both packages under a checkout."""
    for base, package in ((root, "sae_train"), (root / "kernels", "sae_kernels")):
        for path in sorted((base / package).rglob("*.py")):
            parts = list(path.relative_to(base).with_suffix("").parts)
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(tree: ast.Module, modules: set[str]) -> Iterator[tuple[str, int, int, bool]]:
    """(imported module, line, level of relative import, inside a function) of every import statement."""
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, 0, id(node) in inside
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:  # `from package import module` imports the module, not only the package
                full = f"{node.module}.{alias.name}"
                target = full if full in modules else node.module or ""
                yield target, node.lineno, node.level, id(node) in inside


def group_of(module: str) -> tuple[int, int] | None:
    """(row, group) of a module of ours, or None if the table does not know it."""
    first, _, rest = module.partition(".")
    name = first if first == "sae_kernels" else rest.split(".")[0]
    for row, groups in enumerate(LAYERS):
        for index, (names, _) in enumerate(groups):
            if name in names:
                return row, index
    return None


def violations(root: Path) -> list[str]:
    """Everything in a checkout that breaks the rules of this file, one line each."""
    found: list[str] = []
    files = dict(sources(root))
    graph: dict[str, set[str]] = {}
    for module, path in files.items():
        where = str(path.relative_to(root))
        text = path.read_text()
        if len(text.splitlines()) > MAX_LINES:
            found.append(f"{where}: {len(text.splitlines())} lines, at most {MAX_LINES}")
        place = group_of(module)
        if place is None and module != TOP:
            found.append(f"{where}: not in the layer table")
            continue
        edges = graph[module] = set()
        for target, line, level, lazy in imports(ast.parse(text), set(files)):
            at = f"{where}:{line}"
            top = target.split(".")[0]
            if level:
                found.append(f"{at}: relative import")
            elif top in ("sae_train", "sae_kernels"):
                edges.add(target)
                if lazy:
                    found.append(f"{at}: {target} is imported inside a function")
                if target == TOP:
                    found.append(f"{at}: imports the root package")
                elif place is not None and not _may_import(place, group_of(target)):
                    found.append(f"{at}: {module} may not import {target}")
            elif top not in sys.stdlib_module_names:
                allowed = LAYERS[place[0]][place[1]][1] if place is not None else set()
                if top not in allowed:
                    found.append(f"{at}: {module} may not import {target}")
                if lazy and top not in HEAVY and target not in HEAVY_MODULES:
                    found.append(f"{at}: {target} is imported inside a function")
            elif lazy:
                found.append(f"{at}: {target} is imported inside a function")
    try:
        TopologicalSorter({m: {t for t in ts if t != m} for m, ts in graph.items()}).prepare()
    except CycleError as error:
        found.append("import cycle: " + " -> ".join(error.args[1]))
    return found


def _may_import(place: tuple[int, int], target: tuple[int, int] | None) -> bool:
    return target is not None and (target[0] < place[0] or target == place)


def test_every_import_follows_the_layer_table():
    assert violations(ROOT) == []


def test_the_table_names_only_modules_that_exist():
    present = {module.split(".")[1] for module, _ in sources(ROOT) if module.startswith("sae_train.")}
    named = {name for groups in LAYERS for names, _ in groups for name in names} - {"sae_kernels"}
    assert named == present


@pytest.mark.parametrize(
    ("file", "line", "complaint"),
    [
        ("sae_train/train/bad.py", "import sae_train.report.html", "may not import sae_train.report.html"),
        ("sae_train/harvest/bad.py", "from sae_train.shards.disk import x", "may not import"),
        ("sae_train/harvest/bad.py", "from sae_train import shards", "may not import sae_train.shards"),
        ("sae_train/shards/bad.py", "import sae_train.harvest", "may not import sae_train.harvest"),
        ("sae_train/activations/bad.py", "from sae_train.losses import auxk", "may not import"),
        ("kernels/sae_kernels/bad.py", "from sae_train.codes import Codes", "may not import sae_train.codes"),
        ("sae_train/sae/bad.py", "from . import base", "relative import"),
        ("sae_train/sae/bad.py", "from sae_train import __version__", "root package"),
        ("sae_train/sae/bad.py", "import transformers", "may not import transformers"),
        ("sae_train/train/bad.py", "from omegaconf import DictConfig", "may not import omegaconf"),
        ("sae_train/train/bad.py", "def f():\n    import sae_train.codes", "inside a function"),
        ("sae_train/train/bad.py", "def f():\n    import json", "inside a function"),
        ("sae_train/sae/bad.py", "def f():\n    import torch", "inside a function"),
        ("sae_train/manager.py", "import torch", "not in the layer table"),
        ("sae_train/sae/bad.py", "x = 1\n" * (MAX_LINES + 1), "lines, at most"),
    ],
)
def test_a_planted_violation_is_found(tmp_path, file, line, complaint):
    for folder in ("sae_train/train", "sae_train/harvest", "sae_train/shards", "sae_train/sae"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "__init__.py").write_text("")
    for folder in ("sae_train/activations", "kernels/sae_kernels"):
        (tmp_path / folder).mkdir(parents=True)
    assert violations(tmp_path) == []
    (tmp_path / file).write_text(line + "\n")
    (found,) = violations(tmp_path)
    assert complaint in found
    assert file in found


def test_a_planted_cycle_is_found(tmp_path):
    (tmp_path / "sae_train" / "sae").mkdir(parents=True)
    for one, other in (("a", "b"), ("b", "a")):
        (tmp_path / "sae_train" / "sae" / f"{one}.py").write_text(f"from sae_train.sae import {other}\n")
    (found,) = violations(tmp_path)
    assert found.startswith("import cycle")


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, sae_train; print('\\n'.join(sys.modules))"
    path = f"{ROOT}:{ROOT / 'kernels'}"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": path}
    )
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert "torch" in loaded
    heavy = {"hydra", "omegaconf", "transformers", "datasets", "huggingface_hub", "wandb", "tensorboard"}
    assert not loaded & (heavy | {"matplotlib", "jinja2", "rich"})
