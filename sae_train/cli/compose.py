"""Composing a command's configuration with Hydra, and saying in one line what is wrong with it."""

import copy
import hashlib
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from importlib import resources
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sae_train.activations.base import ACTIVATIONS
from sae_train.cli.multirun import MULTIRUN
from sae_train.config import VALUE_KINDS, register
from sae_train.errors import InputError, NumericsError, StoppedEarly
from sae_train.files import CorruptFile
from sae_train.registry import nearest
from sae_train.sae.base import SAES
from sae_train.sweep.axes import ALIASES
from sae_train.train.resume import flatten

CONFIG_MODULE = "sae_train.conf"
WITHOUT_GROUPS = ("eval", "export", "import", "publish")
"""Verbs whose keys are few and stand alone: none of them picks a file of conf/."""
STRANGE = (ValueError, TypeError, AttributeError, LookupError, AssertionError, RecursionError)
"""What Hydra and its parser raise about values that they did not think of, such as sae=1."""


def compose(verb: str, overrides: list[str]) -> DictConfig:
    """The configuration of a command.

    Raises:
        InputError: an override is malformed, names an unknown key or option, or has the wrong type.
    """
    register()
    GlobalHydra.instance().clear()
    if verb not in WITHOUT_GROUPS:
        overrides = with_files(overrides)
    try:
        if verb not in WITHOUT_GROUPS:
            return _composed(verb, overrides)
        with hydra.initialize_config_module(CONFIG_MODULE, version_base="1.3"):
            # Hydra would take sae=NAME and model=NAME for the groups of those names, which train has.
            config = hydra.compose(config_name=verb)
            parsed = OverridesParser.create().parse_overrides(overrides)
            for several in (one for one in parsed if one.is_sweep_override()):
                key = several.key_or_group
                raise InputError(
                    key, several.get_value_string(), f"one value; several are a list: {key}=[A,B]"
                )
            ConfigLoaderImpl._apply_overrides_to_config(parsed, config)
            return config
    except InputError:
        raise
    except (HydraException, OmegaConfBaseException, *STRANGE) as error:
        raise _explain(verb, overrides, error) from None


def _composed(verb: str, overrides: list[str]) -> DictConfig:
    """As Hydra does it, and with its errors."""
    with hydra.initialize_config_module(CONFIG_MODULE, version_base="1.3"):
        return hydra.compose(config_name=verb, overrides=overrides)


class Composer:
    """Compositions of one command that differ in few values: files are read once for each choice of them."""

    def __init__(self, verb: str) -> None:
        self.verb = verb
        self._bases: dict[tuple[str, ...], DictConfig] = {}

    def __call__(self, overrides: Sequence[str]) -> DictConfig:
        """As `compose`, which also says what is wrong."""
        files = tuple(one for one in overrides if is_group(one.partition("=")[0]))
        if files not in self._bases:
            try:
                self._bases[files] = compose(self.verb, list(files))
            except InputError:
                return compose(self.verb, list(overrides))  # says it of the whole command
        config = copy.deepcopy(self._bases[files])
        values = [one for one in overrides if one not in files]
        try:
            parsed = OverridesParser.create().parse_overrides(values)
            ConfigLoaderImpl._apply_overrides_to_config(parsed, config)
        except (HydraException, OmegaConfBaseException, *STRANGE):
            return compose(self.verb, list(overrides))
        return config


def is_group(key: str) -> bool:
    """Whether an argument's key picks a file of conf/ instead of setting a value."""
    folder = resources.files(CONFIG_MODULE).joinpath(*key.lstrip("~+").partition("@")[0].split("/"))
    return folder.is_dir()


def with_files(overrides: Sequence[str]) -> list[str]:
    """`experiment=PATH/FILE.yaml` made into an experiment that Hydra knows: a file from anywhere may be one.

    Raises:
        InputError: such a file cannot be read.
    """
    return [_with_file(one) if one.startswith("experiment=") else one for one in overrides]


def _with_file(override: str) -> str:
    try:
        text = str(OverridesParser.create().parse_override(override).value())
    except (HydraException, *STRANGE):
        return override  # composing says what is wrong with it
    if not text.endswith((".yaml", ".yml")):
        return override
    wanted = (
        f"one of {', '.join(options('experiment'))}, or a file such as sae-train sweep writes as best.yaml"
    )
    try:
        content = Path(text).expanduser().read_bytes()
        told: Any = OmegaConf.create(content.decode())
        mapping = isinstance(yaml.safe_load(content), dict)
    except (OSError, ValueError, OmegaConfBaseException, yaml.YAMLError) as error:
        raise InputError("experiment", text, f"{wanted} ({str(error).splitlines()[0]})") from None
    if not mapping:
        raise InputError("experiment", text, f"{wanted}, which has keys with values")
    name = f"file-{hashlib.sha256(content).hexdigest()[:16]}"
    ConfigStore.instance().store(group="experiment", name=name, node=told, package="_global_")
    return f"experiment={name}"


def run_composed(verb: str, args: list[str], task: Callable[[DictConfig], int]) -> int:
    """Run a command on its composed configuration.

    Plain `key=value` arguments compose here. Anything with a flag (`-m` for sweeps, `--cfg job`,
    `--info`, `--config-dir`) goes through Hydra's own main, which knows them all.
    """
    flags = [arg for arg in args if arg.startswith("-")]
    if not flags:
        return task(compose(verb, args))
    if not {*MULTIRUN, "--config-dir", "-cd"} & set(flags):
        compose(verb, [arg for arg in args if re.match(r"[~+]*[A-Za-z_./@:]+=", arg)])
    register()
    GlobalHydra.instance().clear()
    codes: list[int] = []
    failures: list[BaseException] = []

    def job(config: DictConfig) -> None:
        try:
            codes.append(task(config))
        except (InputError, NumericsError, StoppedEarly, CorruptFile) as error:
            # Hydra would print a traceback and exit 1.
            failures.append(error)

    saved = sys.argv
    sys.argv = [f"sae-train {verb}", *with_files(args)]
    try:
        hydra.main(config_path=f"pkg://{CONFIG_MODULE}", config_name=verb, version_base="1.3")(job)()
    finally:
        sys.argv = saved
    if failures:
        raise failures[0]
    return max(codes, default=0)


def options(group: str) -> list[str]:
    """Names that a config group offers, for example the experiments."""
    folder = resources.files(CONFIG_MODULE).joinpath(*group.split("/"))
    return sorted(f.name[:-5] for f in folder.iterdir() if f.name.endswith(".yaml"))


def options_of(key: str) -> list[str]:
    """Options of the group that a dotted key spells, or none where it is no group."""
    folder = resources.files(CONFIG_MODULE).joinpath(*key.split("."))
    return options(key.replace(".", "/")) if folder.is_dir() else []


def _explain(verb: str, overrides: list[str], error: Exception) -> InputError:
    causes = [error, *filter(None, (error.__cause__, error.__context__))]
    lines = [line.strip() for cause in causes for line in str(cause).splitlines() if line.strip()]
    text = " ".join(lines)
    for override in reversed(overrides):  # of two for one key, the last is the one that counts
        try:
            parsed = OverridesParser.create().parse_override(override)
        except (HydraException, *STRANGE):
            return InputError(
                "override", override, "key=value (quote values that hold spaces, commas or braces)"
            )
        if parsed.is_delete():
            return InputError("override", override, "key=value: keys cannot be deleted")
        group = parsed.key_or_group
        if parsed.is_sweep_override():
            told = parsed.get_value_string()
            return InputError(group, told, f"one value, or a list: [{told}]; sae-train sweep takes several")
        key, value = group.replace("/", "."), str(parsed.value())
        if f"Could not find '{group}/{value}'" in text:
            return InputError(group, value, nearest(value, options(group)))
        full_key = re.search(r"full_key: (\S+)", text)
        named = (full_key and full_key.group(1) == key) or f"override {override}" in text
        if named or f"'{key}'" in text or f"'{group}'" in text:
            files = [one for one in overrides if is_group(one.partition("=")[0])]
            known = sorted({*_known_keys(verb, []), *_known_keys(verb, files)})
            if key not in known and not any(k.startswith(key + ".") for k in known):
                full = ALIASES.get(key.rpartition(".")[2]) if verb not in WITHOUT_GROUPS else None
                if full is not None:
                    return InputError(key, value, f"{full}={value}; short names are for grid and sweep")
                hint = re.search(r"\(did you mean (.*)\?\)", nearest(key, known))
                told = f"did you mean {hint.group(1)}?" if hint else f"sae-train {verb} --help lists them"
                return InputError(key, value, f"a known key; {told}")
            if "/" not in group and value in options_of(key):
                return InputError(
                    key, value, f"{key.replace('.', '/')}={value}, with a slash: it picks a file"
                )
            return InputError(key, value, _expected(text) or str(causes[-1]).splitlines()[0].rstrip("."))
    return InputError("configuration", " ".join(overrides), lines[0] if lines else type(error).__name__)


def _expected(text: str) -> str | None:
    """What OmegaConf says it could not do, as what would have been accepted."""
    if strange := re.search(r"Key '\w+' not in '(\w+)'", text):
        for registry in (ACTIVATIONS, SAES):
            for config, name in ((registry.config(name), name) for name in registry):
                if config.__name__ == strange.group(1):
                    return f"a key that {name} has: {', '.join(f.name for f in fields(config))}"
    found = re.search(r"could not be converted to (\w+)", text)
    if several := re.search(r"Cannot convert '(list|dict)' to string", text):
        return f"one text, not a {several.group(1)}"
    if found is None:
        return "a list: [a,b]" if "is not a ListConfig" in text else None
    return VALUE_KINDS.get(found.group(1), found.group(1))


def _known_keys(verb: str, files: list[str]) -> list[str]:
    """Keys of a command, with those of the files that its arguments pick."""
    try:
        composed = _composed(verb, files)
    except (HydraException, OmegaConfBaseException, *STRANGE):
        composed = _composed(verb, [])
    tree = OmegaConf.to_container(composed, throw_on_missing=False)
    assert isinstance(tree, dict)
    groups = ["experiment", "sae", "sae.activation", "model", "corpus", "source", "optim", "logger"]
    known = flatten({str(k): v for k, v in tree.items()})
    return sorted({*known, *(groups if verb not in WITHOUT_GROUPS else [])})
