"""A real Slurm on one machine: a controller and two nodes with two fake GPUs each, on hosts of their own.

    host ctl    slurmctld, slurmdbd and its MariaDB     10.99.0.254, the bridge between all
    host n1     slurmd, 4 cores, 2 GPUs                 10.99.0.1
    host n2     the same                                10.99.0.2

Hosts are network namespaces (`distributed/hosts.py`), so nothing of it is seen outside and several can run
beside each other. Everything it writes is in one folder; daemons die with the test process, however that
ends. `commands` is a folder for PATH: Slurm's commands, each run on the controller.
"""

import os
import shutil
import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from distributed.hosts import Host
from distributed.hosts import refusal as no_hosts

ADDRESSES = {"ctl": "10.99.0.254", "n1": "10.99.0.1", "n2": "10.99.0.2"}
NODES = ("n1", "n2")
NEEDED = ("slurmctld", "slurmd", "slurmdbd", "munged", "mariadbd", "mariadb-install-db", "mariadb", "setpriv")
COMMANDS = ("sbatch", "squeue", "sacct", "scancel", "scontrol", "sinfo", "srun", "sacctmgr")
KILL_WAIT_S = 30
GRACE_S = 60
"""Between the first SIGTERM of a preemption and the second, if the job is still there."""

CONF = """\
ClusterName=test
SlurmctldHost=ctl(10.99.0.254)
SlurmctldPort=16817
SlurmdPort=16818
SlurmUser=root
AuthInfo=socket={folder}/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=100000,batch_sched_delay=0
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=16819
AccountingStoragePass={folder}/munge.sock
ReturnToService=2
SlurmdParameters=config_overrides
SlurmdTimeout=15
KillWait={kill_wait}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName=n1 NodeAddr=10.99.0.1 CPUs=4 RealMemory=8000 Gres=gpu:2
NodeName=n2 NodeAddr=10.99.0.2 CPUs=4 RealMemory=8000 Gres=gpu:2
PartitionName=low Nodes=n[1-2] Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace}
PartitionName=high Nodes=n[1-2] PriorityTier=10 PreemptMode=OFF
"""
# cred_expire: a requeued job waits so long and a second more (120 by default; less than 5 counts as that).
# config_overrides: two cores may pose as eight. linuxproc, none, none: without cgroups, for containers.
DATABASE_CONF = """\
AuthInfo=socket={folder}/munge.sock
DbdHost=ctl
DbdAddr=127.0.0.1
DbdPort=16819
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=13306
StorageUser=slurm
StoragePass=x
StorageLoc=slurm_acct
PidFile={folder}/slurmdbd.pid
"""
GRANTS = "".join(
    f"create user slurm@'{host}' identified by 'x'; grant all on slurm_acct.* to slurm@'{host}';"
    for host in ("127.0.0.1", "localhost")
)


def refusal() -> str | None:
    """Why there can be no such cluster here; None where there can."""
    if os.geteuid() != 0:
        return "Slurm on hosts of its own needs root"
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = [tool for tool in NEEDED + COMMANDS if shutil.which(tool, path=path) is None]
    if missing:
        packages = "slurmctld slurmd slurm-client munge slurmdbd mariadb-server iproute2"
        return f"there is no {', '.join(missing)} (apt-get install {packages})"
    return no_hosts()


def wait_until(true: Callable[[], bool], what: str, timeout_s: float = 240) -> None:
    """Wait, looking often; says what it waited for in vain."""
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, f"{what}: not in {timeout_s} s"
        time.sleep(0.2)


class Cluster:
    """The cluster; `shut` ends everything."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.commands = folder / "bin"
        self.hosts: dict[str, Host] = {}
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def path(self) -> str:
        """PATH with Slurm's commands first."""
        return f"{self.commands}:{os.environ['PATH']}"

    def start(self) -> None:
        for name in ("bin", "state", "db", "spool-n1", "spool-n2"):
            (self.folder / name).mkdir()
        self._connect()
        self._configure()
        self._start_accounts()
        self._daemon("slurmctld", "ctl", "slurmctld", "-D", "-c")
        for node in NODES:
            self.start_node(node)
        wait_until(
            lambda: self.ask("sinfo", "-h", "-N", "-p", "low", "-o", "%T").split() == ["idle"] * 2, "nodes"
        )

    def start_node(self, node: str) -> None:
        self._daemon(node, node, "slurmd", "-D", "-N", node)

    def ask(self, *words: str, check: bool = True) -> str:
        """What a command of Slurm prints."""
        done = subprocess.run([self.commands / words[0], *words[1:]], capture_output=True, text=True)
        assert done.returncode == 0 or not check, f"{words}: {done.stderr}\n{self.logs()}"
        return done.stdout

    def field(self, job: str, name: str) -> str:
        """A field of `scontrol show job`, or "" once it is forgotten."""
        words = self.ask("scontrol", "-o", "show", "job", job, check=False).split()
        return next((word.partition("=")[2] for word in words if word.startswith(f"{name}=")), "")

    def state(self, job: str) -> str:
        return self.field(job, "JobState")

    def wait_for(self, job: str, *states: str, timeout_s: float = 90) -> None:
        wait_until(lambda: self.state(job) in states, f"job {job} {states}, is {self.state(job)}", timeout_s)

    def clear(self) -> None:
        """End every job, and wait until nothing of them is left."""
        if self.ask("squeue", "-h"):
            self.ask("scancel", "--user=root", "--full")
            wait_until(lambda: not self.ask("squeue", "-h"), "an empty queue")

    def logs(self) -> str:
        """The end of what each daemon said."""
        found = sorted(self.folder.glob("*.out"))
        return "\n".join(f"== {p.name}\n{p.read_text(errors='replace')[-2000:]}" for p in found)

    def shut(self) -> None:
        """Jobs first: a daemon that is gone cannot end its own."""
        try:
            if "slurmctld" in self.daemons:
                self.clear()
        finally:
            for daemon in reversed(self.daemons.values()):
                daemon.terminate()
            for daemon in self.daemons.values():
                try:
                    daemon.wait(10)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()
            for host in self.hosts.values():
                host.shut()

    def _connect(self) -> None:
        table = self.folder / "hosts"
        table.write_text(
            "127.0.0.1 localhost\n" + "".join(f"{ip} {name}\n" for name, ip in ADDRESSES.items())
        )
        for name, address in ADDRESSES.items():
            self.hosts[name] = Host(name, table, address)
        ctl = self.hosts["ctl"]
        ctl.ip("link", "add", "br0", "type", "bridge")
        ctl.ip("address", "add", f"{ctl.address}/24", "dev", "br0")
        ctl.ip("link", "set", "br0", "up")
        for name in NODES:
            node, pid = self.hosts[name], str(self.hosts[name].holder.pid)
            ctl.ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", pid)
            ctl.ip("link", "set", name, "master", "br0", "up")
            node.ip("address", "add", f"{node.address}/24", "dev", "eth0")
            node.mend()

    def _configure(self) -> None:
        told = {"folder": self.folder, "kill_wait": KILL_WAIT_S, "grace": GRACE_S}
        (self.folder / "slurm.conf").write_text(CONF.format(**told))
        private = self.folder / "slurmdbd.conf"
        private.touch(mode=0o600)
        private.write_text(DATABASE_CONF.format(**told))
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        for i in range(2):
            os.mknod(
                self.folder / f"gpu{i}", 0o666 | stat.S_IFCHR, os.makedev(1, 3)
            )  # as /dev/null: a plain file is refused
        (self.folder / "gres.conf").write_text(f"NodeName=n[1-2] Name=gpu File={self.folder}/gpu[0-1]\n")
        for name in COMMANDS:
            script = self.folder / "bin" / name
            inside = " ".join(self.hosts["ctl"].within(f"--wdns={'$PWD'}", f"/usr/bin/{name}"))
            script.write_text(f'#!/bin/sh\nSLURM_CONF={self.folder}/slurm.conf exec {inside} "$@"\n')
            script.chmod(0o755)

    def _start_accounts(self) -> None:
        at = self.folder
        files = [f"--{kind}={at}/munge.{end}" for kind, end in (("key-file", "key"), ("socket", "sock"))]
        files += [f"--{kind}={at}/munge.{end}" for kind, end in (("pid-file", "pid"), ("seed-file", "seed"))]
        self._daemon("munge", None, "munged", "--foreground", "--force", f"--log-file={at}/munge.log", *files)
        own = ["--no-defaults", "--user=root", f"--datadir={at}/db"]
        made = ["mariadb-install-db", *own, "--auth-root-authentication-method=normal", "--skip-test-db"]
        subprocess.run(made, check=True, capture_output=True)
        own += [f"--socket={at}/db.sock", f"--pid-file={at}/db.pid", "--innodb-buffer-pool-size=64M"]
        self._daemon("mariadb", "ctl", "mariadbd", *own, "--bind-address=127.0.0.1", "--port=13306")
        sql = ["mariadb", "--no-defaults", f"--socket={at}/db.sock", "--user=root", "--execute"]
        wait_until(lambda: subprocess.run([*sql, "select 1"], capture_output=True).returncode == 0, "MariaDB")
        subprocess.run([*sql, f"create database slurm_acct; {GRANTS}"], check=True)
        self._daemon("slurmdbd", "ctl", "slurmdbd", "-D")
        asked = [self.commands / "sacctmgr", "-n", "show", "cluster"]
        wait_until(lambda: subprocess.run(asked, capture_output=True).returncode == 0, "slurmdbd")
        self.ask("sacctmgr", "-i", "add", "cluster", "test")

    def _daemon(self, name: str, host: str | None, *command: str) -> None:
        bound = ["setpriv", "--pdeathsig=KILL", *command]
        with open(self.folder / f"{name}.out", "ab") as out:
            self.daemons[name] = subprocess.Popen(
                bound if host is None else self.hosts[host].within(*bound),
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                stdout=out,
                stderr=out,
                cwd=self.folder,
                env={
                    **os.environ,
                    "SLURM_CONF": str(self.folder / "slurm.conf"),
                    "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
                },
            )
