"""Where an SAE reads and what it reconstructs: parsed, checked, and taken out of rows."""

import pytest
import torch

from sae_train.errors import InputError
from sae_train.places import Places, Widths
from sae_train.sae.linear import LinearConfig

DIMS = {"a": 3, "b": 2, "y": 5}
ROWS = {
    hook: torch.arange(4.0 * width).reshape(4, width) + 100 * i
    for i, (hook, width) in enumerate(DIMS.items())
}


def test_one_hook_alone_is_an_autoencoder_whose_target_is_the_very_tensor_that_it_reads():
    places = Places.parse("a")
    assert (places.inputs, places.targets, places.outputs, places.hooks) == (("a",), (), ("a",), ("a",))
    assert places.widths(DIMS) == Widths((3,)) and places.widths(DIMS).outputs == (3,)
    batch = places.batch(ROWS)
    assert batch.x is ROWS["a"] and batch.y is batch.x


def test_a_target_makes_a_transcoder():
    places = Places.parse("a", "y")
    assert (places.inputs, places.outputs, places.hooks) == (("a",), ("y",), ("a", "y"))
    assert places.widths(DIMS) == Widths((3,), (5,)) and places.widths(DIMS).outputs == (5,)
    batch = places.batch(ROWS)
    assert batch.x is ROWS["a"] and batch.y is ROWS["y"]


def test_hooks_joined_by_a_plus_are_one_row_in_the_order_in_which_they_are_written():
    places = Places.parse("b+a")
    assert places.widths(DIMS) == Widths((2, 3))
    batch = places.batch(ROWS)
    assert batch.y is batch.x
    assert torch.equal(batch.x[:, :2], ROWS["b"]) and torch.equal(batch.x[:, 2:], ROWS["a"])
    several = Places.parse("a+b", "y+a")
    assert several.hooks == ("a", "b", "y")  # each once, inputs first
    assert several.widths(DIMS) == Widths((3, 2), (5, 3))
    assert torch.equal(several.batch(ROWS).y, torch.cat([ROWS["y"], ROWS["a"]], dim=-1))


@pytest.mark.parametrize(
    ("hook", "target", "key"),
    [
        ("", None, "hook"),
        ("+", None, "hook"),
        ("a+", None, "hook"),
        ("+a", None, "hook"),
        ("a++b", None, "hook"),
        ("a+b+a", None, "hook"),
        ("a", "y+", "target"),
        ("a", "y+y", "target"),
    ],
)
def test_an_empty_name_or_a_hook_twice_is_refused_by_its_key(hook, target, key):
    with pytest.raises(InputError, match=rf"^{key}=.*each once, several joined by \+"):
        Places.parse(hook, target)


def test_an_empty_target_is_none():
    assert Places.parse("a", "") == Places.parse("a", None) == Places.parse("a")


@pytest.mark.parametrize(
    ("kind", "widths", "other"),
    [
        ("autoencoder", Widths((3, 2)), "crosscoder"),
        ("autoencoder", Widths((3,), (5,)), "transcoder"),
        ("transcoder", Widths((3,)), "autoencoder"),
        ("transcoder", Widths((3, 2)), "crosscoder"),
        ("crosscoder", Widths((3,)), "autoencoder"),
        ("crosscoder", Widths((3, 2), (5,)), "transcoder"),
    ],
)
def test_hooks_that_do_not_fit_the_kind_are_refused_with_the_kind_that_fits(kind, widths, other):
    config = LinearConfig(kind=kind)
    with pytest.raises(InputError, match=f"sae.kind='{kind}': expected {other} with these hooks"):
        config.check_hooks(widths)
    LinearConfig(kind=other).check_hooks(widths)


def test_an_unknown_kind_and_a_skip_connection_in_anything_but_a_transcoder_are_refused():
    with pytest.raises(InputError, match=r"sae\.kind='encoder': expected autoencoder, transcoder, cross"):
        LinearConfig(kind="encoder")
    for kind in ("autoencoder", "crosscoder"):
        with pytest.raises(
            InputError, match=f"sae.skip=True: expected false, or sae.kind=transcoder instead of {kind}"
        ):
            LinearConfig(kind=kind, skip=True)
