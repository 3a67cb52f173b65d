"""Hosts in network namespaces of their own: a cluster whose machines share nothing but a switch and a folder.

Every host has its own network with one address, its own processes, host name, shared memory, home and temporary files.
The rest of the disk is seen by all, as a mounted file system would be. Names resolve as Debian sets them up: the own
name to 127.0.1.1, which no other host can reach. Needs root, iproute2 and util-linux; nothing of the machine's own
network is touched.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from tests.ray.conftest import ENVIRONMENT

PORT = 6379
PRIVATE = "/var/tmp"
"""Where a host keeps what the others cannot see."""
START_TIMEOUT_S = 120
UNSHARE = ("unshare", "--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--mount-proc")
PREPARE = """
set -e
hostname {name}
mount --bind {private} {place}
mount --bind {private}/hosts /etc/hosts
mount -t tmpfs -o size=512m tmpfs /dev/shm
ip link set lo up
touch {private}/ready
exec sleep infinity
"""
SWITCH = "ip link set lo up; ip link add switch type bridge; ip link set switch up; exec sleep infinity"


def why_not() -> str | None:
    """Return why hosts cannot be made here, or None where they can."""
    for tool in ("unshare", "nsenter", "ip"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    tried = subprocess.run([*UNSHARE, "true"], capture_output=True)
    return f"no namespaces here: {tried.stderr.decode().strip()}" if tried.returncode else None


class Space:
    """A set of namespaces, held by its first process; with that process all others in it end."""

    def __init__(self, script: str) -> None:
        # A killed first process makes unshare complain of a signal.
        self._outer = subprocess.Popen([*UNSHARE, "sh", "-c", script], stderr=subprocess.DEVNULL)
        give_up = time.monotonic() + START_TIMEOUT_S
        while not (found := psutil.Process(self._outer.pid).children()):
            assert time.monotonic() < give_up, "unshare started nothing"
            time.sleep(0.01)  # polls another process, as below; nothing is asserted on time
        self._first = found[0]
        while self._first.name() != "sleep":
            assert time.monotonic() < give_up, "the namespace was not made ready"
            assert self._outer.poll() is None, "the namespace could not be made ready"
            time.sleep(0.01)

    @property
    def pid(self) -> int:
        return self._first.pid

    def enter(self, *command: str) -> list[str]:
        """Return a command as it is run inside."""
        return ["nsenter", "--target", str(self.pid), "--all", "--wd=.", *command]

    def call(self, *command: str) -> None:
        subprocess.run(self.enter(*command), check=True)

    def end(self) -> None:
        """End every process in it at once, as a power cut does."""
        if self._outer.poll() is None:
            self._first.kill()
            self._outer.wait(30)


class Host:
    """One machine of the cluster."""

    def __init__(self, switch: Space, number: int, private: Path) -> None:
        self.name, self.address, self._port = f"host{number}", f"10.77.0.{number}", f"port{number}"
        self._switch = switch
        private.mkdir()
        (private / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {self.name}\n")
        self.space = Space(PREPARE.format(name=self.name, private=private, place=PRIVATE))
        plug = ["ip", "link", "add", self._port, "netns", str(switch.pid), "type", "veth"]
        subprocess.run([*plug, "peer", "name", "eth7", "netns", str(self.space.pid)], check=True)
        switch.call("ip", "link", "set", self._port, "master", "switch", "up")
        self.space.call("ip", "address", "add", f"{self.address}/24", "dev", "eth7")
        self.space.call("ip", "link", "set", "eth7", "up")
        self._log = private / "log"

    def run(self, command: Sequence[str], **environment: str) -> subprocess.Popen:
        """Start a command on this host; its output goes to a file."""
        variables = {
            "PATH": os.environ["PATH"],
            "HOME": PRIVATE,
            "TMPDIR": PRIVATE,
            **ENVIRONMENT,
            **environment,
        }
        with self._log.open("ab") as out:
            return subprocess.Popen(self.space.enter(*command), stdout=out, stderr=out, env=variables)

    def output(self) -> str:
        return self._log.read_text()

    def unplug(self) -> None:
        """Cut this host off: its processes go on and reach nobody."""
        self._switch.call("ip", "link", "set", self._port, "down")

    def plug(self) -> None:
        self._switch.call("ip", "link", "set", self._port, "up")

    def power_off(self) -> None:
        self.space.end()


class Hosts:
    """A switch and the hosts on it."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._switch, self.all = folder, Space(SWITCH), []

    def add(self) -> Host:
        host = Host(self._switch, len(self.all) + 1, self._folder / f"private{len(self.all) + 1}")
        self.all.append(host)
        return host

    def close(self) -> None:
        for host in self.all:
            host.power_off()
        self._switch.end()


def start_ray(host: Host, num_cpus: int, head: Host | None = None, **environment: str) -> None:
    """Start Ray on a host, a head where none is named, and wait until it is up."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", f"--node-ip-address={host.address}"]
    command += [f"--num-cpus={num_cpus}", "--num-gpus=0", "--object-store-memory=100000000"]
    if head is None:
        command += ["--head", f"--port={PORT}", "--dashboard-host=127.0.0.1", f"--temp-dir={PRIVATE}/ray"]
    else:
        command += [f"--address={head.address}:{PORT}"]
    started = host.run(command, **environment)
    assert started.wait(START_TIMEOUT_S) == 0, host.output()
