"""One writer per run folder: two at once, dead owners, frozen owners, owners on other hosts."""

import json
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
from faults.disk_tools import (
    SAVING,
    WAIT,
    Gate,
    needs_strace,
    one_line,
    strace,
    wait_until,
    whole_steps,
)
from faults.tools import differences, final_state, whole_tree

from sae_train.cli.folder import LOCK, owned
from sae_train.errors import InputError
from sae_train.log import read_metrics

TAKE = "sae_train.cli.folder:_take"
QUICK = "import sae_train.cli.folder as f; f.BEAT_S = 0.2\n"
"""Ten times as fast as it beats in earnest."""
ENDLESS = "train.tokens=640000"


def train(run: Path, *more: str) -> list[str]:
    return ["train", *SAVING, f"run.dir={run}", *more]


def race(
    folder: Path, start: "threading.Barrier", results: "multiprocessing.Queue[tuple[str, int, str]]"
) -> None:
    start.wait()
    try:
        with owned("run.dir", folder):
            results.put(("owner", os.getpid(), ""))
            time.sleep(0.3)
    except InputError as error:
        results.put(("refused", os.getpid(), str(error)))
    results.close()
    results.join_thread()
    os.kill(os.getpid(), signal.SIGKILL)  # the record of this owner stays, as after a crash


@pytest.mark.parametrize("rounds", [10, pytest.param(50, marks=pytest.mark.slow)])
def test_of_two_processes_that_want_a_folder_at_once_exactly_one_gets_it_every_time(rounds, tmp_path):
    """Each round meets the record that the killed owner of the last one left."""
    fork = multiprocessing.get_context("fork")
    for round_ in range(rounds):
        start, results = fork.Barrier(2), fork.Queue()
        both = [fork.Process(target=race, args=(tmp_path / "run", start, results)) for _ in range(2)]
        for process in both:
            process.start()
        got = sorted(results.get(timeout=60) for _ in both)
        for process in both:
            process.join()
        assert [kind for kind, _, _ in got] == ["owner", "refused"], (round_, got)
        assert f"process {got[0][1]} on" in got[1][2], (round_, "the refused one names the owner", got)


def test_of_two_commands_started_at_once_one_trains_and_the_other_exits_2_naming_it(zygote, tmp_path):
    for round_ in range(4):
        run = tmp_path / str(round_ % 2)  # the second time in a folder whose owner was killed
        both = [zygote.start(*train(run, ENDLESS)) for _ in range(2)]
        wait_until(lambda both=both: any(p.poll() is not None for p in both), "one of them is refused")
        loser, winner = sorted(both, key=lambda p: p.poll() is None)
        assert loser.poll() == 2, loser.text()
        assert f"process {winner.pid} on" in one_line(loser.text())
        winner.wait_for_step(run, 6)
        assert winner.poll() is None, winner.text()
        winner.send(signal.SIGKILL)
        winner.wait()


def test_the_folder_of_a_killed_run_is_taken_over_at_once_and_status_tells_who_is_alive(zygote, tmp_path):
    run = tmp_path / "run"
    process = zygote.start(*train(run, ENDLESS), before=QUICK)
    process.wait_for_step(run, 6)
    assert "process    alive" in zygote.run("status", f"run={run}", before=QUICK)
    process.send(signal.SIGSTOP)
    wait_until(
        lambda: "no sign of life" in zygote.run("status", f"run={run}", before=QUICK), "a frozen run shows"
    )
    process.send(signal.SIGKILL)
    process.wait()
    started = time.monotonic()
    step = read_metrics(run)[-1]["step"]
    second = zygote.start(*train(run, ENDLESS))
    wait_until(lambda: "taken over from" in second.text(), "the takeover", second)
    assert time.monotonic() - started < 50, "5 s on a quiet machine; nothing is waited for"
    second.wait_for_step(run, step + 2)
    second.send(signal.SIGTERM)
    assert second.wait() == 75, second.text()
    assert f"process {process.pid} on" in second.text() and "which is gone" in second.text()
    assert "process    none" in zygote.run("status", f"run={run}")


def record_of_another_host(folder: Path) -> dict[str, object]:
    folder.mkdir()
    record = {"host": "node17", "pid": 4711, "token": "0" * 32, "beat": 1}
    (folder / LOCK).write_text(json.dumps(record).ljust(256))
    return record


def test_an_owner_on_another_host_whose_beat_moves_is_left_alone(zygote, tmp_path):
    """The lock itself is free, as on a file system that keeps locks to one host."""
    run, stop = tmp_path / "run", threading.Event()
    record = record_of_another_host(run)

    def beat() -> None:
        while not stop.wait(0.1):
            record["beat"] += 1
            with open(run / LOCK, "r+") as file:
                file.write(json.dumps(record).ljust(256))

    other = threading.Thread(target=beat)
    other.start()
    try:
        text = zygote.run(*train(run), code=2, before=QUICK)
    finally:
        stop.set()
        other.join()
    assert "process 4711 on node17 writes to it" in one_line(text)
    assert [path.name for path in run.iterdir()] == [LOCK]


def test_an_owner_on_another_host_that_stands_still_is_replaced_with_a_warning(zygote, tmp_path):
    run = tmp_path / "run"
    record_of_another_host(run)
    started = time.monotonic()
    text = zygote.run(*train(run), before=QUICK, plots=False)
    assert "taken over from process 4711 on node17" in text
    assert time.monotonic() - started > 5 * 0.2, "it was watched"
    assert whole_steps(run)[-1] == 40


def test_a_process_that_was_frozen_while_another_took_over_writes_nothing_when_it_wakes(zygote, tmp_path):
    """Where the file system has no locks (flock fails with ENOLCK) the beat alone decides."""
    needs_strace()
    run, reference = tmp_path / "run", tmp_path / "reference"
    zygote.run(*train(reference), plots=False)
    save = Gate(tmp_path / "save", "sae_train.checkpoint:committed_folder", 4)
    frozen = zygote.start(*train(run), before=QUICK + WAIT + save.before, plots=False)
    save.reached(4, frozen)
    frozen.send(signal.SIGSTOP)
    take = Gate(tmp_path / "take", TAKE, 1)
    second = zygote.start(*train(run), before=QUICK + take.before, plots=False)
    with strace(take.reached(1, second), "-e", "trace=flock", "-e", "inject=flock:error=ENOLCK"):
        take.open(1)
        wait_until(lambda: "taken over from" in second.text(), "the takeover", second)
    assert "has no locks" in second.text() and f"process {frozen.pid} on" in second.text()
    assert second.wait() == 0, second.text()
    after = whole_tree(run)
    save.open(4)
    frozen.send(signal.SIGCONT)
    assert frozen.wait() == 75, frozen.text()
    assert "taken over by" in one_line(frozen.text()), frozen.text()
    assert "was taken over by" in frozen.text()
    for name, content in whole_tree(run).items():
        assert name == "train.log" or content == after[name], name
    assert differences(final_state(run), final_state(reference)) == []


def test_of_two_commands_that_find_a_folder_without_locks_free_at_once_one_leaves_it(zygote, tmp_path):
    needs_strace()
    run = tmp_path / "run"
    takes = [Gate(tmp_path / f"take-{i}", TAKE, 1) for i in range(2)]
    starts = [Gate(tmp_path / f"start-{i}", "sae_train.cli.folder:Ownership.start", 1) for i in range(2)]
    one_s = "import sae_train.cli.folder as f; f.BEAT_S = 1.0\n"
    both = [
        zygote.start(*train(run, ENDLESS), before=one_s + take.before + start.before)
        for take, start in zip(takes, starts, strict=True)
    ]
    threads = [take.reached(1, process) for take, process in zip(takes, both, strict=True)]
    fault = ("-e", "trace=flock", "-e", "inject=flock:error=ENOLCK")
    with strace(threads[0], *fault), strace(threads[1], *fault):
        for gates in (takes, starts):  # each has seen that nobody is there before either says that it is
            for gate, process in zip(gates, both, strict=True):
                gate.reached(1, process)
            for gate in gates:
                gate.open(1)
        wait_until(lambda: any(p.poll() is not None for p in both), "one of them is refused")
        loser, winner = sorted(both, key=lambda p: p.poll() is None)
        assert loser.poll() == 2, loser.text()
        assert f"process {winner.pid} on" in one_line(loser.text())
    winner.wait_for_step(run, 6)
    winner.send(signal.SIGTERM)
    assert winner.wait() == 75, winner.text()


def test_a_killed_run_leaves_no_process_behind(zygote, tiny, tmp_path):
    """From a live model, whose rows a thread makes ahead."""
    run = tmp_path / "run"
    process = zygote.start("train", *tiny, "train.tokens=64000", "corpus.epochs=4000", f"run.dir={run}")
    process.wait_for_step(run, 4)
    session = os.getsid(process.pid)
    assert session == process.pid
    process.send(signal.SIGKILL)
    process.wait()

    def alive() -> list[int]:
        found = []
        for pid in psutil.pids():
            try:
                if os.getsid(pid) == session and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                    found.append(pid)
            except (ProcessLookupError, psutil.NoSuchProcess):
                continue
        return found

    wait_until(lambda: not alive(), "no process of its session", timeout_s=50)


BREAK_HARVEST = """
import sae_train.harvest.stream as s
make, calls = s.StreamRows.next_rows, [0]
def broken(self, *args, **kwargs):
    calls[0] += 1
    if calls[0] == 4:
        raise RuntimeError("the hook fell off")
    return make(self, *args, **kwargs)
s.StreamRows.next_rows = broken
"""


def test_an_error_in_the_thread_that_harvests_ends_the_run_naming_it(zygote, tiny, tmp_path):
    run = tmp_path / "run"
    process = zygote.start("train", *tiny, "train.tokens=64000", f"run.dir={run}", before=BREAK_HARVEST)
    assert process.wait() not in (0, 75), process.text()
    assert "the hook fell off" in one_line(process.text().replace("Traceback", ""))
    assert whole_steps(run)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff" * 300, b"[]", b"x" * 5000])
def test_a_damaged_record_keeps_nobody_out(tmp_path, content):
    (tmp_path / LOCK).write_bytes(content)
    with owned("run.dir", tmp_path) as ownership:
        ownership.check()
        assert json.loads((tmp_path / LOCK).read_bytes()[:256])["pid"] == os.getpid()
    assert (tmp_path / LOCK).read_bytes() == b""


def test_a_link_planted_under_the_name_of_the_lock_is_refused_and_not_followed(tmp_path):
    (tmp_path / "precious").write_text("x")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).symlink_to(tmp_path / "precious")
    with pytest.raises(InputError, match=r"run\.dir="), owned("run.dir", tmp_path / "run"):
        pass
    assert (tmp_path / "precious").read_text() == "x"
