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
from functools import cache
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
from sae_train.launch.config import LaunchConfig
from sae_train.log import LoggerConfig
from sae_train.ranks import MeshConfig
from sae_train.redact import refuse_secrets
from sae_train.registry import discover, nearest
from sae_train.sae.base import SAES, SAEConfig
from sae_train.shards.source import SourceConfig
from sae_train.train.kernels import KernelsConfig
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
    mesh: MeshConfig = field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    saes: Any = None
    """Several SAEs on one harvest: name -> what differs from the run's hook, target, seed, sae, optim."""
    grid: Any = None
    """An SAE for every combination of values, on one harvest: grid={k: [16, 32], seed: [0, 1]}. Keys are k,
    target_l0, activation, architecture, d_sae, expansion, lr, lr_base, optimizer, seed, hook, or a full name
    such as sae.auxk_coefficient."""


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


EXPORT_DTYPES = ("float32", "bfloat16")


@dataclass
class ExportConfig:
    """`export`: write a published SAE in another library's format, and prove that it does the same."""

    run: str = MISSING
    """Run folder (RUN), or a published SAE folder (RUN/saes/NAME)."""
    format: str = MISSING
    """saelens, sparsify, merged (both in one folder), dictionary_learning, openmoss, gemma_scope, or
    circuit_tracer (a run's transcoders of all layers)."""
    out: str = MISSING
    """Folder to make; nothing may be there."""
    sae: str | None = None
    """Which SAE of the run, if it has several."""
    model: str | None = None
    """Hub id of the model to write, where the run's own name for it is a folder."""
    tokens: int = 2_048
    """Held-out rows of the run to compare on. 0, or no run: random rows, and no model is loaded."""
    calibrate: bool = False
    """Of an SAE trained with BatchTopK: find the threshold anew, on held-out rows, where as many latents are
    active then as it was trained for."""
    dtype: str = "float32"
    """float32 or bfloat16. In bfloat16 thresholds and biases are rounded too, and so are codes."""
    trust_remote_code: bool = False
    """Run the model's own Python code, as the run did. Taken from here only, never from the run's files."""

    def __post_init__(self) -> None:
        if self.tokens < 0:
            raise InputError("tokens", self.tokens, "a whole number of at least 0")
        if self.dtype not in EXPORT_DTYPES:
            raise InputError("dtype", self.dtype, " or ".join(EXPORT_DTYPES))


@dataclass
class ImportConfig:
    """`import`: make another library's SAE one of ours."""

    path: str = MISSING
    """Folder, or hf://USER/REPO/FOLDER@REVISION."""
    out: str = MISSING
    """Folder to make; RUN/saes/NAME lets `eval` judge it on that run's held-out rows."""
    format: str | None = None
    """As in `export`. Unset: told by the names of the files."""
    hook: str | None = None
    """Hook that it reads, where the files do not say or say it otherwise."""
    target: str | None = None
    """Hook that a transcoder reconstructs."""
    model: str | None = None
    """Model that it was trained on."""


@dataclass
class PublishCommandConfig:
    """`publish`: put the SAEs of finished runs on the Hugging Face hub, in one commit, and read them back."""

    run: Any = MISSING
    """Run folder, or several for one repository: run=[A,B]."""
    repo: str = MISSING
    """USER/NAME. Made if it is not there; one that holds other files is refused."""
    sae: str | None = None
    """One SAE of the run, by its name. Unset: all of them."""
    formats: list[str] | None = None
    """Forms of each SAE: own, saelens, sparsify and the others of `sae-train export`. Unset: own, and saelens
    where that can hold the SAE."""
    private: bool = True
    """Only for you. false is for everybody. A repository that is there has to be so already."""
    license: str | None = None
    """The hub's name of a licence, such as apache-2.0. Unset: the card says that none was stated."""
    base_model: str | None = None
    """USER/NAME of the model on the hub, if the run read a copy in a folder."""
    datasets: list[str] | None = None
    """USER/NAME of data sets on the hub. Unset: those that the runs name."""
    replace: bool = False
    """Delete what is in the repository and not in this publication."""
    dry_run: bool = False
    """List exactly what would go, and talk to nobody."""

    def __post_init__(self) -> None:
        if self.license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]{0,60}", self.license):
            raise InputError("license", self.license, "a name such as apache-2.0, mit or cc-by-4.0")


def register() -> None:
    """Give Hydra a schema for every registry entry and every command."""
    for package in ("activations", "sae", "metrics", "launch"):
        discover(f"sae_train.{package}")
    _store(tuple(SAES), tuple(ACTIVATIONS))


@cache
def _store(saes: tuple[str, ...], activations: tuple[str, ...]) -> None:
    """Once for each set of names: it takes a tenth of a second, and a sweep composes hundreds of times."""
    store = ConfigStore.instance()
    store.store(name="train_schema", node=Config)
    store.store(name="harvest_schema", node=HarvestConfig)
    store.store(name="eval_schema", node=EvalCommandConfig)
    store.store(name="publish_schema", node=PublishCommandConfig)
    store.store(name="export_schema", node=ExportConfig)
    store.store(name="import_schema", node=ImportConfig)
    for name in saes:
        store.store(group="sae", name=f"{name}_schema", node=SAES.config(name))
    for name in activations:
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
        config = OmegaConf.to_object(composed)
        if isinstance(config, Config):
            config.train.settle()
        return config
    except OmegaConfBaseException as error:
        if isinstance(error.__cause__, InputError):
            raise error.__cause__ from None
        key = str(getattr(error, "full_key", None) or "configuration")
        raise InputError(key, "...", f"a value that can be used ({first_line(error)})") from None


def _refuse_added(node: DictConfig, prefix: str) -> None:
    """Keys that `+key=value` put beside the declared ones: nothing would read them."""
    schema = OmegaConf.get_type(node)
    declared = {f.name for f in fields(schema)} if is_dataclass(schema) else None
    for key in map(str, node):
        if declared is not None and key not in declared:
            raise InputError(f"{prefix}{key}", node[key], nearest(key, sorted(declared)))
        if not OmegaConf.is_missing(node, key) and isinstance(node[key], DictConfig):
            _refuse_added(node[key], f"{prefix}{key}.")


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


VALUE_KINDS = {"Integer": "a whole number", "Float": "a number", "Boolean": "true or false"}
"""What OmegaConf calls types of values -> what people do."""


def first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
