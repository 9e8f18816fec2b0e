"""Someone else's Ray cluster: `ray start --head --block` with its dashboard, in a process that the test controls."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from conftest import HOME, REPOSITORY

BIN = Path(sys.executable).parent


@contextmanager
def start_ray_head(cpus: int) -> Iterator[str]:
    """Start a Ray head and yield the URL of its dashboard. Its node can import this distmeta, but no test module."""
    gcs, dashboard, agent, metrics, client = find_free_ports(5)
    words = [
        BIN / "ray", "start", "--head", "--block", f"--num-cpus={cpus}", f"--port={gcs}", "--include-dashboard=true",
        f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={metrics}",
        f"--ray-client-server-port={client}", "--node-ip-address=127.0.0.1", f"--temp-dir={HOME}/submit",
    ]  # fmt: skip
    path = f"{BIN}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    with (HOME / "submit.log").open("w") as log:
        process = subprocess.Popen(
            words, stdout=log, stderr=log, start_new_session=True, env=environment, cwd=HOME
        )
        try:
            wait_for_port(process, dashboard)
            yield f"http://127.0.0.1:{dashboard}"
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def wait_for_port(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + 60
    while True:
        assert process.poll() is None, (HOME / "submit.log").read_text()
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert time.monotonic() < deadline, "the dashboard did not start"
            time.sleep(0.1)


def find_free_ports(count: int) -> list[int]:
    """Return ports that are free now. All are held open until the last is found, so they differ."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
