"""Every preset composes into dataclasses that pass their own checks."""

import pytest

from sae_train.cli.compose import compose, options
from sae_train.config import to_config
from sae_train.member_set import members

GIVEN = ["hook=resid_post.0", "source.path=folder", "source.paths=[a.safetensors]"]


@pytest.mark.parametrize("name", options("experiment"))
def test_every_preset_composes_into_checked_dataclasses(name):
    composed = compose("train", [f"experiment={name}"])
    assert members(to_config(composed), composed)


@pytest.mark.parametrize("name", options("experiment"))
def test_every_preset_takes_any_activation_architecture_and_optimizer(name):
    for group in ("sae/activation", "sae", "optim"):
        for option in options(group):
            given = ["target=mlp_out.0"] if "transcoder" in option else []
            to_config(compose("train", [f"experiment={name}", f"{group}={option}", *given]))


@pytest.mark.parametrize(
    "group", ["model", "corpus", "source", "sae", "sae/activation", "optim", "kernels", "logger"]
)
def test_every_option_of_a_group_composes(group):
    for option in options(group):
        to_config(compose("train", [f"{group}={option}", "model.name=any", *GIVEN]))
