"""Hosts of their own on one machine: network namespaces joined by veth to a bridge in the first one's.

Processes are held by pid; nothing in the machine's own network changes, and the namespaces go when the test ends.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from processes import descendants, gone, send

PORT = 6399


def refused() -> str | None:
    """Why this machine does not allow namespaces; None: it does."""
    name = f"dm-{secrets.token_hex(3)}"
    try:
        done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, timeout=30)
    except FileNotFoundError:
        return "network namespaces: there is no `ip` command"
    if done.returncode:
        return f"network namespaces: {done.stderr.strip()}"
    ip("netns", "delete", name)
    return None


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=30)


class Network:
    """A head and any number of hosts, each a Ray node in a namespace."""

    def __init__(self, folder: Path):
        self.folder, self.id = folder, secrets.token_hex(2)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.names: list[str] = []
        self.added = 0
        self.address, self.dashboard = f"10.213.0.1:{PORT}", "http://10.213.0.1:8265"
        self._namespace("head")
        head = ("-n", self._name("head"))
        ip(*head, "link", "add", "hub", "type", "bridge")
        ip(*head, "addr", "add", "10.213.0.1/24", "dev", "hub")
        ip(*head, "link", "set", "hub", "up")
        words = [
            "--head",
            f"--port={PORT}",
            "--num-cpus=0",
            "--include-dashboard=true",
            "--dashboard-host=10.213.0.1",
        ]
        # a node that is cut off counts as dead after a few seconds, not after Ray's half minute
        health = {"RAY_health_check_period_ms": "1000", "RAY_health_check_failure_threshold": "5"}
        self._start("head", "10.213.0.1", [*words, f"--temp-dir={folder}"], health)

    def add(self, cpus: int) -> str:
        """Another host; its name."""
        self.added += 1
        name = f"host{self.added}"
        address = self.ip_of(name)
        self._plug(name, address)
        self._start(name, address, [f"--address={self.address}", f"--num-cpus={cpus}"], {})
        return name

    def ip_of(self, name: str) -> str:
        return f"10.213.0.{int(name.removeprefix('host')) + 1}"

    def add_desk(self) -> str:
        """A host without Ray: a person's own."""
        self._plug("desk", "10.213.0.250")
        return "desk"

    def limit(self, rate: str) -> None:
        """What each host may send and receive, by `tc tbf`: "100mbit"."""
        for number in range(1, self.added + 1):
            for place, device in ((f"host{number}", "eth0"), ("head", f"to-host{number}")):
                words = ["tc", "-n", self._name(place), "qdisc", "replace", "dev", device, "root", "tbf"]
                words += ["rate", rate, "burst", "64kb", "latency", "100ms"]
                subprocess.run(words, check=True, capture_output=True, text=True, timeout=30)

    def unplug(self, name: str) -> None:
        """Nothing reaches the host any more; its processes do not know."""
        ip("-n", self._name(name), "link", "set", "eth0", "down")

    def run(self, name: str, words: Sequence[str]) -> list[str]:
        """A command line that runs `words` on a host."""
        return ["ip", "netns", "exec", self._name(name), *words]

    def workers(self, name: str) -> int:
        """distmeta's workers on a host, by their pids."""
        from processes import worker_pids

        return len(worker_pids(self.processes[name].pid))

    def close(self) -> None:
        pids = [pid for p in self.processes.values() for pid in [p.pid, *descendants(p.pid)]]
        send(pids, signal.SIGKILL)
        for process in self.processes.values():
            process.wait(30)
        assert not gone(pids, 30)
        for name in self.names:
            ip("netns", "delete", self._name(name))

    def _name(self, name: str) -> str:
        return f"dm-{self.id}-{name}"

    def _plug(self, name: str, address: str) -> None:
        self._namespace(name)
        here, there, plug = ("-n", self._name("head")), ("-n", self._name(name)), f"to-{name}"
        ip(*here, "link", "add", plug, "type", "veth", "peer", "name", "eth0", "netns", self._name(name))
        ip(*here, "link", "set", plug, "master", "hub", "up")
        ip(*there, "addr", "add", f"{address}/24", "dev", "eth0")
        ip(*there, "link", "set", "eth0", "up")

    def _namespace(self, name: str) -> None:
        ip("netns", "add", self._name(name))
        self.names.append(name)
        ip("-n", self._name(name), "link", "set", "lo", "up")

    def _start(self, name: str, address: str, words: list[str], more: dict[str, str]) -> None:
        ray = Path(sys.executable).with_name("ray")
        environment = os.environ | {"PATH": f"{ray.parent}:{os.environ['PATH']}"} | more
        log, line = self.folder / f"{name}.log", list[str]()
        if name != "head":  # a disk of its own: nodes that share Ray's folder take each other's packages away
            own = self.folder / name
            own.mkdir()
            line = ["sh", "-c", f'mount --bind "{own}" "{self.folder}" && exec "$@"', "sh"]
        with log.open("w") as file:
            self.processes[name] = subprocess.Popen(
                self.run(name, [*line, str(ray), "start", "--block", f"--node-ip-address={address}", *words]),
                stdout=file, stderr=file, start_new_session=True, env=environment,
            )  # fmt: skip
        deadline = time.monotonic() + 120
        while "Ray runtime started" not in log.read_text():
            assert self.processes[name].poll() is None, log.read_text()
            assert time.monotonic() < deadline, f"{name} did not start: {log.read_text()}"
            time.sleep(0.1)


@contextmanager
def network(folder: Path) -> Iterator[Network]:
    made = Network(folder)
    try:
        yield made
    finally:
        made.close()
