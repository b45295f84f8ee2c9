"""What must not reach a log, a file or a screen: secrets of the environment, and control characters.

Secrets are found by value, not by the name of a field: a token pasted into a dataset URL or a model
name is as secret as one in a field called `token`. Control characters in text that others wrote (corpus
text, names from a hub) would otherwise forge log lines or drive the reader's terminal.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sae_train.errors import InputError

SECRET_NAMES = ("TOKEN", "KEY", "SECRET", "PASSWORD", "PASSWD", "CREDENTIAL")
NOT_SECRET_NAMES = ("TOKENIZER",)
MIN_SECRET_CHARS = 8
"""Shorter values (`false`, `us`, `1`) are switches far more often than secrets."""

MASK = "***"

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""C0 and C1 controls, line separators, direction overrides and lone surrogates."""


def secrets() -> list[str]:
    """Values of environment variables whose name says that they are secret, the longest first.

    Each also as it looks in a URL, and inside JSON or a Python literal, or one of these inside the other.
    A file's or folder's path is none.
    """
    forms: set[str] = set()
    for value in _secret_variables().values():
        forms |= {value, quote(value, safe="")}
    for _ in range(2):
        forms |= {json.dumps(form)[1:-1] for form in forms}
        forms |= {_escaped(form, quotes) for form in forms for quotes in ("", "'", '"', "'\"")}
    return sorted(forms, key=len, reverse=True)


def _escaped(text: str, quotes: str) -> str:
    """Backslashes before backslashes and quotes, as `repr` has them; which quotes depends on the rest."""
    return "".join("\\" + c if c == "\\" or c in quotes else c for c in text)


def _secret_variables() -> dict[str, str]:
    return {
        name: value
        for name, value in os.environ.items()
        if len(value) >= MIN_SECRET_CHARS
        and any(word in name.upper() for word in SECRET_NAMES)
        and not any(word in name.upper() for word in NOT_SECRET_NAMES)
        and not (value.startswith(("/", "~")) and os.path.exists(os.path.expanduser(value)))
    }


def refuse_secrets(tree: Any, key: str = "") -> None:
    """See that no secret of the environment stands in a configuration, which is saved and published as it is.

    Args:
        tree: nested mappings, lists and plain values.
        key: where the tree stands, dotted.

    Raises:
        InputError: a string holds one; names its key and the variable, and shows neither's value.
    """
    if isinstance(tree, Mapping):
        for name, item in tree.items():
            refuse_secrets(str(name), f"{key}.{MASK}" if key else MASK)
            refuse_secrets(item, f"{key}.{name}" if key else str(name))
    elif isinstance(tree, list | tuple):
        for item in tree:
            refuse_secrets(item, key)
    elif isinstance(tree, str):
        for name, value in _secret_variables().items():
            if value in tree or quote(value, safe="") in tree:
                known = f"no secrets: it holds the value of {name}, and would be saved and shown with the run"
                raise InputError(key, redact(tree), f"{known} (hub logins are found without being named)")


def redact(value: Any) -> Any:
    """A copy with every secret of the environment replaced by `***`, wherever it stands inside a string.

    Looks into dicts (keys too), lists and tuples; paths become strings; anything else is returned as it is.
    """
    return _redact(value, secrets())


def _redact(value: Any, hidden: list[str]) -> Any:
    if isinstance(value, str | Path):
        text = str(value)
        for secret in hidden:
            text = text.replace(secret, MASK)
        return text
    if isinstance(value, Mapping):
        return {_redact(key, hidden): _redact(item, hidden) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_redact(item, hidden) for item in value]
    return value


def printable(text: str, keep: str = "") -> str:
    """Text that is safe to print: control characters become visible escapes such as `\\x1b`.

    Args:
        text: any text.
        keep: characters to leave alone, for example the newlines of a traceback.
    """
    return CONTROL.sub(lambda m: m[0] if m[0] in keep else m[0].encode("unicode_escape").decode(), text)
