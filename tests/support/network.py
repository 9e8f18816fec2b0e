"""Several hosts on one machine: network namespaces, joined by veth pairs to a bridge in the head's namespace.

Processes are known by pid. The machine's own network does not change. The namespaces are deleted at the end.
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

from support.processes import find_descendants, find_workers, send_signal, wait_until_gone

PORT = 6399
"""Of Ray's head."""
START_SECONDS = 120
"""Longest wait for a Ray node to start."""


def why_unavailable() -> str | None:
    """Return why this machine does not allow network namespaces, or None if it does."""
    name = f"dm-{secrets.token_hex(3)}"
    try:
        done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, timeout=30)
    except FileNotFoundError:
        return "network namespaces: there is no `ip` command"
    if done.returncode:
        return f"network namespaces: {done.stderr.strip()}"
    run_ip("netns", "delete", name)
    return None


def run_ip(*words: str) -> None:
    """Run the `ip` command."""
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=30)


class Network:
    """A head and any number of hosts, each a Ray node in its own namespace."""

    def __init__(self, folder: Path):
        self.folder = folder
        """Ray's temporary folder."""
        self.id = secrets.token_hex(2)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        """The `ray start` process of each host."""
        self.names: list[str] = []
        self.added = 0
        self.address = f"10.213.0.1:{PORT}"
        self.dashboard = "http://10.213.0.1:8265"
        self._add_namespace("head")
        in_head = ("-n", self._namespace("head"))
        run_ip(*in_head, "link", "add", "hub", "type", "bridge")
        run_ip(*in_head, "addr", "add", "10.213.0.1/24", "dev", "hub")
        run_ip(*in_head, "link", "set", "hub", "up")
        options = [
            "--head",
            f"--port={PORT}",
            "--num-cpus=0",
            "--include-dashboard=true",
            "--dashboard-host=10.213.0.1",
            f"--temp-dir={folder}",
        ]
        # a node that is cut off counts as dead after a few seconds instead of Ray's half minute
        health = {"RAY_health_check_period_ms": "1000", "RAY_health_check_failure_threshold": "5"}
        self._start_ray("head", "10.213.0.1", options, health)

    def add(self, cpus: int) -> str:
        """Add a host with a Ray node; return its name."""
        self.added += 1
        name = f"host{self.added}"
        address = self.ip_of(name)
        self._connect(name, address)
        self._start_ray(name, address, [f"--address={self.address}", f"--num-cpus={cpus}"], {})
        return name

    def ip_of(self, name: str) -> str:
        """Return a host's address."""
        return f"10.213.0.{int(name.removeprefix('host')) + 1}"

    def add_desk(self) -> str:
        """Add a host without Ray, as a person's own machine; return its name."""
        self._connect("desk", "10.213.0.250")
        return "desk"

    def limit(self, rate: str) -> None:
        """Limit what each host may send and receive (`tc tbf`), for example to "100mbit"."""
        for number in range(1, self.added + 1):
            for place, device in ((f"host{number}", "eth0"), ("head", f"to-host{number}")):
                words = ["tc", "-n", self._namespace(place), "qdisc", "replace", "dev", device, "root", "tbf"]
                words += ["rate", rate, "burst", "64kb", "latency", "100ms"]
                subprocess.run(words, check=True, capture_output=True, text=True, timeout=30)

    def unplug(self, name: str) -> None:
        """Cut a host off. Its processes keep running."""
        run_ip("-n", self._namespace(name), "link", "set", "eth0", "down")

    def run(self, name: str, words: Sequence[str]) -> list[str]:
        """Return a command line that runs `words` on a host."""
        return ["ip", "netns", "exec", self._namespace(name), *words]

    def workers(self, name: str) -> int:
        """Return the number of distmeta's workers on a host."""
        return len(find_workers(self.processes[name].pid))

    def close(self) -> None:
        pids = []
        for process in self.processes.values():
            pids += [process.pid, *find_descendants(process.pid)]
        send_signal(pids, signal.SIGKILL)
        for process in self.processes.values():
            process.wait(30)
        assert not wait_until_gone(pids, 30)
        for name in self.names:
            run_ip("netns", "delete", self._namespace(name))

    def _namespace(self, name: str) -> str:
        return f"dm-{self.id}-{name}"

    def _add_namespace(self, name: str) -> None:
        run_ip("netns", "add", self._namespace(name))
        self.names.append(name)
        run_ip("-n", self._namespace(name), "link", "set", "lo", "up")

    def _connect(self, name: str, address: str) -> None:
        """Add a namespace and connect it to the bridge."""
        self._add_namespace(name)
        in_head = ("-n", self._namespace("head"))
        in_host = ("-n", self._namespace(name))
        plug = f"to-{name}"
        peer = ("peer", "name", "eth0", "netns", self._namespace(name))
        run_ip(*in_head, "link", "add", plug, "type", "veth", *peer)
        run_ip(*in_head, "link", "set", plug, "master", "hub", "up")
        run_ip(*in_host, "addr", "add", f"{address}/24", "dev", "eth0")
        run_ip(*in_host, "link", "set", "eth0", "up")

    def _start_ray(self, name: str, address: str, options: list[str], variables: dict[str, str]) -> None:
        ray = Path(sys.executable).with_name("ray")
        environment = os.environ | {"PATH": f"{ray.parent}:{os.environ['PATH']}"} | variables
        log = self.folder / f"{name}.log"
        prefix: list[str] = []
        if name != "head":  # its own disk: nodes that share Ray's folder delete each other's packages
            disk = self.folder / name
            disk.mkdir()
            prefix = ["sh", "-c", f'mount --bind "{disk}" "{self.folder}" && exec "$@"', "sh"]
        command = [*prefix, str(ray), "start", "--block", f"--node-ip-address={address}", *options]
        with log.open("w") as file:
            self.processes[name] = subprocess.Popen(
                self.run(name, command), stdout=file, stderr=file, start_new_session=True, env=environment
            )
        deadline = time.monotonic() + START_SECONDS
        while "Ray runtime started" not in log.read_text():
            assert self.processes[name].poll() is None, log.read_text()
            assert time.monotonic() < deadline, f"{name} did not start: {log.read_text()}"
            time.sleep(0.1)


@contextmanager
def network(folder: Path) -> Iterator[Network]:
    """Start a head; stop everything at the end."""
    made = Network(folder)
    try:
        yield made
    finally:
        made.close()
