"""The configuration of a run: typed, every key declared, registered with Hydra.

Each dataclass stands beside the class it configures; this module only puts them together and is,
with `cli`, the only one that knows Hydra. Commands turn the composed config into dataclasses
first; nothing below them sees a DictConfig.
"""

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sae_train.activations.base import ACTIVATIONS
from sae_train.checkpoint import CheckpointConfig
from sae_train.errors import InputError
from sae_train.evaluate import EvalConfig
from sae_train.harvest.corpus import CorpusConfig
from sae_train.harvest.filters import FilterConfig
from sae_train.harvest.model import ModelConfig
from sae_train.log import LoggerConfig
from sae_train.redact import refuse_secrets
from sae_train.registry import discover, nearest
from sae_train.sae.base import SAES, SAEConfig
from sae_train.shards.source import SourceConfig
from sae_train.train.kernels import KernelsConfig
from sae_train.train.members import MemberConfig
from sae_train.train.optim import OptimConfig
from sae_train.train.resume import classify, flatten
from sae_train.train.trainer import TrainConfig


@dataclass
class RunConfig:
    """Where a run lives and what seeds it."""

    dir: str | None = None
    """Run folder. Unset: runs/<name>-<hash of the configuration>: the same command continues the same run."""
    name: str = "sae"
    seed: int = 0
    """Seed of the weights' initialisation (rows have their own: source.seed, corpus.seed)."""
    threads: int | None = None
    """CPU threads of torch. Unset: torch's own choice. Bits depend on it; it is recorded."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9._-]+", self.name):
            raise InputError("run.name", self.name, "letters, digits, dots, dashes and underscores")
        check_seed("run.seed", self.seed)
        most = 4 * (os.cpu_count() or 1)
        if self.threads is not None and not 1 <= self.threads <= most:
            raise InputError("run.threads", self.threads, f"a whole number from 1 to {most} here, or null")
        if self.dir is not None and not self.dir.strip():
            raise InputError("run.dir", self.dir, "the name of a folder, or null")


def check_seed(key: str, seed: Any) -> None:
    """Raises InputError unless the seed is one that torch takes."""
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        raise InputError(key, seed, "a whole number from 0 to 2^63 - 1")


@dataclass
class Config:
    """Everything a run is a function of."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)
    source: SourceConfig = field(default_factory=SourceConfig)
    hook: Any = MISSING
    """Where activations are read: a name such as resid_post.12, or a list of names (one SAE each).
    auto is the only hook of a source that has one. Names joined by + are one row (a crosscoder)."""
    target: Any = None
    """Where what is reconstructed is read, if that is not the hook (a transcoder); a list for a list."""
    start: Any = None
    """A published SAE folder (RUN/saes/NAME) that training goes on from; a list for a list of hooks."""
    sae: SAEConfig = MISSING
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    saes: Any = None
    """Several SAEs on one harvest: name -> what differs from the run's hook, target, seed, sae, optim."""


@dataclass
class HarvestConfig(Config):
    """`harvest`: the same keys; writes shards instead of training on them."""

    out: str = MISSING
    """Folder that receives the shards."""


@dataclass
class EvalCommandConfig:
    """`eval`: judge what a run has published."""

    run: str = MISSING
    """Run folder (RUN) or a published SAE folder (RUN/saes/NAME)."""
    tokens: int | None = None
    """Held-out tokens for reconstruction metrics. Unset: as in the run's configuration."""
    ce_tokens: int | None = None
    """Held-out tokens for cross-entropy. Unset: as in the run's configuration."""
    trust_remote_code: bool = False
    """Run the model's own Python code, as the run did. Taken from here only, never from the run's files."""


def register() -> None:
    """Give Hydra a schema for every registry entry and every command."""
    store = ConfigStore.instance()
    store.store(name="train_schema", node=Config)
    store.store(name="harvest_schema", node=HarvestConfig)
    store.store(name="eval_schema", node=EvalCommandConfig)
    discover("sae_train.activations")
    discover("sae_train.sae")
    discover("sae_train.metrics")
    for name in SAES:
        store.store(group="sae", name=f"{name}_schema", node=SAES.config(name))
    for name in ACTIVATIONS:
        store.store(group="sae/activation", name=f"{name}_schema", node=ACTIVATIONS.config(name))


def to_config(composed: DictConfig) -> Any:
    """The dataclasses that a composed configuration describes; runs their checks.

    Raises:
        InputError: a required key is missing, a value holds a secret of the environment, or a check fails.
    """
    try:
        _refuse_added(composed, "")
        missing = OmegaConf.missing_keys(composed)
        if missing:
            key = sorted(missing)[0]
            raise InputError(key, "???", f"a value: say {key}=... on the command line")
        refuse_secrets(OmegaConf.to_container(composed, resolve=True))
        return OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        if isinstance(error.__cause__, InputError):
            raise error.__cause__ from None
        key = str(getattr(error, "full_key", None) or "configuration")
        raise InputError(key, "...", f"a value that can be used ({_first_line(error)})") from None


def _refuse_added(node: DictConfig, prefix: str) -> None:
    """Keys that `+key=value` put beside the declared ones: nothing would read them."""
    schema = OmegaConf.get_type(node)
    declared = {f.name for f in fields(schema)} if is_dataclass(schema) else None
    for key in map(str, node):
        if declared is not None and key not in declared:
            raise InputError(f"{prefix}{key}", node[key], nearest(key, sorted(declared)))
        if not OmegaConf.is_missing(node, key) and isinstance(node[key], DictConfig):
            _refuse_added(node[key], f"{prefix}{key}.")


def members(config: Config, composed: DictConfig) -> list[MemberConfig]:
    """The SAEs of a run: one per hook, or the named set in `saes`, each on top of the run's own recipe."""
    hooks = config.hook if isinstance(config.hook, list) else [config.hook]
    if not hooks:
        raise InputError("hook", config.hook, "at least one hook name such as resid_post.12")
    for hook in hooks:
        if not isinstance(hook, str) or not hook:
            raise InputError("hook", config.hook, "a hook name such as resid_post.12, or a list of them")
    if len(set(hooks)) < len(hooks):
        raise InputError("hook", config.hook, "each hook once")
    targets = _for_each(hooks, "target", config.target, "hook name")
    starts = _for_each(hooks, "start", config.start, "published SAE folder")
    if config.saes is not None and not isinstance(config.saes, dict):
        raise InputError(
            "saes", config.saes, "names with what differs: saes={a: {sae: {activation: {k: 16}}}, b: {}}"
        )
    if not config.saes:
        names = ["main"] if len(hooks) == 1 else [re.sub(r"[^A-Za-z0-9._-]", "_", hook) for hook in hooks]
        return [
            MemberConfig(name, hook, config.run.seed, config.sae, config.optim, target, start)
            for name, hook, target, start in zip(names, hooks, targets, starts, strict=True)
        ]
    out = []
    for name, differs in config.saes.items():
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", name):
            raise InputError("saes", name, "member names of letters, digits, dots, dashes and underscores")
        if differs is not None and not isinstance(differs, dict):
            raise InputError(f"saes.{name}", differs, "what differs: {sae: {activation: {k: 16}}}, or {}")
        base = OmegaConf.create(
            {"hook": hooks[0], "target": targets[0], "start": starts[0], "seed": config.run.seed}
            | {"sae": composed.sae, "optim": composed.optim}
        )
        OmegaConf.set_struct(base, True)
        try:
            merged = OmegaConf.merge(base, differs or {})
            typed = OmegaConf.to_object(merged)
        except OmegaConfBaseException as error:
            if isinstance(error.__cause__, InputError):
                raise error.__cause__ from None
            raise InputError(
                f"saes.{name}",
                differs,
                f"keys of hook, target, start, seed, sae, optim ({_first_line(error)})",
            ) from None
        assert isinstance(typed, dict)
        check_seed(f"saes.{name}.seed", typed["seed"])
        if not isinstance(typed["hook"], str):
            raise InputError(f"saes.{name}.hook", typed["hook"], "one hook name such as resid_post.12")
        _for_each(hooks[:1], f"saes.{name}.target", typed["target"], "hook name")
        _for_each(hooks[:1], f"saes.{name}.start", typed["start"], "published SAE folder")
        out.append(
            MemberConfig(
                name=name,
                hook=typed["hook"],
                seed=typed["seed"],
                sae=typed["sae"],
                optim=typed["optim"],
                target=typed["target"],
                start=typed["start"],
            )
        )
    return out


def _for_each(hooks: list[str], key: str, value: Any, wanted: str) -> list[str | None]:
    """A value of each hook, given one for all or a list.

    Raises:
        InputError: another number of them than there are hooks, or something that is no string.
    """
    values: list[str | None] = value if isinstance(value, list) else [value] * len(hooks)
    if len(values) != len(hooks) or not all(v is None or (isinstance(v, str) and v) for v in values):
        raise InputError(key, value, f"one {wanted} for each of {', '.join(hooks)}, or null")
    return values


def as_tree(config: Any) -> dict[str, Any]:
    """Plain JSON-able values of a configuration."""
    tree: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return tree


def run_folder(config: Config) -> Path:
    """run.dir, or a folder named by what the run is a function of."""
    if config.run.dir is not None:
        return Path(config.run.dir).expanduser()
    tree = as_tree(config)
    decisive = {key: value for key, value in flatten(tree).items() if classify(key) == "refused"}
    digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:8]
    return Path("runs") / f"{config.run.name}-{digest}"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
