"""Hook names: what a user calls a place in the model, and the module and side that it is.

Three spellings name the same place: the short one (`resid_post.12`), TransformerLens's
(`blocks.12.hook_resid_post`) and the path of a module (`model.layers.12`, with ":in" for its input).
The first two give the short name as key, so rows, checkpoints and exports agree on it. With "@other" after
it, each names that place in the run's second model.

Names are checked on a model without weights (`resolve_from_config`): a wrong one costs a second, not a
download.
"""

import difflib
import re
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from sae_train.errors import InputError
from sae_train.harvest.families import SITES, Family, family_of
from sae_train.harvest.kinds import skeleton

TL_NAMES = {
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
    "attn_out": "hook_attn_out",
    "mlp_in": "mlp.hook_in",
    "mlp_out": "hook_mlp_out",
}
"""Site -> TransformerLens's name inside `blocks.L`, as exported SAEs carry it."""

OTHER = "@other"
"""What follows the name of a hook of the second model, `model.other`."""

TL_SPELLINGS = {tl: site for site, tl in TL_NAMES.items()} | {
    "hook_out": "resid_post",
    "mlp.hook_out": "mlp_out",
}
"""TransformerLens's names and those of its bridge (3.x and later) -> site."""


@dataclass(frozen=True)
class Site:
    """One place in a model.

    Attributes:
        name: as the user wrote it.
        key: the name under which its rows travel: "resid_post.12", "embed", or the module path; with "@other"
            after it in the second model.
        path: the module, for `model.get_submodule`.
        side: "in" for the module's input, "out" for its output.
        other: whether it is a place in the second model.
    """

    name: str
    key: str
    path: str
    side: str
    other: bool = False

    @property
    def tl_name(self) -> str | None:
        """TransformerLens's name ("blocks.12.hook_resid_post"), or None for a plain module path."""
        key = self.key.removesuffix(OTHER)
        if key == "embed":
            return "hook_embed"
        site, _, layer = key.rpartition(".")
        return f"blocks.{layer}.{TL_NAMES[site]}" if site in TL_NAMES and layer.isdigit() else None

    @property
    def layer(self) -> int | None:
        """The layer of a short name (or the first number in a module path), None where there is none."""
        number = re.search(r"\.(\d+)(\.|:|$)", self.key.removesuffix(OTHER))
        return int(number[1]) if number else None


def resolve(name: str, model: nn.Module) -> Site:
    """The place that a name means in this model; weights are not looked at. A name that ends in "@other" is
    one of the second model, which is then the one to give.

    Raises:
        InputError: no such site, layer or module (the message has the five nearest names), or a site that
        this
            model does not have (the message says why).
    """
    text = str(name).strip()
    if is_other(text):
        try:
            site = resolve(text.removesuffix(OTHER), model)
        except InputError as error:
            raise InputError("hook", name, f"in model.other, {error.accepted}") from None
        return replace(site, name=name, key=site.key + OTHER, other=True)
    family = family_of(model)
    if text in ("embed", "hook_embed"):
        return Site(name, "embed", _embedding_path(model), "out")
    short = _short_name(text)
    if short is not None and family is not None:
        return _layer_site(name, *short, family, model)
    path, side = text, "out"
    if text.endswith((":in", ":out")):
        path, _, side = text.rpartition(":")
    if path and path in dict(model.named_modules()):
        return Site(name, path if side == "out" else f"{path}:in", path, side)
    raise InputError(
        "hook", name, f"a hook of this model, such as {', '.join(_nearest(text, family, model))}"
    )


def is_other(name: str) -> bool:
    """Whether the name of a hook says that it is one of the second model."""
    return name.strip().endswith(OTHER)


def resolve_from_config(name: str, hf_config: Any) -> Site:
    """`resolve` on a model that has no weights yet. Raises InputError as `resolve` does."""
    return resolve(name, skeleton(hf_config))


def _short_name(text: str) -> tuple[str, int] | None:
    """(site, layer) of `resid_post.12` or `blocks.12.hook_resid_post`."""
    tl = re.fullmatch(r"blocks\.(\d+)\.([a-z_.]+)", text)
    if tl and tl[2] in TL_SPELLINGS:
        return TL_SPELLINGS[tl[2]], int(tl[1])
    short = re.fullmatch(r"([a-z_]+)\.(\d+)", text)
    if short and short[1] in SITES:
        return short[1], int(short[2])
    return None


def _layer_site(name: str, site: str, layer: int, family: Family, model: nn.Module) -> Site:
    layers = family.layers_path(model)
    count = len(model.get_submodule(layers))  # type: ignore[arg-type]
    config: Any = model.config
    missing = family.missing(config)
    if site in missing or site not in family.sites:
        reason = missing.get(site, f"model type {config.model_type!r} is not a family that knows it")
        have = [s for s in SITES if s in family.sites and s not in missing]
        raise InputError("hook", name, f"one of {', '.join(f'{s}.{layer}' for s in have)}: {reason}")
    if not layer < count:
        nearest = ", ".join(f"{site}.{i}" for i in reversed(range(max(0, count - 5), count)))
        raise InputError("hook", name, f"a layer from 0 to {count - 1}; the nearest are {nearest}")
    relative, side = family.sites[site]
    path = f"{layers}.{layer}" + (f".{relative}" if relative else "")
    return Site(name, f"{site}.{layer}", path, side)


def _embedding_path(model: nn.Module) -> str:
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    return next(path for path, module in model.named_modules() if module is embedding)


def _nearest(text: str, family: Family | None, model: nn.Module) -> list[str]:
    """The five accepted names most like `text`."""
    known = ["embed"]
    if family is not None:
        count = len(model.get_submodule(family.layers_path(model)))  # type: ignore[arg-type]
        sites = [s for s in SITES if s in family.sites and s not in family.missing(model.config)]
        known += [f"{site}.{layer}" for site in sites for layer in range(count)]
    known += [path for path, _ in model.named_modules() if path]
    return difflib.get_close_matches(text, known, n=5, cutoff=0.0)
