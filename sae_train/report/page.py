"""What every page has in common: how it looks, and that nothing in it can be more than text.

A page holds everything it shows: images as data, style inline, no script, nothing fetched; its content
security policy forbids the rest. Every text in it may come from a corpus, a hub or a user, so it is
escaped by the template engine, cleared of secrets, and its control characters are made visible.
"""

from importlib import resources
from typing import Any

from sae_train.redact import printable, redact


def rendered(package: str, template: str, **values: Any) -> str:
    """A page.

    Args:
        package, template: where its template is; `style.css` beside this module is there to be included.
        values: for the template, every text of them `clean`.
    """
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    environment = Environment(
        loader=FunctionLoader(lambda name: _file("sae_train.report", name)),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.from_string(_file(package, template)).render(**values)


def clean(value: Any, keep: str = "") -> str:
    """A text without secrets, its control characters visible but for those to `keep`."""
    return printable(str(redact(str(value))), keep)


def _file(package: str, name: str) -> str:
    return resources.files(package).joinpath(name).read_text(encoding="utf-8")
