"""Runs to break: a tiny model, a tiny corpus, and processes that start at once (`zygote.py`)."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faults.tools import TINY, Zygote


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    made = Zygote(tmp_path_factory.mktemp("zygote"))
    yield made
    assert made.server.stdin is not None
    made.server.stdin.close()
    made.server.wait(60)


@pytest.fixture(scope="session")
def tiny(tiny_model_dir: Callable[[str], Path], tiny_corpus_dir: Path) -> list[str]:
    """Arguments of a tiny run on a live model, without its run.dir."""
    return [f"model.name={tiny_model_dir('llama')}", f"corpus.name={tiny_corpus_dir}", *TINY]
