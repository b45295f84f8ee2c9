"""What the hub can answer, as one line: the input is wrong, or it is out of order and may be asked again.

The client retries some requests by itself (uploads of large files, downloads) and others not (making a
repository, committing, asking what a branch is). `asking` wraps a whole step, so that all of them are.
"""

import sys
from collections.abc import Callable
from typing import Any

from sae_train.errors import InputError, StoppedEarly
from sae_train.harvest.retries import Retry, one_line

RETRY = Retry(attempts=5, initial_s=1.0, max_s=8.0)
PASSES = (408, 429, 500, 502, 503, 504)
"""HTTP statuses of a server that may do better later."""
CUT = "Consistency check failed"
"""How the client begins its complaint about a download of another length."""
LOGIN = "a token that the hub accepts, in HF_TOKEN or by `hf auth login`"


def through_our_log() -> None:
    """What the client says goes the way of our own messages, once and without secrets; no bars in files."""
    from huggingface_hub.utils import disable_progress_bars
    from huggingface_hub.utils.logging import get_logger

    client = get_logger("huggingface_hub")
    for handler in list(client.handlers):
        client.removeHandler(handler)
    if not sys.stderr.isatty():
        disable_progress_bars()


def asking(field: str, value: str, what: str, action: Callable[[], Any]) -> Any:
    """The result of a step that talks to the hub, tried again while the hub is out of order.

    Args:
        field, value: what the user gave, for the line that says what is wrong with it.
        what: the step, for the log.
        action: the step; done again as a whole.

    Raises:
        InputError: the hub does not know it, or does not let this user.
        StoppedEarly: the hub cannot be reached, or went on failing.
    """
    from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError

    try:
        return RETRY(action, what, is_outage)
    except LocalEntryNotFoundError as error:  # what the client makes of a hub that does not answer
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        raise translated(field, value, what, cause) from error
    except (HTTPError, HFValidationError) as error:
        raise translated(field, value, what, error) from error
    except OSError as error:
        if not is_outage(error):
            raise
        raise translated(field, value, what, error) from error
    except RuntimeError as error:  # the client's own, around an upload that failed
        if not isinstance(error.__cause__, HTTPError):
            raise
        raise translated(field, value, what, error.__cause__) from error


def is_outage(error: BaseException) -> bool:
    """Whether the same request may succeed later."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    if isinstance(error, RuntimeError) and isinstance(error.__cause__, HTTPError):
        error = error.__cause__
    if isinstance(error, HfHubHTTPError):
        return status(error) in PASSES
    if isinstance(error, OfflineModeIsEnabled):
        return False
    if isinstance(error, ConnectionError | TimeoutError) or str(error).startswith(CUT):
        return True
    return isinstance(error, HTTPError)


def status(error: BaseException) -> int | None:
    """The HTTP status of an answer, or None where there was none."""
    response = getattr(error, "response", None)
    code = getattr(response, "status_code", None)
    return code if isinstance(code, int) else None


def translated(field: str, value: str, what: str, error: Exception) -> Exception:
    """The error to raise in the place of one of the client's."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    code = status(error)
    if isinstance(error, HFValidationError):
        return InputError(field, value, f"the name of a repository ({one_line(error)})")
    if isinstance(error, GatedRepoError):
        return InputError(field, value, "a repository whose terms you have accepted, on its page")
    if isinstance(error, RevisionNotFoundError):
        return InputError(field, value, "a branch, a tag or a commit of that repository")
    if isinstance(error, EntryNotFoundError):
        return InputError(field, value, "a folder of that repository")
    if isinstance(error, RepositoryNotFoundError):
        return InputError(field, value, f"a repository that is there; a private one needs {LOGIN}")
    if code == 401:
        return InputError("HF_TOKEN", "***", LOGIN)
    if code == 403:
        return InputError(field, value, "a repository that your token may write to")
    if code == 412:
        return StoppedEarly(
            f"{what}: somebody else committed to {value} meanwhile; run the same command again"
        )
    if is_outage(error):
        return StoppedEarly(
            f"{what}: the hub does not answer as it should ({one_line(error)}); run the same command again"
        )
    return InputError(field, value, f"something the hub accepts; it says: {one_line(error)}")
