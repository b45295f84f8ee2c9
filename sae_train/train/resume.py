"""May a run that was started with one configuration continue with another? Field by field.

Allowed fields change what is seen or kept, never a bit of the result. Warned fields may change the
last bits of floating-point sums; the run goes on and says so. Everything else changes what is being
trained, so the run is refused and asked for a folder of its own.
"""

import logging
import re
from collections.abc import Mapping
from typing import Any

from sae_train.errors import InputError

logger = logging.getLogger("sae_train.train")

ALLOWED = (
    "run.dir",
    "run.name",
    "logger",
    "launch",
    "checkpoint",
    "eval",
    "source.prefetch",
    # Processes share members and lanes: no bit depends on how many there are.
    "mesh.timeout_s",
    "mesh.harvest",
    # What a run is told to change when its data ends early; rows that it has seen stay the same.
    "corpus.allow_short",
    "corpus.epochs",
    "corpus.attempts",
    "corpus.retry_wait_s",
    "corpus.timeout_s",
    "source.epochs",
)
WARNED = (
    "run.threads",
    "model.device",
    "model.device_map",
    "model.attn_implementation",
    "kernels",
    "mesh.data",
    "mesh.feature",
)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings to dotted keys: {"a": {"b": 1}} -> {"a.b": 1}. Empty mappings and lists are leaves."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            out |= flatten(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return out


def classify(key: str) -> str:
    """allowed, warned or refused."""
    for name, prefixes in (("allowed", ALLOWED), ("warned", WARNED)):
        if any(key == p or key.startswith(p + ".") for p in prefixes):
            return name
    return "refused"


def check_resume(
    old: Mapping[str, Any], new: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
) -> None:
    """Compare the configuration a run was started with to the one it is asked to continue with.

    Args:
        old, new: the two, as trees.
        defaults: this release's; a key that the run's own release did not know had that value.

    Raises:
        InputError: a field that changes what is trained differs; names it with both values.
    """
    was, now, default = flatten(old), flatten(new), flatten(defaults or {})
    # A member repeats what the run says; the run's own key is the one the user knows.
    for key in sorted(was.keys() | now.keys(), key=lambda key: (key.startswith("members."), key)):
        own = re.sub(r"^members\.[^.]+\.", "", key)
        before, after = was.get(key, default.get(own)), now.get(key)
        if before == after:
            continue
        kind = classify(key)
        if kind == "refused":
            raise InputError(
                key, after, f"{before!r}, with which this run was started (or another run.dir for a new run)"
            )
        if kind == "warned":
            logger.warning(
                "%s was %r and is now %r: results may differ in their last bits", key, before, after
            )


def check_fingerprint(old: Mapping[str, str], new: Mapping[str, str]) -> None:
    """Refuse to continue on other data or another model than the run was started with.

    Raises:
        InputError: naming the part that changed.
    """
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            raise InputError(
                key,
                new.get(key),
                f"{old.get(key)!r} as when the run was started; it changed since (use another run.dir)",
            )


PLACE = ("hooks", "dtype", "attn_implementation", "other_attn_implementation", "micro_batch")
"""Parts of a live model's fingerprint that follow the hooks asked for and the machine."""


def check_judged(old: Mapping[str, str], new: Mapping[str, str], live: bool) -> None:
    """Refuse to judge a run on other data or another model than it was trained on.

    Args:
        old: of the run; a part that it does not have is not compared.
        new: of what it would be judged on.
        live: whether a model makes the rows now.

    Raises:
        InputError: naming the part that changed.
    """
    for key in sorted(old.keys() & new.keys()):
        if old[key] != new[key] and not (live and key in PLACE):
            wanted = f"{old[key]!r} as when the run was trained; it changed since, so numbers would differ"
            raise InputError(key, new[key], wanted)
