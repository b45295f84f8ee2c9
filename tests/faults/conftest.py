"""Runs to break: a tiny model, a tiny corpus, and processes that start at once (`zygote.py`)."""

from collections.abc import Callable
from pathlib import Path

import pytest
from faults.tools import TINY


@pytest.fixture(scope="session")
def tiny(tiny_model_dir: Callable[[str], Path], tiny_corpus_dir: Path) -> list[str]:
    """Arguments of a tiny run on a live model, without its run.dir."""
    return [f"model.name={tiny_model_dir('llama')}", f"corpus.name={tiny_corpus_dir}", *TINY]
