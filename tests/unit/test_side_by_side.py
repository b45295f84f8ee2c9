"""SAEs that step at a time end with the bits of those that take turns."""

import threading
import time

import pytest
import torch
from same_bits import assert_same_bits, tensors

from sae_train.batch import RowBatch
from sae_train.cli.compose import compose
from sae_train.cli.train import steps_side_by_side
from sae_train.config import to_config
from sae_train.member_set import members
from sae_train.train.kernels import choose_stepper
from sae_train.train.members import Member
from sae_train.train.resample import resample_member
from sae_train.train.side_by_side import SideBySide

D, N, STEPS = 16, 64, 40
KINDS = [
    "a={sae: {d_sae: 96, activation: {name: topk, k: 4}, dead_after_tokens: 256}}",
    "b={sae: {d_sae: 64, activation: {name: jumprelu, target_l0: 4}}}",
    "c={sae: {name: gated, d_sae: 64, activation: {name: relu}}}",
    "d={sae: {name: matryoshka, d_sae: 64, activation: {name: batch_topk, k: 4}}}",
    "e={sae: {d_sae: 96, activation: {name: topk, k: 4}, dead_after_tokens: 256}, optim: {name: muon}}",
    "f={sae: {d_sae: 96, activation: {name: topk, k: 2}}, optim: {name: schedule_free, decay: 0}}",
]


def trained(side_by_side: SideBySide, autocast: torch.dtype | None) -> dict[str, torch.Tensor]:
    """The states of SAEs of every kind after 40 steps."""
    wanted = "saes={" + ", ".join(kind.replace("=", ": ", 1) for kind in KINDS) + "}"
    composed = compose("train", ["source=synthetic", "hook=auto", wanted])
    config = to_config(composed)
    built = []
    for member in members(config, composed):
        built.append(Member(member, D, STEPS, STEPS * N, 0.0, torch.device("cpu")))
        built[-1].initialise({"auto": rows(0)})
    stepper = choose_stepper(config.kernels, built, 1, autocast)

    def step(member: Member) -> None:
        member.begin_step(number)
        done = stepper.step(member, stepper.take(member, batch))
        if number == 20 and member.name == "a":
            resample_member(member, done, number)

    with side_by_side:
        for number in range(STEPS):
            batch = RowBatch({"auto": rows(number)}, torch.arange(N))
            side_by_side.each(step, built)
    return tensors({member.name: member.state_dict() for member in built})


def rows(seed: int) -> torch.Tensor:
    return torch.randn(N, D, generator=torch.Generator().manual_seed(seed)).square()


@pytest.mark.usefixtures("optional_libraries", "one_thread")
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
def test_saes_that_step_at_a_time_end_with_the_bits_of_those_that_take_turns(autocast):
    in_turns = trained(SideBySide(), autocast)
    for _ in range(3):
        assert_same_bits(in_turns, trained(SideBySide(at_once=4, threads=1), autocast))


@pytest.mark.usefixtures("one_thread")
def test_each_has_its_threads_and_nobody_else_gets_them():
    torch.set_num_threads(3)
    with SideBySide(at_once=2, threads=2) as side_by_side:
        both_there = threading.Barrier(2, timeout=60)  # so that neither does the work of both

        def threads(_: int) -> int:
            both_there.wait()
            return torch.get_num_threads()

        assert side_by_side.each(threads, [0, 1]) == [2, 2]
        later: list[int] = []
        other = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        other.start()
        other.join()
        assert later == [3] and torch.get_num_threads() == 3
    assert SideBySide().each(threading.get_ident, []) == []
    assert SideBySide().each(lambda _: threading.get_ident(), [0]) == [threading.get_ident()]


def test_an_error_is_raised_when_all_are_through_and_the_first_of_them():
    through = []

    def work(number: int) -> None:
        if number < 2:
            raise ValueError(f"of {number}")
        time.sleep(0.2)
        through.append(number)

    with SideBySide(at_once=2, threads=1) as side_by_side:
        with pytest.raises(ValueError, match="of 0"):
            side_by_side.each(work, [0, 3, 1, 2])
        assert sorted(through) == [2, 3]
        assert side_by_side.each(lambda x: x * x, [3, 2, 1]) == [9, 4, 1]


@pytest.mark.timeout(45)  # those that wait for one that never comes give up after 60 s
def test_no_room_for_a_thread_ends_with_that_error_and_leaves_none_waiting(monkeypatch):
    before, start = threading.active_count(), threading.Thread.start
    started = []

    def only_two(thread):
        started.append(thread)
        if len(started) > 2:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", only_two)
    with pytest.raises(RuntimeError, match="can't start"), SideBySide(at_once=4, threads=1):
        pass
    monkeypatch.undo()
    for thread in started[:2]:
        thread.join(timeout=60)
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("own", "all_of_run", "threads", "expected"),
    [
        (1, 1, 8, (1, None)),  # one SAE has all of them
        (10, 10, 2, (2, 1)),
        (3, 3, 8, (3, 2)),
        (1, 2, 2, (1, 1)),  # another process has the other, with as many threads as it would have here
        (2, 2, 2, (2, 1)),
        (0, 2, 2, (1, 1)),  # a process that only harvests
    ],
)
def test_threads_of_a_step_follow_from_the_run_not_from_its_processes(own, all_of_run, threads, expected):
    made = SideBySide.of(own, all_of_run, threads)
    assert (made.at_once, made.threads) == expected


@pytest.mark.parametrize(
    ("keys", "device", "expected"),
    [
        ((), "cpu", (2, 1)),
        ((), "cuda", (1, None)),  # one queue
        (("mesh.data=2",), "cpu", (1, None)),  # messages come in one order in all processes
        (("mesh.feature=2",), "cpu", (1, None)),
        (("train.loss=kl",), "cpu", (1, None)),  # one language model, with hooks on it
        (("optim=adam8bit",), "cpu", (1, None)),  # it tells all of torch.compile what to do
    ],
)
def test_saes_take_turns_where_they_share_more_than_the_rows(keys, device, expected):
    composed = compose("train", ["source=synthetic", "hook=auto", "grid={seed: [0, 1, 2]}", *keys])
    config = to_config(composed)
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        made = steps_side_by_side(config, torch.device(device), 3, members(config, composed))
    finally:
        torch.set_num_threads(torch_threads)
    assert (made.at_once, made.threads) == expected
