"""The syntax of axes, and which of it is refused, in one line that names the key."""

import re

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_train.errors import InputError
from sae_train.sweep.axes import MAX_NAME, name_of, read_axes, spelt


def test_lists_choices_and_ranges_are_axes_and_the_rest_is_fixed():
    fixed, axes = read_axes(
        [
            "experiment=demo",
            "sae.activation.k=16,32",
            "optim.lr=choice(1e-3,3e-3)",
            "train.accumulate=range(1,4)",
        ]
    )
    assert fixed == ["experiment=demo"]
    assert [(axis.key, axis.values) for axis in axes] == [
        ("sae.activation.k", ("16", "32")),
        ("optim.lr", ("0.001", "0.003")),
        ("train.accumulate", ("1", "2", "3")),
    ]


def test_an_interval_is_searched_between_its_ends():
    _, (lr, k) = read_axes(["lr=tag(log,interval(1e-4,1e-2))", "k=int(interval(8,64))"])
    assert (lr.low, lr.high, lr.log, lr.whole, lr.ends()) == (1e-4, 1e-2, True, False, ("0.0001", "0.01"))
    assert (k.low, k.high, k.log, k.whole, k.ends()) == (8, 64, False, True, ("8", "64"))


def test_short_names_are_those_of_a_grid_and_pick_files_where_files_stand_for_a_choice():
    fixed, axes = read_axes(["activation=topk,jumprelu", "seed=0,1", "lr=1e-3", "k=8"])
    assert [axis.override(axis.values[1]) for axis in axes] == ["sae/activation=jumprelu", "run.seed=1"]
    assert fixed == ["optim.lr=1e-3", "k=8"]


def test_of_two_arguments_for_a_key_the_later_one_counts():
    fixed, axes = read_axes(["train.tokens=64", "optim.lr=1e-3", "lr=1e-3,2e-3"])
    assert fixed == ["train.tokens=64"]
    assert axes[0].values == ("0.001", "0.002")


@pytest.mark.parametrize(
    ("args", "key", "said"),
    [
        (["experiment=demo"], "sweep", "several values"),
        (["lr=1,2", "optim.lr=3,4"], "optim.lr", "lr is the same"),
        (["lr=1,2", "optim.lr=3"], "optim.lr", "lr varies it"),
        (["k=8,8"], "k", "values that differ"),
        (["k=8,"], "override", "key=value"),
        (["+k=1,2"], "k", "no + or ~"),
        (["~k=1,2"], "k", "no + or ~"),
        (["lr=interval(2,1)"], "lr", "the smaller first"),
        (["lr=tag(log,interval(0,1))"], "lr", "above 0"),
        (["lr=glob(*)"], "lr", "KEY=A,B"),
        (["k=shuffle(1,2,3)"], "k", "in order"),
        (["k=range(1,5),7"], "k", "one range"),
        (["k=range(5,1)"], "k", "at least one value"),
    ],
)
def test_what_is_no_axis_is_said_in_one_line(args, key, said):
    with pytest.raises(InputError, match=re.escape(said)) as caught:
        read_axes(args)
    assert caught.value.field == key
    assert "\n" not in str(caught.value)


def test_names_are_made_as_a_grid_makes_them_and_stay_short_and_apart():
    assert name_of([("k", "16"), ("lr", "0.0010")]) == "k16-lr0.001"
    assert name_of([("experiment", "runs/x/best.yaml")]) == "experimentbest.yaml"
    long = [name_of([("paths", "a" * 200 + end)]) for end in "bc"]
    assert len(set(long)) == 2
    assert max(map(len, long)) <= MAX_NAME


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**9), 10**9)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), max_size=12),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.from_regex(r"[a-z][a-z0-9_.-]{0,8}", fullmatch=True), inner, max_size=3)
    ),
    max_leaves=6,
)


def unwrapped(value):
    if isinstance(value, dict):
        return {key: unwrapped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [unwrapped(item) for item in value]
    return getattr(value, "text", value)


@settings(deadline=None)
@given(plain)
def test_a_value_that_is_spelt_is_read_back_as_it_was(value):
    """By Hydra, whose grammar has rules of its own for quotes, backslashes and words such as null."""
    parsed = OverridesParser.create().parse_override(f"key={spelt(value)}")
    assert repr(unwrapped(parsed.value())) == repr(value)
