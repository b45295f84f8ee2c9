"""Jobs as processes of this machine, and what is written down of them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from sae_train.errors import InputError
from sae_train.files import CorruptFile
from sae_train.launch import local
from sae_train.launch.base import Job, Started
from sae_train.launch.config import LaunchConfig
from sae_train.launch.local import Local
from sae_train.launch.record import legs_file, read_jobs, read_legs

WAITS = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
open(sys.argv[2], "x").close()
time.sleep(300)
"""
EXITS = "import sys; print('said', sys.argv[2:]); sys.exit(int(sys.argv[2]))"
SHOWS = """
import os
print(os.environ["CUDA_VISIBLE_DEVICES"], os.environ["SAE_TRAIN_JOB"], os.getsid(0) == os.getpid())
"""


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Has jobs be this Python code. A process is known again by the word sae_train in its command line."""
    return lambda code: monkeypatch.setattr(local, "PROGRAM", (sys.executable, "-c", code, "sae_train"))


@pytest.fixture
def launcher() -> Iterator[Callable[..., Local]]:
    made: list[Local] = []

    def make(parallel: int = 2) -> Local:
        made.append(Local(LaunchConfig(parallel=parallel)))
        return made[-1]

    yield make
    for one in made:
        one.leave()


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def ended(launcher: Local, jobs: list[Started]) -> list[str]:
    until(lambda: not {"waiting", "running"} & set(launcher.states(jobs)))
    return list(launcher.states(jobs))


def test_jobs_end_as_their_exit_codes_say_and_leave_log_legs_and_record(program, launcher, tmp_path):
    program(EXITS)
    one = launcher()
    jobs = one.submit([Job(f"job-{code}", (str(code), "a b")) for code in (0, 75, 2)], tmp_path)
    assert ended(one, jobs) == ["done", "stopped", "failed"]
    assert jobs[1].log.read_text() == "said ['75', 'a b']\n"
    assert read_legs(jobs[1].log).code == 75
    assert read_jobs(tmp_path) == {"local": jobs}
    assert launcher().states(jobs) == ["done", "stopped", "failed"]  # another process knows it from the files


def test_no_more_than_so_many_run_at_once_and_the_first_comes_first(program, launcher, tmp_path):
    program(WAITS)
    one = launcher(2)
    jobs = one.submit([Job(f"job-{i}", (str(tmp_path / f"up-{i}"),)) for i in range(3)], tmp_path)
    until(lambda: (tmp_path / "up-1").exists() and (tmp_path / "up-0").exists())
    assert one.states(jobs) == ["running", "running", "waiting"]
    one.cancel(jobs[:1])
    until(lambda: (tmp_path / "up-2").exists() or one.states(jobs)[0] == "running")
    until(lambda: one.states(jobs) == ["stopped", "running", "running"])
    (late,) = one.submit([Job("late", (str(tmp_path / "up-late"),))], tmp_path)
    assert one.states([late]) == ["waiting"]
    one.cancel([late])
    until((tmp_path / "up-2").exists)
    one.cancel(jobs[1:])
    until(lambda: one.states(jobs) == ["stopped"] * 3)
    assert one.states([late]) == ["cancelled"] and not late.log.exists()


@pytest.mark.parametrize(("code", "state"), [(0, "done"), (75, "cancelled"), (2, "cancelled")])
def test_a_job_that_waits_for_another_starts_only_if_that_is_done(code, state, program, launcher, tmp_path):
    program(EXITS)
    one = launcher()
    (first,) = one.submit([Job("first", (str(code),))], tmp_path)
    (second,) = one.submit([Job("second", ("0",))], tmp_path, after=[first.id])
    assert ended(one, [first, second])[1] == state
    assert second.log.exists() == (state == "done")


def test_who_leaves_has_its_jobs_save_first(program, launcher, tmp_path):
    program(WAITS)
    one = launcher(1)
    jobs = one.submit([Job(name, (str(tmp_path / f"up-{name}"),)) for name in ("a", "b")], tmp_path)
    until((tmp_path / "up-a").exists)
    one.leave()
    assert read_legs(jobs[0].log).code == 75
    assert launcher().states(jobs) == ["stopped", "cancelled"]


def test_jobs_of_a_launcher_that_was_killed_are_found_again(program, launcher, tmp_path):
    code = f"""
import sys, time
from pathlib import Path
from sae_train.launch import local
from sae_train.launch.base import Job
from sae_train.launch.config import LaunchConfig
local.PROGRAM = ({sys.executable!r}, "-c", {WAITS!r}, "sae_train")
local.Local(LaunchConfig()).submit([Job("a", ({str(tmp_path / "up")!r},))], Path({str(tmp_path)!r}))
time.sleep(60)
"""
    killed = subprocess.Popen([sys.executable, "-c", code])
    until((tmp_path / "up").exists)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    program(WAITS)
    one = launcher(1)
    (old,) = read_jobs(tmp_path)["local"]
    assert one.states([old]) == ["running"]
    with pytest.raises(InputError, match="not running"):
        one.submit([old.job], tmp_path)
    (new,) = one.submit([Job("b", (str(tmp_path / "up-b"),))], tmp_path)
    assert one.states([old, new]) == ["running", "waiting"]
    one.cancel([old])
    until(lambda: one.states([old, new]) == ["stopped", "running"])


@pytest.mark.parametrize("whose", ["another program", "another host", "a process that was not waited for"])
def test_a_process_that_only_has_the_number_of_a_job_is_not_it(whose, program, launcher, tmp_path):
    program(EXITS)
    one = launcher()
    (job,) = one.submit([Job("a", ("0",))], tmp_path)
    assert ended(one, [job]) == ["done"]
    name = "sae_train" if whose == "another host" else "else"
    host = "elsewhere" if whose == "another host" else os.uname().nodename
    code = "0" if whose.startswith("a process") else "import time; time.sleep(300)"
    other = subprocess.Popen([sys.executable, "-c", code, name])
    if code == "0":
        until(lambda: psutil.Process(other.pid).status() == psutil.STATUS_ZOMBIE)
    legs_file(job.log).write_text(f"started 2026-11-22T00:00:00Z {host} {other.pid}\n")
    try:
        again = launcher()
        assert again.states([job]) == ["stopped"]
        again.cancel([job])
        assert other.poll() is None or code == "0"
    finally:
        other.kill()
        other.wait()


def test_a_job_sees_one_gpu_and_the_one_beside_it_another(program, launcher, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    program(SHOWS)
    one = launcher(2)
    jobs = one.submit([Job("a", ()), Job("b", ())], tmp_path)
    assert ended(one, jobs) == ["done", "done"]
    assert [job.log.read_text() for job in jobs] == ["5 a True\n", "7 b True\n"]


def test_a_job_submitted_again_has_one_record_and_counts_its_starts(program, launcher, tmp_path):
    program(EXITS)
    one = launcher()
    for code in ("75", "0"):
        (job,) = one.submit([Job("a", (code,))], tmp_path)
        ended(one, [job])
    assert read_jobs(tmp_path) == {"local": [job]}
    legs = read_legs(job.log)
    assert (legs.starts, legs.code, legs.host) == (2, 0, os.uname().nodename)


@pytest.mark.parametrize(
    "damage",
    [
        lambda told: told.update(format=99),
        lambda told: told.update(jobs={}),
        lambda told: told["jobs"][0].update(log="../../etc/passwd"),
        lambda told: told["jobs"][0].update(log="/etc/passwd"),
        lambda told: told["jobs"][0].update(args=[1]),
        lambda told: told["jobs"][0].pop("id"),
    ],
)
def test_a_record_that_is_not_ours_is_refused(damage, program, launcher, tmp_path):
    program(EXITS)
    one = launcher()
    ended(one, one.submit([Job("a", ("0",))], tmp_path))
    told = json.loads((tmp_path / "jobs.json").read_text())
    damage(told)
    (tmp_path / "jobs.json").write_text(json.dumps(told))
    with pytest.raises((InputError, CorruptFile)):
        read_jobs(tmp_path)


@pytest.mark.parametrize(
    "line", ["", "started", "ended x y", "\x00", "started a b c", "ended 2026 --", "ended 2026 99x"]
)
def test_half_a_line_of_the_legs_is_passed_over(line, tmp_path):
    log = Path(tmp_path, "a.log")
    log.with_suffix(".legs").write_text(f"started 2026 host 7\n{line}")
    legs = read_legs(log)
    assert (legs.starts, legs.host, legs.process, legs.code) == (1, "host", 7, None)
