"""The journal of a search: what is suggested, who trains it, and when a trial is not worth its time."""

import pytest

from sae_train.cli.folder import owned
from sae_train.sweep.axes import read_axes
from sae_train.sweep.options import SweepConfig
from sae_train.sweep.study import ENDED, FAR, SLOT, Search, _Reporter, slot_of

AXES = read_axes(["lr=tag(log,interval(1e-4,1e-1))", "k=range(2,10,2)", "activation=topk,jumprelu"])[1]
STEPS = 100


def search(folder, **options):
    return Search(folder, SweepConfig(**{"trials": 8, "warmup_trials": 3} | options), AXES, STEPS)


def hold(folder):
    return owned("sweep.dir", folder)


def error(params):
    return abs(params["lr"] - 0.01) + 0.1 * params["k"]


def test_a_continued_search_suggests_what_it_would_have_suggested_and_nothing_twice(tmp_path):
    found = []
    for name, again in (("whole", False), ("continued", True)):
        (tmp_path / name).mkdir()
        mine = search(tmp_path / name)
        while (batch := mine.next_batch(hold)) is not None:
            with batch.held:
                for trial in batch.trials:
                    mine.study.tell(trial, error(trial.params))
            mine = search(tmp_path / name) if again else mine
        found.append([trial.params for trial in mine.study.get_trials()])
    assert found[0] == found[1] and len(found[0]) == 8
    assert len({repr(params) for params in found[0]}) == 8


def test_suggestions_become_arguments_that_train_takes(tmp_path):
    mine = search(tmp_path, batch=8)
    batch = mine.next_batch(hold)
    assert batch is not None and batch.run == "t0000-t0007"
    with batch.held:
        for trial in batch.trials:
            lr, k, activation = mine.values(trial.params)
            assert 1e-4 <= float(lr) <= 1e-1
            assert k in ("2", "4", "6", "8") and activation in ("topk", "jumprelu")
    kinds = {name: type(one).__name__ for name, one in mine.distributions().items()}
    assert kinds == {
        "lr": "FloatDistribution",
        "k": "IntDistribution",
        "activation": "CategoricalDistribution",
    }


def test_trials_of_a_worker_that_is_gone_are_taken_up_and_those_of_a_living_one_are_not(tmp_path):
    one, other, third = (search(tmp_path, trials=2) for _ in range(3))
    first, second = one.next_batch(hold), other.next_batch(hold)
    assert first is not None and second is not None
    assert [first.run, second.run] == ["t0000", "t0001"]
    assert third.next_batch(hold) is None and not third.is_over()
    with second.held:
        first.held.close()  # as the kernel does for a process that is killed
        taken = third.next_batch(hold)
        assert taken is not None and taken.run == "t0000"
        assert [t.params for t in taken.trials] == [t.params for t in first.trials]
        with taken.held:
            third.study.tell(taken.trials[0], 0.5)
    last = third.next_batch(hold)
    assert last is not None and last.run == "t0001"
    with last.held:
        third.fail(last.trials[0], "it diverged")
    assert third.next_batch(hold) is None and third.is_over()
    assert [row.status for row in third.rows()] == ["done", "failed"]
    assert [row.note for row in third.rows()] == ["", "it diverged"]


def test_a_trial_that_was_asked_for_by_a_worker_killed_in_that_instant_is_trained(tmp_path):
    mine = search(tmp_path, trials=1)
    mine.study.ask(mine.distributions())
    batch = search(tmp_path, trials=1).next_batch(hold)
    assert batch is not None and batch.run == slot_of([0])
    assert batch.trials[0].user_attrs[SLOT] == "t0000"
    batch.held.close()


def records(**fvu_and_l0):
    return [
        {"step": int(step[1:]), "main/heldout/fvu": fvu, "main/heldout/l0": l0}
        for step, (fvu, l0) in fvu_and_l0.items()
    ]


@pytest.mark.parametrize(("objective", "sign"), [("fvu", 1), ("recovered_mean", -1)])
def test_held_out_errors_are_reported_once_and_at_the_wanted_l0(objective, sign, tmp_path):
    config = SweepConfig(trials=8, l0=4, objective=objective)
    mine = search(tmp_path, l0=4.0, objective=objective)
    batch = mine.next_batch(hold)
    assert batch is not None
    with batch.held:
        (trial,) = batch.trials
        seen = records(s20=(0.5, 4.2), s40=(0.4, 9), s60=(0.3, 9), s80=(0.2, 4), s100=(0.1, 4))
        reporter = _Reporter(trial, "main", config, STEPS)
        assert reporter.report(seen[:2]) and not reporter.report(seen[:2]) and reporter.report(seen)
        assert not _Reporter(trial, "main", config, STEPS).report(seen)
    found = mine.study.get_trials()[0].intermediate_values
    assert found == {20: sign * 0.5, 60: sign * (0.3 + FAR), 80: sign * 0.2}


def test_a_trial_that_falls_behind_is_found_so_once_and_for_all(tmp_path):
    mine = search(tmp_path, warmup_trials=1)
    good, bad = (mine.next_batch(hold) for _ in range(2))
    assert good is not None and bad is not None
    with good.held, bad.held:
        first = _Reporter(good.trials[0], "main", mine.config, STEPS)
        assert not first.is_behind(records(s20=(0.5, 4), s40=(0.4, 4)))
        mine.study.tell(good.trials[0], 0.4)
        second = _Reporter(bad.trials[0], "main", mine.config, STEPS)
        assert not second.is_behind(records(s20=(0.45, 4)))
        assert second.is_behind(records(s20=(0.45, 4), s40=(0.6, 4)))
        assert bad.trials[0].user_attrs[ENDED] == 40
    again = search(tmp_path, warmup_trials=1).next_batch(hold)
    assert again is not None and again.run == "t0001" and again.trials[0].user_attrs[ENDED] == 40
    again.held.close()
