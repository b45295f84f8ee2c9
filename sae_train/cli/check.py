"""What can be known to be wrong with a run before its weights, its text or its rows are loaded."""

import os
from collections.abc import Mapping

import torch

from sae_train.config import Config
from sae_train.errors import InputError
from sae_train.evaluate import build_metrics
from sae_train.sae.base import SAE, SAES
from sae_train.sae.io import load_sae
from sae_train.sae.start import check_start
from sae_train.split import Split
from sae_train.train.members import MemberConfig, check_optimizer


def check(config: Config) -> None:
    """Keys that do not go together."""
    if config.train.batch_tokens % config.source.lanes:
        raise InputError(
            "train.batch_tokens",
            config.train.batch_tokens,
            f"a multiple of source.lanes={config.source.lanes}",
        )
    if config.mesh.harvest and config.source.name != "stream":
        wanted = f"0 with source={config.source.name}: there is no model to harvest from"
        raise InputError("mesh.harvest", config.mesh.harvest, wanted)
    parts = config.mesh.data * config.train.accumulate
    if config.train.batch_tokens % parts:
        key = "mesh.data x train.accumulate" if config.train.accumulate > 1 else "mesh.data"
        raise InputError(key, parts, f"a divisor of train.batch_tokens={config.train.batch_tokens}")
    divides = config.mesh.data * config.mesh.feature > 1
    if divides and config.train.resample_every:
        raise InputError(
            "train.resample_every", config.train.resample_every, "0 with mesh.data or mesh.feature"
        )
    if (divides or config.mesh.harvest) and config.train.loss != "rows":
        raise InputError("train.loss", config.train.loss, "rows with mesh.data, mesh.feature or mesh.harvest")
    if config.model.device_map is not None:
        beside = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
        if beside > 1:
            wanted = f"null, or one process on each machine; there are {beside} here, each would take all"
            raise InputError("model.device_map", config.model.device_map, wanted)
        if config.train.loss != "rows":
            raise InputError("train.loss", config.train.loss, "rows with model.device_map")
    build_metrics(config.eval.metrics, 1, 1)
    if config.train.loss != "rows":
        length, count = (
            config.corpus.context_length,
            config.train.batch_tokens // config.corpus.context_length,
        )
        if config.train.batch_tokens % length or count % config.train.accumulate:
            wanted = f"a multiple of corpus.context_length={length} with train.loss={config.train.loss}"
            if config.train.accumulate > 1:
                wanted += f", and of train.accumulate={config.train.accumulate} times that"
            raise InputError("train.batch_tokens", config.train.batch_tokens, wanted)


def check_rows(config: Config, most_rows: int | None) -> None:
    """A run that would go through all of its rows and then fail says so before it begins."""
    if most_rows is None or config.corpus.allow_short:
        return
    if config.train.steps * config.train.batch_tokens > most_rows:
        wanted = (
            f"at most {most_rows}, the rows that source={config.source.name} has; with more passes "
            "(source.epochs) it has more, and corpus.allow_short=true ends with the rows"
        )
        raise InputError("train.tokens", config.train.tokens, wanted)


def check_widths(wanted: list[MemberConfig], dims: Mapping[str, int], split: Split) -> None:
    """Build every member without memory: what does not fit its hook's width says so before weights load."""
    for member in wanted:
        member.optim.check_library()
        check_optimizer(member.optim, split)
        _built(member, dims).split_(split)


def load_starts(wanted: list[MemberConfig]) -> dict[str, SAE]:
    """The SAEs that members start from, by path, without memory. Raises InputError if one cannot be read."""
    found: dict[str, SAE] = {}
    for path in dict.fromkeys(member.start for member in wanted if member.start is not None):
        try:
            found[path] = load_sae(path).to("meta")
        except InputError as error:
            field = "start" if error.field == "path" else error.field
            raise InputError(field, error.value, error.accepted) from None
    return found


def check_starts(wanted: list[MemberConfig], dims: Mapping[str, int], starts: Mapping[str, SAE]) -> None:
    """Raises InputError if an SAE to start from is of another kind or shape than the one that is trained."""
    for member in wanted:
        if member.start is not None and member.start in starts:
            check_start(_built(member, dims), starts[member.start], member.start)


def _built(member: MemberConfig, dims: Mapping[str, int]) -> SAE:
    """The SAE of a member, without memory."""
    only = next(iter(dims.values()))  # what `auto` means
    widths = member.places.widths({hook: dims.get(hook, only) for hook in member.places.hooks})
    with torch.device("meta"):
        return SAES.build(member.sae, widths)


def hooks_of(wanted: list[MemberConfig]) -> list[str]:
    """Every hook that a member reads or reconstructs, as the user spelt it, once."""
    return list(dict.fromkeys(hook for member in wanted for hook in member.places.hooks))
