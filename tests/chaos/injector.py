"""A Ray cluster of real nodes, a driver on it, and an injector of random faults. All processes are known by pid."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from conftest import REPOSITORY
from support.processes import find_descendants, find_shared_files, find_workers, send_signal, wait_until_gone

PATIENCE_SECONDS = 240.0
"""Longest wait for a disturbed run to take its next steps. The machine may be busy with other things."""
DRAIN_SECONDS = 30
"""A spot instance gets this notice before it is taken away."""
FAULTS = [
    "kill_workers",
    "kill_workers",
    "stop_worker",
    "pause_worker",
    "kill_node",
    "drain_node",
    "kill_driver",
    "interrupt_driver",
    "damage_checkpoint",
]
"""Methods of `Injector`."""
IMPORTED_FOLDERS = [REPOSITORY, REPOSITORY / "tests", REPOSITORY / "tests" / "chaos"]
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, IMPORTED_FOLDERS))}


class RayNodes:
    """A head without room for workers, and nodes with room for two workers each."""

    def __init__(
        self, folder: Path, environment: Mapping[str, str] | None = None, options: Sequence[str] = ()
    ):
        self.folder = folder
        self.environment = ENVIRONMENT | dict(environment or {})
        self.options = options
        """Further options of `ray start`, for every node."""
        self.started = 0
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"127.0.0.1:{port}"
        head_options = ["--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=false"]
        self.head = self._start("head", [*head_options, f"--temp-dir={folder}"])
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}

    def add(self) -> None:
        self.started += 1
        name = f"node{self.started}"
        options = [f"--address={self.address}", "--num-cpus=2", f"--node-name={name}"]
        self.nodes[name] = self._start(name, options)

    def kill(self, name: str) -> None:
        """Kill a node as a power failure would."""
        kill_with_descendants(self.nodes.pop(name))

    def drain(self, name: str) -> None:
        """Announce that a node will be taken away, as for a spot instance."""
        # Ray 2.60: the command `ray drain-node` waits, and there is no public API
        from ray._raylet import GcsClient
        from ray.core.generated import autoscaler_pb2

        client = GcsClient(address=self.address)
        node_ids = [key.hex() for key, node in client.get_all_node_info().items() if node.node_name == name]
        preempted = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        deadline_ms = time.time_ns() // 1_000_000 + DRAIN_SECONDS * 1000
        for node_id in node_ids:
            client.drain_node(node_id, preempted, "chaos", deadline_ms)

    def workers(self) -> list[int]:
        """Return distmeta's workers on all nodes."""
        return [pid for process in self.nodes.values() for pid in find_workers(process.pid)]

    def close(self) -> None:
        for process in [*self.nodes.values(), self.head]:
            kill_with_descendants(process)

    def _start(self, name: str, options: list[str]) -> subprocess.Popen[bytes]:
        log = self.folder / f"{name}.log"
        ray = str(Path(sys.executable).with_name("ray"))
        command = [ray, "start", "--block", "--node-ip-address=127.0.0.1", *options, *self.options]
        with log.open("w") as file:
            process = subprocess.Popen(
                command, stdout=file, stderr=file, start_new_session=True, env=self.environment
            )
        deadline = time.monotonic() + PATIENCE_SECONDS
        while "Ray runtime started" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        return process


def kill_with_descendants(process: subprocess.Popen[bytes]) -> None:
    pids = [process.pid, *find_descendants(process.pid)]
    send_signal(pids, signal.SIGKILL)
    process.wait(30)
    assert not wait_until_gone(pids, 30)


class Injector:
    """Runs `distmeta train … --resume auto` until it is done, and harms it with random faults in the meantime."""

    def __init__(self, nodes: RayNodes, run: Path, seed: int):
        self.nodes = nodes
        self.run = run
        self.random = random.Random(seed)
        self.log: list[tuple[int, str]] = []
        """The faults so far: how many steps were completed, and the fault."""
        self.coming_faults: list[str] = []
        self.shared_files: set[Path] = set()
        """Files of shared memory that were seen in use."""
        self.driver = self._start_driver()

    def steps(self) -> int:
        """Return the number of completed steps."""
        path = self.run / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    def wait_for_step(self, step: int) -> None:
        """Wait until the run has completed `step` steps, or is done."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self.steps() < step and self.driver.poll() is None:
            assert time.monotonic() < deadline, (self.steps(), step, self.log, self.read_output())
            time.sleep(0.05)
        assert self.driver.poll() in (None, 0), (self.log, self.read_output())

    def inject(self) -> None:
        """Inject one fault at a random moment."""
        time.sleep(self.random.uniform(0.0, 0.5))
        if not self.coming_faults:  # every kind once, in a random order
            self.coming_faults = self.random.sample(FAULTS, len(FAULTS))
        for process in [self.driver, self.nodes.head, *self.nodes.nodes.values()]:
            self.shared_files |= find_shared_files([process.pid, *find_descendants(process.pid)])
        fault = self.coming_faults.pop()
        self.log.append((self.steps(), fault))
        getattr(self, fault)()

    def kill_workers(self) -> None:
        workers = self.nodes.workers()
        count = min(len(workers), self.random.randint(1, 4))
        send_signal(self.random.sample(workers, count), signal.SIGKILL)

    def stop_worker(self) -> None:
        send_signal(self.nodes.workers()[:1], signal.SIGSTOP)

    def pause_worker(self) -> None:
        workers = self.nodes.workers()[:1]
        send_signal(workers, signal.SIGSTOP)
        time.sleep(self.random.uniform(0.1, 2.0))
        send_signal(workers, signal.SIGCONT)

    def kill_node(self) -> None:
        self.nodes.kill(self.random.choice(sorted(self.nodes.nodes)))
        self.nodes.add()

    def drain_node(self) -> None:
        name = self.random.choice(sorted(self.nodes.nodes))
        self.nodes.drain(name)
        self.nodes.add()
        self.wait_for_step(self.steps() + 2)
        self.nodes.kill(name)

    def kill_driver(self) -> None:
        kill_with_descendants(self.driver)
        self.driver = self._start_driver()

    def interrupt_driver(self) -> None:
        self.driver.send_signal(signal.SIGTERM)
        self.driver.wait(PATIENCE_SECONDS)
        assert self.driver.returncode in (0, 130), (self.log, self.read_output())
        self.driver = self._start_driver()

    def damage_checkpoint(self) -> None:
        """Kill the driver and cut the last bytes off a file of the newest checkpoint, if there is an older one."""
        kill_with_descendants(self.driver)
        checkpoints = self.run / "checkpoints"
        latest = checkpoints / "latest"
        if latest.exists():
            newest = checkpoints / latest.read_text().strip()
            others = [path for path in checkpoints.glob("step-*") if path != newest]
            if newest.exists() and others:
                files = ["theta.safetensors", "optimizer.safetensors", "state.json"]
                path = newest / self.random.choice(files)
                path.write_bytes(path.read_bytes()[:-5])
        self.driver = self._start_driver()

    def finish(self) -> None:
        """Wait until the run is done, as long as it takes steps."""
        seen = self.steps()
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self.driver.poll() is None:
            if self.steps() > seen:
                seen = self.steps()
                deadline = time.monotonic() + PATIENCE_SECONDS
            assert time.monotonic() < deadline, (self.log, self.read_output())
            time.sleep(0.1)
        assert self.driver.returncode == 0, (self.log, self.read_output())
        assert not wait_until_gone(self.nodes.workers(), 60), "workers outlive their run"

    def read_output(self) -> str:
        """Return what the drivers have printed."""
        return (self.run.parent / "output").read_text()

    def close(self) -> None:
        if self.driver.poll() is None:
            kill_with_descendants(self.driver)

    def _start_driver(self) -> subprocess.Popen[bytes]:
        self.run.parent.mkdir(exist_ok=True)
        program = [sys.executable, "-m", "distmeta.cli.main"]
        command = [*program, "train", "job.yaml", "--resume", "auto", "--json"]
        with (self.run.parent / "output").open("a") as file:
            return subprocess.Popen(
                command, stdout=file, stderr=file, start_new_session=True, env=ENVIRONMENT
            )
