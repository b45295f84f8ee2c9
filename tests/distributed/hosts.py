"""Two hosts on one machine: network namespaces with names and addresses of their own, and a cable between.

A host is a process that holds its namespaces: network, hostname, mounts for its own /etc/hosts. Nothing of it
has a name outside, so tests do not meet each other's hosts, and with the holder it is all gone. Folders are
those of the machine, as on a network file system.
"""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import psutil

ADDRESSES = {"hosta": "10.99.0.1", "hostb": "10.99.0.2"}
"""Inside their own namespaces only."""
CABLE = "eth0"


class Host:
    """A host; what runs there dies with `shut`."""

    def __init__(self, name: str, table: Path, address: str | None = None) -> None:
        self.name, self.address = name, address or ADDRESSES[name]
        script = (
            f"hostname {name} && mount --bind {table} /etc/hosts && ip link set lo up && echo up && exec cat"
        )
        self.holder = subprocess.Popen(
            ["unshare", "--net", "--uts", "--mount", "sh", "-c", script],
            stdin=subprocess.PIPE,  # it reads until this end is closed, so it cannot outlive the test
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # Ctrl-C is for the tests, which then take everything down
        )
        assert self.holder.stdout is not None
        assert (said := self.holder.stdout.readline()) == "up\n", said

    def within(self, *command: str) -> list[str]:
        """A command line that runs a command on this host."""
        return ["nsenter", f"--target={self.holder.pid}", "--net", "--uts", "--mount", *command]

    def ip(self, *args: str) -> None:
        subprocess.run(self.within("ip", *args), check=True, capture_output=True)

    def enter(self) -> str:
        """Code for `before=`: this process moves to this host. It must not have threads yet."""
        return f"""
import ctypes, os
for kind in ("net", "uts", "mnt"):
    handle = os.open("/proc/{self.holder.pid}/ns/" + kind, os.O_RDONLY)
    here = os.getcwd()
    if ctypes.CDLL(None, use_errno=True).setns(handle, 0):
        raise OSError(ctypes.get_errno(), "setns " + kind)
    os.close(handle)
    os.chdir(here)
"""

    def cut(self) -> None:
        self.ip("link", "set", CABLE, "down")

    def mend(self) -> None:
        self.ip("link", "set", CABLE, "up")

    def processes(self) -> list[psutil.Process]:
        """What runs here, the holder left out."""
        own = os.stat(f"/proc/{self.holder.pid}/ns/net").st_ino
        found = []
        for process in psutil.process_iter():
            try:
                here = os.stat(f"/proc/{process.pid}/ns/net").st_ino == own
            except OSError:
                continue
            if here and process.pid != self.holder.pid:
                found.append(process)
        return found

    def shut(self) -> None:
        for process in self.processes():
            process.send_signal(signal.SIGKILL)
        self.holder.communicate()


def refusal() -> str | None:
    """Why this machine can have no such hosts; None where it can."""
    for tool in ("unshare", "nsenter", "ip"):
        if shutil.which(tool) is None:
            return f"there is no {tool}"
    tried = subprocess.run(
        [
            "unshare",
            "--net",
            "--uts",
            "--mount",
            "sh",
            "-c",
            "hostname x && ip link add name x0 type veth peer name x1",
        ],
        capture_output=True,
        text=True,
    )
    return None if tried.returncode == 0 else f"no namespaces here: {tried.stderr.strip()}"


def connected(folder: Path) -> list[Host]:
    """Two hosts that reach each other by address and by name."""
    table = folder / "hosts"
    table.write_text("127.0.0.1 localhost\n" + "".join(f"{ip} {name}\n" for name, ip in ADDRESSES.items()))
    hosts = [Host(name, table) for name in ADDRESSES]
    a, b = (str(host.holder.pid) for host in hosts)
    hosts[0].ip("link", "add", CABLE, "netns", a, "type", "veth", "peer", "name", CABLE, "netns", b)
    for host in hosts:
        host.ip("address", "add", f"{host.address}/24", "dev", CABLE)
        host.mend()
    return hosts
