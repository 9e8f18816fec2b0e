"""Ends what a local Ray leaves behind: `python reaper.py RAYLET_PID SESSION`, with a pipe from the driver as standard
input.

A driver that is killed takes Ray's head and raylet along (they ask the kernel for it), but not the raylet's own
children: agents linger for a minute or two, a worker that hangs or was stopped stays for ever. The pipe ends when the
driver does, however it does; then every process that this raylet started is killed. It needs no package, so it starts
in a blink.
"""

from __future__ import annotations

import os
import signal
import sys
import time

SWEEPS, PAUSE = 10, 0.2
"""A raylet that is still ending may yet have started something: look a few times."""


def started_by(raylet: int, session: str) -> list[int]:
    """The processes in whose environment Ray wrote this raylet's pid, and those with a title of Ray's, which they write
    over their environment, that have logs of its session open.
    """
    mark, found = f"RAY_RAYLET_PID={raylet}".encode(), []
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            try:
                with open(f"/proc/{name}/environ", "rb") as file:
                    marked = mark in file.read().split(b"\0")
                if marked or has_logs_open(name, session):
                    found.append(int(name))
            except OSError:  # gone meanwhile, or another user's
                continue
    return found


def has_logs_open(process: str, session: str) -> bool:
    with open(f"/proc/{process}/cmdline", "rb") as file:
        if not file.read().startswith(b"ray::"):
            return False
    folder = f"/proc/{process}/fd"
    return any(os.readlink(f"{folder}/{name}").startswith(session + "/logs/") for name in os.listdir(folder))


def end(raylet: int, session: str) -> None:
    for sweep in range(SWEEPS):
        left = started_by(raylet, session)
        if not left and sweep:
            return
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(PAUSE)


if __name__ == "__main__":
    sys.stdin.buffer.read()  # until the driver is no more
    end(int(sys.argv[1]), sys.argv[2])
