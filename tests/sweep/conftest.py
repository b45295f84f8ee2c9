"""A composer for all tests: reading the files of conf/ takes longer than anything that is done with them."""

import pytest

from sae_train.cli.compose import Composer


@pytest.fixture(scope="session")
def composer() -> Composer:
    return Composer("train")
