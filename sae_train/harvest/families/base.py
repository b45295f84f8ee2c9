"""A family says in which module, and on which side of it, each named site of a layer lies.

The sites follow one rule, which the tests check for every family by arithmetic on a real forward:

    resid_mid  = resid_pre + attn_out        resid_post = resid_mid + mlp_out

so `attn_out` and `mlp_out` are what is *added to the residual stream*. Where a family normalises a
sublayer's output before adding it (gemma2, gemma3, olmo2), they are the outputs of that norm.
A family whose arithmetic differs (parallel residual, post-norm encoders) says so in its file.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from torch import nn

SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_in", "mlp_out")
"""Named sites inside a layer. `mlp_in` is the input of the MLP module: after the norm where there is one."""

LOG = logging.getLogger("sae_train.harvest")


def nothing_missing(config: Any) -> dict[str, str]:
    return {}


@dataclass(frozen=True)
class Family:
    """The layout of one kind of model.

    Attributes:
        model_types: the `config.model_type`s that have this layout.
        layers: path of the list of layers below the base model, for example "layers" or "encoder.layer".
        sites: site -> (module path below the layer, "" for the layer itself; side "in" or "out").
        missing: config -> {site: why a model with this config does not have it}.
    """

    model_types: tuple[str, ...]
    layers: str
    sites: Mapping[str, tuple[str, str]]
    missing: Callable[[Any], dict[str, str]] = field(default=nothing_missing)

    def __post_init__(self) -> None:
        assert set(self.sites) <= set(SITES), f"unknown sites {set(self.sites) - set(SITES)}"
        assert all(side in ("in", "out") for _, side in self.sites.values())

    def layers_path(self, model: nn.Module) -> str:
        """The full path of the layer list in this model, with or without a language-model head around it."""
        prefixes = (
            "",
            f"{getattr(model, 'base_model_prefix', '')}.",
            "language_model.",
            "model.language_model.",
        )
        lists = {name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
        for prefix in prefixes:
            if prefix + self.layers in lists:
                return prefix + self.layers
        raise AssertionError(f"no {self.layers!r} in a {type(model).__name__}: the family's layout is wrong")


FAMILIES: dict[str, Family] = {}


def register(family: Family) -> Family:
    for model_type in family.model_types:
        if model_type in FAMILIES:
            raise ValueError(f"model type {model_type!r} is registered twice")
        FAMILIES[model_type] = family
    return family


def family_of(model: nn.Module) -> Family | None:
    """The family of a model, by its model type; for an unknown type a guess at its layers, said once.

    The guess supports resid_pre and resid_post only: what comes into and goes out of a layer. None if there
    is nothing to guess from.
    """
    model_type = getattr(model.config, "model_type", "")
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    layers = _guessed(model)
    if layers is None:
        return None
    _say_once(model_type, layers)
    sites = {"resid_pre": ("", "in"), "resid_post": ("", "out")}
    return Family(model_types=(model_type,), layers=layers, sites=sites)


def _guessed(model: nn.Module) -> str | None:
    """The list of modules that is as long as the text model is deep, or else the longest. None if there is
    none, or several beside each other: these are then parts of layers (XLM's attentions, its norms ...)."""
    lists = {name: len(module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    config: Any = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    depth = getattr(text, "num_hidden_layers", None)
    length = depth if depth in lists.values() else max(lists.values(), default=0)
    names = [name for name in lists if lists[name] == length]
    of_text = [name for name in names if "language_model" in name.split(".")] or names
    outermost = [name for name in of_text if not any(name.startswith(f"{other}.") for other in of_text)]
    beside = [name for name in outermost[1:] if name.rpartition(".")[0] == outermost[0].rpartition(".")[0]]
    return None if not outermost or beside else outermost[0]


@cache
def _say_once(model_type: str, layers: str) -> None:
    LOG.warning(
        "model type %r is not a known family: taking %r as its layers; of the short hook names, "
        "resid_pre and resid_post are available",
        model_type,
        layers,
    )
