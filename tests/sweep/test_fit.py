"""How many SAEs of a sweep share a run: as many as the plan says fit the device, and not fewer."""

from dataclasses import replace

import pytest
from sweep.short import SHORT

from sae_train.cli import sweep
from sae_train.cli.sweep import fits, per_run
from sae_train.cli.sweep_setting import take_apart
from sae_train.plan import make
from sae_train.sweep.points import all_points
from sae_train.sweep.runs import side_by_side

AXES = ["k=1,2,3", "lr=1e-3,2e-3", "sae.d_sae=20000"]
MIB = 1 << 20


@pytest.fixture
def setting(composer):
    made = replace(take_apart([*SHORT, *AXES]), compose=composer)
    return made, all_points(made.fixed, made.axes, made.compose)


def has(monkeypatch, mebibytes):
    monkeypatch.setattr(sweep, "device_bytes", lambda device, processes: mebibytes * MIB)


def least_room(setting, points, monkeypatch):
    """The fewest MiB of a device that a run of these points fits."""
    plans = []
    has(monkeypatch, 1 << 14)
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "make", lambda job: plans.append(make(job)) or plans[-1])
        assert fits(setting, points)
    (plan,) = plans
    return next(room for room in range(1, 1 << 14) if plan.verdict(room * MIB) != "does not fit")


@pytest.mark.parametrize(
    ("room_for", "together", "runs"), [(6, 6, 1), (5, 3, 2), (3, 3, 2), (2, 2, 3), (1, 1, 6)]
)
def test_a_sweep_is_cut_where_the_plan_says_that_it_does_not_fit(
    setting, room_for, together, runs, monkeypatch
):
    made, points = setting
    launch = made.launch_config(points[0])
    has(monkeypatch, least_room(made, points[:room_for], monkeypatch))
    most = per_run(made, points, launch)
    assert most == (None if together == 6 else together)
    groups = side_by_side(points, most)
    assert [len(group) for group in groups] == [together] * runs
    assert all(fits(made, group) for group in groups)


def test_one_that_does_not_fit_alone_is_a_run_that_train_refuses(setting, monkeypatch):
    made, points = setting
    has(monkeypatch, least_room(made, points[:1], monkeypatch) - 1)
    assert per_run(made, points, made.launch_config(points[0])) == 1


def test_what_is_told_is_taken_as_it_is(setting, monkeypatch):
    _, points = setting
    has(monkeypatch, 1)
    made = replace(setting[0], config=replace(setting[0].config, members_per_run=5))
    assert per_run(made, points, made.launch_config(points[0])) == 5
