"""The processes that a test's own process started, by pid: whom to harm, and who is left."""

from __future__ import annotations

import ipaddress
import os
import signal
import struct
import time
from pathlib import Path


def descendants(pid: int) -> list[int]:
    """All processes below one, the nearest first."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(word) for word in task.read_text().split()]
        except OSError:  # gone meanwhile
            continue
        for child in children:
            found += [child, *descendants(child)]
    return found


def words(pid: int) -> str:
    """A process's command line; empty where it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def environment(pid: int) -> str:
    """The variables that a process was started with, zeros between them; empty where it is gone."""
    try:
        return Path(f"/proc/{pid}/environ").read_text(errors="replace")
    except OSError:
        return ""


def state(pid: int) -> str:
    """R, S, T (stopped), Z (ended, not yet waited for), or nothing."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def worker_pids(pid: int | None = None) -> list[int]:
    """The Ray actors below a process (this one unless told) that are distmeta's workers."""
    return actor_pids("WorkerProcess", pid)


def actor_pids(title: str, pid: int | None = None) -> list[int]:
    """The live Ray actors of a class below a process."""
    below = descendants(os.getpid() if pid is None else pid)
    return [p for p in below if words(p).startswith(f"ray::{title}") and state(p) not in ("", "Z")]


def listening(pids: list[int]) -> set[str]:
    """The addresses that processes listen at, `127.0.0.1:80`."""
    owned = set()
    for pid in pids:
        try:
            descriptors = os.listdir(f"/proc/{pid}/fd")
        except OSError:  # gone meanwhile
            continue
        for descriptor in descriptors:
            try:
                owned.add(os.readlink(f"/proc/{pid}/fd/{descriptor}"))
            except OSError:  # closed meanwhile
                continue
    found = set()
    for family in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{family}").read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state != "0A" or f"socket:[{rest[5]}]" not in owned:
                continue
            host, port = local.split(":")
            words = struct.iter_unpack(">I", bytes.fromhex(host))  # each in this machine's order
            address = ipaddress.ip_address(b"".join(struct.pack("=I", *word) for word in words))
            plain = getattr(address, "ipv4_mapped", None) or address
            found.add(f"{plain}:{int(port, 16)}")
    return found


def shared_files(pids: list[int]) -> set[Path]:
    """The files of shared memory that processes have mapped or open."""
    found = set()
    for pid in pids:
        try:
            paths = [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()]
            paths += [
                line.split(maxsplit=5)[-1] for line in Path(f"/proc/{pid}/maps").read_text().splitlines()
            ]
        except OSError:  # gone meanwhile
            continue
        found |= {Path(path) for path in paths if path.startswith("/dev/shm/")}
    return found


def send(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def gone(pids: list[int], seconds: float) -> list[int]:
    """Waits until all have ended; those that have not."""
    deadline = time.monotonic() + seconds
    while (left := [p for p in pids if state(p) not in ("", "Z")]) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left
