"""What loading a model or tokenizer can raise, turned into one line that is safe to show."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from safetensors import SafetensorError

from sae_train.errors import InputError

LOADING = (OSError, ValueError, LookupError, ImportError, RuntimeError)
STRANGE = (TypeError, AttributeError, ArithmeticError)


@contextmanager
def input_errors(field: str, value: str) -> Iterator[None]:
    """What loading can raise, as one line without secrets.

    OSError covers absent files, the hub's answers and no network; ValueError unknown kinds of model and bad
    JSON; LookupError and ImportError missing pieces of a configuration or installation; SafetensorError and
    RuntimeError damaged or mismatched weights. A stranger's files also hold values that no code was written
    for: TypeError, AttributeError and ArithmeticError come of those; StrictDataclassError is what the hub's
    library makes of some, and tokenizers raises `Exception` itself.
    """
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except InputError:
        raise
    except torch.OutOfMemoryError:
        raise InputError(field, value, "a model that fits the device's memory") from None
    except Exception as error:
        expected = (*LOADING, *STRANGE, SafetensorError, StrictDataclassError)
        if not isinstance(error, expected) and type(error) is not Exception:
            raise
        if "contains custom code" in str(error):
            unknown = (
                f"true, to run the Python code that comes with {value}, which transformers does not know"
            )
            raise InputError("model.trust_remote_code", False, unknown) from None
        reason = redact(str(error), os.environ)
        if "attn_implementation" in str(error) or "attention implementation" in str(error).lower():
            raise InputError(
                "model.attn_implementation", "", f"one this model has; it says: {reason}"
            ) from None
        raise InputError(field, value, f"something transformers can load; it says: {reason}") from None


def redact(message: str, environment: Mapping[str, str]) -> str:
    """The first line of an error, at most 200 characters, without tokens, passwords or control characters."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if environment.get(name):
            message = message.replace(environment[name], "***")
    message = re.sub(r"\bhf_\w+", "***", message)
    message = re.sub(r"(?i)\bbearer\s+\S+", "***", message)
    message = re.sub(r"(?i)\bauthorization:\s*\S+", "authorization: ***", message)
    message = re.sub(r"//[^/@\s]+@", "//***@", message)
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    first = "".join(c for c in (lines[0] if lines else "no reason given") if c.isprintable())
    return first if len(first) <= 200 else first[:197] + "..."
