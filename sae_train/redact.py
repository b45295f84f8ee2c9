"""What must not reach a log, a file or a screen: secrets of the environment, and control characters.

Secrets are found by value, not by the name of a field: a token pasted into a dataset URL or a model
name is as secret as one in a field called `token`. Control characters in text that others wrote (corpus
text, names from a hub) would otherwise forge log lines or drive the reader's terminal.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SECRET_NAMES = ("TOKEN", "KEY", "SECRET", "PASSWORD")
MIN_SECRET_CHARS = 8
"""Shorter values (`false`, `us`, `1`) are switches far more often than secrets."""

MASK = "***"

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""C0 and C1 controls, line separators, direction overrides and lone surrogates."""


def secrets() -> list[str]:
    """Values of environment variables whose name says that they are secret, the longest first."""
    values = {
        value
        for name, value in os.environ.items()
        if len(value) >= MIN_SECRET_CHARS and any(word in name.upper() for word in SECRET_NAMES)
    }
    return sorted(values, key=len, reverse=True)


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
