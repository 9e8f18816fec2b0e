"""Kill the processes that a local Ray leaves behind: `python reaper.py RAYLET_PID SESSION_DIR`.

If a driver is killed, Ray's head and raylet end with it, because they ask the kernel for that. The raylet's children do
not: agents remain for a minute or two, and a worker that hangs or was stopped remains for ever. The driver therefore
starts this script with a pipe as its standard input. The pipe ends when the driver does. Then this script kills every
process that the raylet started. It imports no installed package, so it starts fast.
"""

from __future__ import annotations

import os
import signal
import sys
import time

ATTEMPTS = 10
"""How often to look: a raylet that is still ending may start another process."""
PAUSE_SECONDS = 0.2


def find_processes(raylet: int, session: str) -> list[int]:
    """Return the pids of the processes that a raylet started.

    Ray writes the raylet's pid into their environment. Some Ray processes overwrite their environment with a title;
    those are recognised by the log files of the session that they have open.
    """
    mark = f"RAY_RAYLET_PID={raylet}".encode()
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        try:
            with open(f"/proc/{name}/environ", "rb") as file:
                is_marked = mark in file.read().split(b"\0")
            if is_marked or has_logs_open(name, session):
                found.append(int(name))
        except OSError:  # the process has ended, or it is another user's
            continue
    return found


def has_logs_open(process: str, session: str) -> bool:
    """Return whether a process with a title of Ray's has log files of this session open."""
    with open(f"/proc/{process}/cmdline", "rb") as file:
        if not file.read().startswith(b"ray::"):
            return False
    folder = f"/proc/{process}/fd"
    return any(os.readlink(f"{folder}/{name}").startswith(session + "/logs/") for name in os.listdir(folder))


def kill_all(raylet: int, session: str) -> None:
    """Kill the raylet's processes until none is found."""
    for attempt in range(ATTEMPTS):
        pids = find_processes(raylet, session)
        if not pids and attempt:
            return
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(PAUSE_SECONDS)


if __name__ == "__main__":
    sys.stdin.buffer.read()  # returns when the driver has ended
    kill_all(int(sys.argv[1]), sys.argv[2])
