"""Runs on two hosts: the cable between them is cut, one host's process is killed, torchrun itself goes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from distributed.hosts import CABLE, Host, connected, refusal
from faults.tools import SYNTHETIC, at_step, differences, final_state, newest, resumed_at, send

GRID = "grid={k: [2, 4], seed: [0, 1]}"
C10D = ("--rdzv-backend=c10d", "--rdzv-endpoint=hosta:29400", "--rdzv-id=run")
TIMEOUT_S = 5
SHORT = ["source.lanes=4", GRID, "train.tokens=1280", "eval.every=20", f"mesh.timeout_s={TIMEOUT_S}"]
"""40 steps, a checkpoint every 5th."""


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[list[Host]]:
    if (why := refusal()) is not None:
        pytest.skip(why)
    made = connected(tmp_path)
    yield made
    for host in made:
        host.shut()


def once(marker: Path, step: int, action: str) -> str:
    """Code for `before=`: run `action` in this step, but never again; the file says when it was."""
    note = f"open({str(marker)!r}, 'x').write(str(time.monotonic()))"
    return at_step(step, f"if not os.path.exists({str(marker)!r}):\n        {note}; {action}")


CUT = f"import subprocess; subprocess.run(['ip', 'link', 'set', '{CABLE}', 'down'], check=True)"


class Agent:
    """torchrun on one host; its worker runs Python first, then the command, and notes how it ended."""

    def __init__(
        self,
        host: Host,
        folder: Path,
        args: list[str],
        options: list[str],
        before: str = "",
        meet: Sequence[str] = ("--nnodes=2", *C10D),
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder / host.name
        self.folder.mkdir(exist_ok=True)
        script = self.folder / "worker.py"
        script.write_text(f"""{before}
import os, sys, time
from pathlib import Path
from matplotlib.figure import Figure
Figure.savefig = lambda self, path, **kwargs: Path(path).touch()
from sae_train.cli.main import main
with open({str(self.folder / "sizes")!r}, "a") as sizes:
    print(os.environ["WORLD_SIZE"], file=sizes)
code = main(["train", *{args!r}])
with open({str(self.folder / "ends")!r}, "a") as ends:
    print(code, time.monotonic(), file=ends)
sys.exit(code)
""")
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=1", *meet, *options, str(script)]
        with open(self.folder / "out.txt", "a") as out:
            self.process = subprocess.Popen(
                host.within(f"--wdns={os.getcwd()}", sys.executable, *torchrun),
                stdout=out,
                stderr=out,
                env=os.environ | {"OMP_NUM_THREADS": "1"} | dict(env or {}),
            )

    def text(self) -> str:
        return (self.folder / "out.txt").read_text(errors="replace")

    def sizes(self) -> list[str]:
        """Of how many processes its worker was one, each time it was started."""
        return (self.folder / "sizes").read_text().split()

    def wait_for_end(self, timeout_s: float = 120) -> tuple[int, float]:
        """(exit code, when) of the first worker."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            path = self.folder / "ends"
            lines = path.read_text().splitlines() if path.exists() else []
            if lines and len(parts := lines[0].split()) == 2:
                return int(parts[0]), float(parts[1])
            time.sleep(0.05)
        raise AssertionError(f"no end in {timeout_s} s: {self.text()}")


def test_a_cable_that_is_cut_ends_both_hosts_and_the_run_goes_on_when_it_is_mended(
    hosts, launch, zygote, tiny, tmp_path
):
    args = [*tiny, *SHORT]
    zygote.run("train", *args, f"run.dir={tmp_path / 'whole'}", plots=False)
    run, cut = tmp_path / "run", tmp_path / "cut"
    enter = {rank: host.enter() for rank, host in enumerate(hosts)}
    env = {"MASTER_ADDR": hosts[0].address}
    before = enter | {1: enter[1] + once(cut, 23, CUT)}
    texts = launch(2, "train", *args, f"run.dir={run}", before=before, env=env).wait(75)
    assert time.monotonic() - float(cut.read_text()) < TIMEOUT_S + 10
    for text in texts:
        line = text.strip().splitlines()[-1]
        assert "does not answer" in line and line.endswith("the same command continues")
        assert "Traceback" not in text
    hosts[1].mend()
    texts = launch(2, "train", *args, f"run.dir={run}", before=enter, env=env).wait(0)
    assert resumed_at(texts[0]) in (10, 15, 20)
    assert differences(final_state(tmp_path / "whole"), final_state(run)) == []


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_torchrun_on_two_hosts_survives_a_cut_cable_and_a_killed_process_to_the_same_bits(
    hosts, zygote, tiny, tmp_path
):
    """The agents are torch's: the one that is cut off from the store of the other takes minutes to leave."""
    args = [*tiny, *SHORT, f"run.dir={tmp_path / 'run'}"]
    zygote.run("train", *args[:-1], f"run.dir={tmp_path / 'whole'}", plots=False)
    cut, killed = tmp_path / "cut", tmp_path / "killed"
    agents = [
        Agent(host, tmp_path, args, ["--max-restarts=0"], once(cut, 13, CUT) if host is hosts[1] else "")
        for host in hosts
    ]
    ends = [agent.wait_for_end() for agent in agents]
    assert [code for code, _ in ends] == [75, 75]
    assert max(when for _, when in ends) - float(cut.read_text()) < TIMEOUT_S + 10
    assert agents[0].process.wait(60) == 1
    for agent in agents:
        assert "does not answer" in agent.text() and "the same command continues" in agent.text()
    for process in hosts[1].processes():
        process.send_signal(signal.SIGKILL)
    agents[1].process.wait(30)
    hosts[1].mend()
    kill = once(killed, 23, send(signal.SIGKILL))
    agents = [
        Agent(host, tmp_path, args, ["--max-restarts=3"], kill if host is hosts[1] else "") for host in hosts
    ]
    assert [agent.process.wait(150) for agent in agents] == [0, 0], agents[0].text() + agents[1].text()
    assert killed.exists()
    assert differences(final_state(tmp_path / "whole"), final_state(tmp_path / "run")) == []


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_when_the_torchrun_that_has_the_store_is_killed_the_processes_of_both_hosts_save_and_leave(
    hosts, tmp_path
):
    """The other host's torchrun misses the store and asks its process to stop; all agree on the step."""
    run, gone = tmp_path / "run", tmp_path / "gone"
    args = [*SYNTHETIC, *SHORT, "source.epochs=400", "train.tokens=640000", "eval.every=0", f"run.dir={run}"]
    kill = once(gone, 13, "os.kill(os.getppid(), 9)")
    agents = [Agent(host, tmp_path, args, [], kill if host is hosts[0] else "") for host in hosts]
    ends = [agent.wait_for_end() for agent in agents]
    assert [code for code, _ in ends] == [75, 75]
    assert agents[0].process.wait(30) == -9 and agents[1].process.wait(60) == 1
    step = newest(run)
    assert step is not None and step >= 13
    assert f"another process was asked to stop: saved at step {step}" in agents[0].text()
    assert f"received SIGTERM: saved at step {step}" in agents[1].text()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_hosts_that_join_and_leave_an_elastic_run_change_no_bit(hosts, zygote, tiny, tmp_path):
    """One host begins alone, another joins, dies whole, and the first goes on alone to the end."""
    args = [*tiny, *SHORT]
    zygote.run("train", *args, f"run.dir={tmp_path / 'whole'}", plots=False)
    joins, dies = tmp_path / "joins", tmp_path / "dies"
    first = once(
        joins, 8, "from sae_train import stop\n        while stop.reason() is None: time.sleep(0.05)"
    )
    last = once(dies, 23, "os.kill(os.getppid(), 9); os.kill(os.getpid(), 9)")
    options = ["--max-restarts=3", "--rdzv-conf=last_call_timeout=2"]
    meet, env = ("--nnodes=1:2", *C10D), {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    args.append(f"run.dir={tmp_path / 'run'}")
    stays = Agent(hosts[0], tmp_path, args, options, first, meet, env)
    while not joins.exists():
        assert stays.process.poll() is None, stays.text()
        time.sleep(0.05)
    goes = Agent(hosts[1], tmp_path, args, options, last, meet, env)
    assert goes.process.wait(120) == -9, goes.text()
    assert stays.process.wait(150) == 0, stays.text()
    assert (stays.sizes(), goes.sizes()) == (["1", "2", "1"], ["2"])
    assert differences(final_state(tmp_path / "whole"), final_state(tmp_path / "run")) == []


@pytest.mark.slow
def test_a_static_torchrun_on_two_hosts_gives_the_bits_of_one_process(hosts, zygote, tiny, tmp_path):
    args = [*tiny, *SHORT]
    zygote.run("train", *args, f"run.dir={tmp_path / 'whole'}", plots=False)
    args.append(f"run.dir={tmp_path / 'run'}")
    address = ("--nnodes=2", "--master-addr=hosta", "--master-port=29500")
    agents = [
        Agent(host, tmp_path, args, [], meet=(*address, f"--node-rank={rank}"))
        for rank, host in enumerate(hosts)
    ]
    assert [agent.process.wait(120) for agent in agents] == [0, 0], agents[0].text() + agents[1].text()
    assert [agent.sizes() for agent in agents] == [["2"], ["2"]]
    assert differences(final_state(tmp_path / "whole"), final_state(tmp_path / "run")) == []
