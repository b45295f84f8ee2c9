"""One Slurm for all tests of this folder, empty before each."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster.slurm import Cluster, refusal

from sae_train.launch.slurm import Slurm


@pytest.fixture(scope="session")
def whole_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if (why := refusal()) is not None:
        pytest.skip(why)
    made = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        made.start()
        yield made
    finally:
        made.shut()


@pytest.fixture
def cluster(whole_cluster: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Cluster]:
    """A cluster without jobs, whose commands come first on PATH; jobs start in a folder of their own."""
    monkeypatch.setattr(Slurm, "FRESH_S", 0.2)
    monkeypatch.setenv("PATH", whole_cluster.path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    yield whole_cluster
    whole_cluster.clear()
