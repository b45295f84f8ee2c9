"""What a format is: which SAEs it can hold, how they are written, and how they are read back."""

import re
import stat
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_train.errors import InputError
from sae_train.files import CorruptFile, read_json
from sae_train.formats.plain import Plain
from sae_train.registry import Registry
from sae_train.sae.io import MAX_CONFIG_BYTES, MAX_WIDTH


@dataclass
class FormatConfig:
    """`name` picks the format from the registry."""

    name: str = "???"


@dataclass(frozen=True)
class Place:
    """A hook in the spellings that other libraries know.

    Attributes:
        key: ours ("resid_post.12"), or whatever name its rows had.
        tl: TransformerLens's ("blocks.12.hook_resid_post"), if it has one.
        module: path of the module in the Hugging Face model, if it is known ("model.layers.12").
        side: "in" or "out" of that module.
    """

    key: str
    tl: str | None = None
    module: str | None = None
    side: str = "out"

    @property
    def layer(self) -> int | None:
        found = re.search(r"\.(\d+)(\.|:|$)", self.tl or self.key)
        return int(found[1]) if found else None

    @property
    def below_base(self) -> str:
        """The module below the base model, as sparsify names folders: "layers.12"; else our own name."""
        if self.module is None:
            return self.key
        return re.sub(r"^(model|transformer|gpt_neox|base_model)\.(?=.)", "", self.module)


@dataclass(frozen=True)
class About:
    """What an export says beside the weights.

    Attributes:
        model: Hub id of the model, None if there is none or it is a folder of this machine.
        inputs, outputs: the hooks.
        context_length: of the windows.
        corpus: data set, if it is one of the Hub.
        l0: mean active latents on held-out rows, if known.
        density: [F] share of rows on which each latent is active, if known.
        facts: provenance for whoever reads the file: no paths, no secrets.
    """

    model: str | None = None
    inputs: tuple[Place, ...] = ()
    outputs: tuple[Place, ...] = ()
    context_length: int | None = None
    corpus: str | None = None
    l0: float | None = None
    density: Tensor | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def place(self) -> Place:
        """The first hook that is read."""
        return self.inputs[0] if self.inputs else Place("unknown")


@dataclass(frozen=True)
class Found:
    """One SAE read from a folder: its name there, what it computes, and what is known of its hooks."""

    name: str
    plain: Plain
    hook: str | None = None
    target: str | None = None
    model: str | None = None


class Format(ABC):
    """Base class. A format holds one SAE in a folder unless it says otherwise.

    Attributes:
        files: names by which a folder is recognised: all are there.
        whole_set: it takes several SAEs, one of each layer.
        thresholds_only: it cannot hold rules that compare latents with each other, but means to hold SAEs
            that were trained with one: they get thresholds (`reference.calibrated`).
    """

    files: Sequence[str] = ()
    whole_set = False
    thresholds_only = False

    def __init__(self, config: FormatConfig) -> None:
        self.name = config.name

    @abstractmethod
    def refusal(self, plain: Plain) -> str | None:
        """Why this SAE cannot be written, as half a sentence, or None if it can."""

    @abstractmethod
    def write(self, saes: Sequence[tuple[Plain, About]], folder: Path, dtype: torch.dtype) -> None:
        """Write SAEs that are not refused into an empty folder: one of them unless `whole_set`."""

    @abstractmethod
    def read(self, folder: Path) -> list[Found]:
        """What a folder holds, which may be a stranger's; large matrices stay on disk.

        Raises:
            InputError: it does not hold what the format says, or something that our SAEs cannot compute.
        """


FORMATS: Registry[Format] = Registry("format")


def holders(plain: Plain) -> list[str]:
    """Names of the formats that can hold an SAE."""
    return [name for name in FORMATS if FORMATS.build(FormatConfig(name)).refusal(plain) is None]


def check(format_: Format, plain: Plain) -> None:
    """Raises InputError, with the formats that can, if a format cannot hold an SAE."""
    reason = format_.refusal(plain)
    if reason is not None:
        others = ", ".join(holders(plain)) or "none but our own"
        raise InputError(
            "format", format_.name, f"a format that holds {plain.describe()} ({others}): {reason}"
        )


def unit(value: Any, key: str, least: int = 1, most: int = MAX_WIDTH) -> int:
    """A whole number of a stranger's."""
    if type(value) is not int or not least <= value <= most:
        raise InputError(key, shown(value), f"a whole number from {least} to {most}")
    return value


def shown(value: Any) -> Any:
    """A stranger's value as an error message may repeat it: one short line."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    return value if len(repr(value)) <= 80 else f"{repr(value)[:80]}..."


def text(value: Any, key: str, known: Sequence[str] | None = None) -> str:
    """A string of a stranger's, one of `known` if that is given."""
    wanted = "one of " + ", ".join(known) if known is not None else "a string"
    if not isinstance(value, str) or (known is not None and value not in known):
        raise InputError(key, shown(value), wanted)
    return value


def optional_text(value: Any) -> str | None:
    """A short printable string, or None for anything else: for names that we only pass on."""
    return value if isinstance(value, str) and value.isprintable() and 0 < len(value) <= 200 else None


def flag(table: dict[str, Any], key: str, default: bool) -> bool:
    value = table.get(key, default)
    if type(value) is not bool:
        raise InputError(key, shown(value), "true or false")
    return value


def object_at(value: Any, key: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(key, shown(value), "an object")
    return value


def json_object(path: Path) -> dict[str, Any]:
    """A JSON object within 1 MiB from a regular file.

    Raises:
        InputError: it is anything else.
    """
    try:
        return object_at(read_json(path, MAX_CONFIG_BYTES), path.name)
    except CorruptFile as error:
        raise InputError("path", str(path), f"a configuration in JSON ({error.reason})") from error
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError("path", str(path), f"a file that can be read ({reason})") from error


def regular_size(path: Path) -> int:
    """Bytes of a regular file.

    Raises:
        InputError: there is none, or it is a link, which may lead to any file of this machine.
    """
    try:
        status = path.lstat()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError("path", str(path), f"a file that can be read ({reason})") from error
    if not stat.S_ISREG(status.st_mode):
        raise InputError("path", str(path), "a regular file")
    return status.st_size
