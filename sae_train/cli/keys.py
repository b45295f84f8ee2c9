"""What `sae-train COMMAND --help` prints, written by the dataclasses themselves: key, default, docstring."""

import ast
import inspect
import textwrap
from collections.abc import Collection
from dataclasses import MISSING, fields, is_dataclass
from itertools import pairwise
from typing import Any

from sae_train.activations.base import ACTIVATIONS
from sae_train.cli.compose import WITHOUT_GROUPS, options
from sae_train.cli.plan import PlanOptions
from sae_train.config import (
    Config,
    EvalCommandConfig,
    ExportConfig,
    HarvestConfig,
    ImportConfig,
    PublishCommandConfig,
    register,
)
from sae_train.registry import Registry
from sae_train.sae.base import SAES
from sae_train.sae.linear import LinearConfig
from sae_train.sweep.options import SweepConfig

ROOTS: dict[str, type] = {
    "train": Config,
    "plan": Config,
    "sweep": Config,
    "harvest": HarvestConfig,
    "eval": EvalCommandConfig,
}
ROOTS |= {"export": ExportConfig, "import": ImportConfig, "publish": PublishCommandConfig}
GROUPS = (
    *("experiment", "model", "corpus", "source", "sae", "sae/activation", "optim", "kernels", "logger"),
    "launch",
)


def verb_help(verb: str) -> str:
    """Keys of a command with their defaults, and the options of every config group."""
    if verb == "status":
        usage = "usage: sae-train status run=DIR | dir=DIR\n\n"
        return usage + "  run, dir  a run folder, or one with several runs or jobs\n"
    choices = "" if verb in WITHOUT_GROUPS else "[experiment=NAME] [group=OPTION] "
    lines = [f"usage: sae-train {verb} {choices}[key=value ...] [--cfg job] [-m]", ""]
    if verb not in WITHOUT_GROUPS:
        register()
        lines += ["groups (key=OPTION picks a file; the keys below override single values):"]
        lines += [f"  {group + '=':<16} {', '.join(options(group))}" for group in GROUPS]
        lines.append("")
    if verb == "plan":
        lines += [*_keys(PlanOptions, ""), "", "and those of train:", ""]
    if verb == "sweep":
        lines[0] = (
            "usage: sae-train sweep [experiment=NAME] KEY=A,B,... [key=value ...] [sweep.key=value ...]"
        )
        lines += [
            *_keys(SweepConfig, "sweep."),
            "",
            "and those of train, of which some have several values:",
            "",
        ]
    lines += _keys(ROOTS[verb], "")
    return "\n".join(lines)


def _keys(cls: type, prefix: str, without: Collection[str] = ()) -> list[str]:
    docs = field_docs(cls)
    lines: list[str] = []
    nested: list[str] = []
    for f in (f for f in fields(cls) if f.name not in without):
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        key = prefix + f.name
        child = _nested(f.name, default)
        if child is not None:
            nested += ["", f"{key}: {summary(child)}", *_keys(child, key + ".")]
            if child is LinearConfig:
                nested += [*_of_options("sae", SAES, child), *_of_options("sae.activation", ACTIVATIONS)]
            continue
        if key == "sae.activation":
            continue  # its keys are those of its options
        lines.append(f"  {key} = {_shown(default)}")
        if f.name in docs:
            lines += textwrap.wrap(docs[f.name], 100, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return lines + nested


def _of_options(key: str, registry: Registry[Any], base: type | None = None) -> list[str]:
    """The keys that one option of a group has: all of them, or those that its base class has not."""
    known = {f.name for f in fields(base)} if base else set()
    lines: list[str] = []
    for name in registry:
        config = registry.config(name)
        if config is base:
            continue
        option = f"{key.replace('.', '/')}={name}"
        lines += ["", f"{key} with {option}: {summary(config)}", *_keys(config, key + ".", {*known, "name"})]
    return lines


def _nested(name: str, default: Any) -> type | None:
    if is_dataclass(default) and not isinstance(default, type):
        return type(default)
    if name == "sae" and default == "???":
        return LinearConfig
    return None


def _shown(default: Any) -> str:
    if default == "???":
        return "required"
    if default is None or isinstance(default, bool):
        return {None: "null", True: "true", False: "false"}[default]
    return str(default)


def summary(cls: type) -> str:
    """First sentence of a class docstring."""
    return " ".join((inspect.getdoc(cls) or "").split()).partition(". ")[0].removesuffix(".") + "."


def field_docs(cls: type) -> dict[str, str]:
    """The strings that stand under the fields of a dataclass, its bases' included."""
    out: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not is_dataclass(base):
            continue
        tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
        for item, following in pairwise(body):
            if (
                isinstance(item, ast.AnnAssign)
                and isinstance(item.target, ast.Name)
                and isinstance(following, ast.Expr)
                and isinstance(following.value, ast.Constant)
                and isinstance(following.value.value, str)
            ):
                out[item.target.id] = " ".join(following.value.value.split())
    return out
