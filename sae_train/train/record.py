"""run.json: what a run is, how far it is, and what decided its bits. Written by rename, never half there."""

import logging
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sae_train.errors import InputError, StoppedEarly
from sae_train.files import CorruptFile, read_json, write_json
from sae_train.train.checkout import project_commit

logger = logging.getLogger("sae_train.train")

FORMAT_VERSION = 1
MAX_RECORD_BYTES = 2 << 20


@dataclass
class RunRecord:
    """Facts about a run.

    Attributes:
        status: running, stopped or done.
        config: the configuration it was started with, as plain values.
        fingerprint: everything its rows are a function of.
        chosen: values chosen automatically once and kept on resume (harvest micro-batch, threads, precision,
            the id at wandb).
        steps: planned optimizer steps.
        step, tokens: how far the run was when this was written.
    """

    status: str
    config: dict[str, Any]
    fingerprint: dict[str, str]
    chosen: dict[str, Any]
    steps: int
    step: int = 0
    tokens: int = 0
    command: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def write(self, folder: Path) -> None:
        write_json(folder / "run.json", asdict(self))

    def write_last(self, folder: Path, check: Callable[[], None]) -> None:
        """Write on the way out of a run that something ended: a folder that is full, gone or another's (which
        `check` raises) must not hide what that was."""
        try:
            check()
            self.write(folder)
        except (OSError, StoppedEarly) as error:
            logger.warning("run.json stays as it was (%s)", error)

    def trained(self, name: str) -> bool:
        """Whether an SAE in its folder was trained there: `sae-train import` may have put others beside."""
        members = self.config.get("members")
        return not isinstance(members, dict) or name in members

    @classmethod
    def read(cls, folder: Path) -> "RunRecord | None":
        """The record of a run folder, or None where no run was started.

        Raises:
            InputError: the file is not a record this release reads.
        """
        path = folder / "run.json"
        if not path.exists():
            return None
        try:
            data = read_json(path, MAX_RECORD_BYTES)
        except (CorruptFile, OSError) as error:
            raise InputError(str(path), "damaged", f"a record written by this release ({error})") from None
        if not isinstance(data, dict) or data.get("format_version") != FORMAT_VERSION:
            found = data.get("format_version") if isinstance(data, dict) else None
            raise InputError(str(path), found, f"format version {FORMAT_VERSION}, the one this release reads")
        kinds = {f.name: type(getattr(cls("", {}, {}, {}, 1), f.name)) for f in fields(cls)}
        wrong = [name for name in kinds.keys() | data.keys() if type(data.get(name)) is not kinds.get(name)]
        if not wrong and (type(data["chosen"].get("threads")) is not int or data["chosen"]["threads"] < 1):
            wrong = ["chosen.threads"]
        if wrong or data["steps"] < 1:
            raise InputError(str(path), sorted(wrong) or data["steps"], "a record written by this release")
        return cls(**data)


def versions() -> dict[str, str]:
    """Versions that a bit-exact repetition would need, with the commit of this project where there is one."""
    commit = project_commit()
    packages = ("sae-train", "torch", "transformers", "datasets", "tokenizers", "safetensors", "numpy")
    return (
        {"python": sys.version.split()[0], "machine": platform.machine()}
        | {name: version(name) for name in packages}
        | ({"commit": commit} if commit is not None else {})
    )
