"""The processes that a test has started, by pid: to harm some, and to see which are left."""

from __future__ import annotations

import ipaddress
import os
import signal
import struct
import time
from pathlib import Path

from conftest import REPOSITORY

ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])}
"""Variables of a process that a test starts: it finds this package and the tests' modules."""
LISTENING = "0A"
"""State of a listening socket in /proc/net/tcp."""


def find_descendants(pid: int) -> list[int]:
    """Return all processes below one, parents before their children."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(word) for word in path.read_text().split()]
        except OSError:  # the process has ended
            continue
        for child in children:
            found += [child, *find_descendants(child)]
    return found


def read_command(pid: int) -> str:
    """Return a process's command line; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def read_environment(pid: int) -> str:
    """Return the variables that a process was started with, separated by zeros; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/environ").read_text(errors="replace")
    except OSError:
        return ""


def read_state(pid: int) -> str:
    """Return R (running), S (sleeping), T (stopped), Z (ended, not waited for) …; empty if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def is_alive(pid: int) -> bool:
    return read_state(pid) not in ("", "Z")


def find_workers(pid: int | None = None) -> list[int]:
    """Return distmeta's workers below a process (None: this one)."""
    return find_actors("WorkerProcess", pid)


def find_actors(name: str, pid: int | None = None) -> list[int]:
    """Return the live Ray actors of a class below a process (None: this one)."""
    below = find_descendants(os.getpid() if pid is None else pid)
    return [child for child in below if read_command(child).startswith(f"ray::{name}") and is_alive(child)]


def find_listening_addresses(pids: list[int]) -> set[str]:
    """Return the addresses that processes listen at, such as `127.0.0.1:80`."""
    sockets = set()
    for pid in pids:
        try:
            descriptors = os.listdir(f"/proc/{pid}/fd")
        except OSError:  # the process has ended
            continue
        for descriptor in descriptors:
            try:
                sockets.add(os.readlink(f"/proc/{pid}/fd/{descriptor}"))
            except OSError:  # closed in the meantime
                continue
    found = set()
    for family in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{family}").read_text().splitlines()[1:]:
            _, local, _, socket_state, *rest = line.split()
            if socket_state == LISTENING and f"socket:[{rest[5]}]" in sockets:
                host, port = local.split(":")
                found.add(f"{parse_kernel_address(host)}:{int(port, 16)}")
    return found


def parse_kernel_address(text: str) -> str:
    """Return an address as people write it. The kernel prints 32-bit words in this machine's byte order."""
    words = struct.iter_unpack(">I", bytes.fromhex(text))
    address = ipaddress.ip_address(b"".join(struct.pack("=I", *word) for word in words))
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(address)


def find_shared_files(pids: list[int]) -> set[Path]:
    """Return the files of shared memory that processes have mapped or open."""
    found = set()
    for pid in pids:
        try:
            paths = [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()]
            mapped = Path(f"/proc/{pid}/maps").read_text().splitlines()
        except OSError:  # the process has ended
            continue
        paths += [line.split(maxsplit=5)[-1] for line in mapped]
        found |= {Path(path) for path in paths if path.startswith("/dev/shm/")}
    return found


def send_signal(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def wait_until_gone(pids: list[int], seconds: float) -> list[int]:
    """Wait until all processes have ended, at most so long. Return those that have not."""
    deadline = time.monotonic() + seconds
    while True:
        left = [pid for pid in pids if is_alive(pid)]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.2)
