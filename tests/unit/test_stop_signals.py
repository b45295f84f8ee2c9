"""Which second signal ends a process: a user's always does, a scheduler's warning never."""

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from sae_train import stop
from sae_train.cli.signals import StopSignals

TERM, INT, USR1, USR2 = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2


@pytest.fixture(autouse=True)
def no_request() -> Iterator[None]:
    yield
    stop.clear()


def ends(*numbers: int) -> int:
    """How a process ends that is sent these signals while it has something to lose: 75 if it could save."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            with StopSignals() as signals:
                signals.defer()
                for number in numbers:
                    os.kill(os.getpid(), number)
                try:
                    stop.check()
                except stop.Interrupted as error:
                    code = error.exit_code
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("number", [TERM, INT, USR1, USR2])
@pytest.mark.parametrize("in_slurm", [False, True])
def test_the_first_signal_of_any_kind_has_the_run_save(number, in_slurm, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    if in_slurm:
        monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert ends(number) == 75


@pytest.mark.parametrize(
    ("numbers", "outside", "inside"),
    [
        ((TERM, TERM), -TERM, 75),
        ((USR1, TERM), -TERM, 75),
        ((TERM, USR1, USR2, USR1), 75, 75),
        ((USR2, USR2, USR1), 75, 75),
        ((TERM, INT), -INT, -INT),
        ((INT, INT), -INT, -INT),
    ],
)
def test_slurm_may_repeat_its_warnings_and_a_user_is_obeyed(numbers, outside, inside, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert ends(*numbers) == outside
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert ends(*numbers) == inside


def test_a_request_that_somebody_swallowed_is_heard_before_anything_can_be_lost():
    """A library's callback swallows exceptions that it does not know."""
    with StopSignals() as signals:
        with pytest.raises(stop.Interrupted, match="SIGUSR1"):
            os.kill(os.getpid(), USR1)
        with pytest.raises(stop.Interrupted, match="SIGUSR1"):
            signals.defer()


def test_afterwards_signals_do_what_they_did_before():
    def mine(number, frame):
        pass

    before = {number: signal.signal(number, mine) for number in StopSignals.NAMES}
    try:
        with StopSignals() as signals:
            signals.defer()
            os.kill(os.getpid(), USR1)
            assert stop.reason() is not None
        assert stop.reason() is None
        assert all(signal.getsignal(number) is mine for number in StopSignals.NAMES)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_in_another_thread_signals_are_left_alone():
    handlers = []

    def inside() -> None:
        with StopSignals() as signals:
            signals.defer()
            handlers.append(signal.getsignal(INT))

    before = signal.getsignal(INT)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(inside).result()
    assert handlers == [before] == [signal.getsignal(INT)]
