"""A Ray cluster of real nodes, a driver on it, and a seeded hand that harms them. Everything is held by pid."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from conftest import REPOSITORY
from processes import descendants, gone, send, shared_files, worker_pids

PATIENCE = 240.0
"""Seconds that a harmed run may take to get on: for machines with other things to do."""
KINDS = [
    "kill_workers", "kill_workers", "stop_worker", "pause_worker", "kill_node", "drain_node", "kill_driver",
    "end_driver", "damage_checkpoint",
]  # fmt: skip
IMPORTED = [REPOSITORY, REPOSITORY / "tests", REPOSITORY / "tests" / "chaos"]
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, IMPORTED))}


class Nodes:
    """A head without room for workers, and nodes with room for two each."""

    def __init__(self, folder: Path, environment: Mapping[str, str] | None = None, words: Sequence[str] = ()):
        self.environment, self.words = ENVIRONMENT | dict(environment or {}), words
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        self.folder, self.started = folder, 0
        port = self.address.rpartition(":")[2]
        words = [
            "--head",
            f"--port={port}",
            "--num-cpus=0",
            "--include-dashboard=false",
            f"--temp-dir={folder}",
        ]
        self.head = self._start("head", words)
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}

    def add(self) -> None:
        self.started += 1
        name = f"node{self.started}"
        self.nodes[name] = self._start(
            name, [f"--address={self.address}", "--num-cpus=2", f"--node-name={name}"]
        )

    def kill(self, name: str) -> None:
        """As if the machine had lost its power."""
        end(self.nodes.pop(name))

    def drain(self, name: str) -> None:
        """The notice that a spot instance gets: half a minute."""
        from ray._raylet import GcsClient
        from ray.core.generated import autoscaler_pb2

        client = GcsClient(address=self.address)
        ids = [key.hex() for key, node in client.get_all_node_info().items() if node.node_name == name]
        preempted = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        deadline = time.time_ns() // 1_000_000 + 30_000
        for node in ids:
            client.drain_node(node, preempted, "chaos", deadline)

    def workers(self) -> list[int]:
        return [pid for process in self.nodes.values() for pid in worker_pids(process.pid)]

    def close(self) -> None:
        for process in [*self.nodes.values(), self.head]:
            end(process)

    def _start(self, name: str, words: list[str]) -> subprocess.Popen[bytes]:
        log = self.folder / f"{name}.log"
        ray = str(Path(sys.executable).with_name("ray"))
        line = [ray, "start", "--block", "--node-ip-address=127.0.0.1", *words, *self.words]
        with log.open("w") as file:
            process = subprocess.Popen(
                line, stdout=file, stderr=file, start_new_session=True, env=self.environment
            )
        deadline = time.monotonic() + PATIENCE
        while "Ray runtime started" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        return process


def end(process: subprocess.Popen[bytes]) -> None:
    pids = [process.pid, *descendants(process.pid)]
    send(pids, signal.SIGKILL)
    process.wait(30)
    assert not gone(pids, 30)


class Injector:
    """Runs `distmeta train … --resume auto` until it is done, whatever happens to it meanwhile."""

    def __init__(self, nodes: Nodes, run: Path, seed: int):
        self.nodes, self.run, self.random = nodes, run, random.Random(seed)
        self.log: list[tuple[int, str]] = []
        self.kinds: list[str] = []
        self.shared: set[Path] = set()
        """Files of shared memory that were seen in use."""
        self.driver = self._drive()

    def steps(self) -> int:
        path = self.run / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    def until(self, step: int) -> None:
        """Waits for the run to get there; a driver that ended by itself did so because it was done."""
        deadline = time.monotonic() + PATIENCE
        while self.steps() < step and self.driver.poll() is None:
            assert time.monotonic() < deadline, (self.steps(), step, self.log, self.said())
            time.sleep(0.05)
        assert self.driver.poll() in (None, 0), (self.log, self.said())

    def harm(self) -> None:
        """One fault, at a random moment after the last one was got over."""
        time.sleep(self.random.uniform(0.0, 0.5))
        if not self.kinds:  # every kind in a random order, and again
            self.kinds = self.random.sample(KINDS, len(KINDS))
        everyone = [
            self.driver.pid,
            *(process.pid for process in [self.nodes.head, *self.nodes.nodes.values()]),
        ]
        self.shared |= shared_files([pid for one in everyone for pid in [one, *descendants(one)]])
        kind = self.kinds.pop()
        self.log.append((self.steps(), kind))
        getattr(self, kind)()

    def kill_workers(self) -> None:
        workers = self.nodes.workers()
        send(self.random.sample(workers, min(len(workers), self.random.randint(1, 4))), signal.SIGKILL)

    def stop_worker(self) -> None:
        send(self.nodes.workers()[:1], signal.SIGSTOP)

    def pause_worker(self) -> None:
        workers = self.nodes.workers()[:1]
        send(workers, signal.SIGSTOP)
        time.sleep(self.random.uniform(0.1, 2.0))
        send(workers, signal.SIGCONT)

    def kill_node(self) -> None:
        self.nodes.kill(self.random.choice(sorted(self.nodes.nodes)))
        self.nodes.add()

    def drain_node(self) -> None:
        name = self.random.choice(sorted(self.nodes.nodes))
        self.nodes.drain(name)
        self.nodes.add()
        self.until(self.steps() + 2)
        self.nodes.kill(name)

    def kill_driver(self) -> None:
        end(self.driver)
        self.driver = self._drive()

    def end_driver(self) -> None:
        self.driver.send_signal(signal.SIGTERM)
        self.driver.wait(PATIENCE)
        assert self.driver.returncode in (0, 130), (self.log, self.said())
        self.driver = self._drive()

    def damage_checkpoint(self) -> None:
        """Of a driver that was killed: the newest checkpoint lost its last bytes."""
        end(self.driver)
        latest = self.run / "checkpoints" / "latest"
        if latest.exists() and (newest := self.run / "checkpoints" / latest.read_text().strip()).exists():
            others = [path for path in (self.run / "checkpoints").glob("step-*") if path != newest]
            if others:
                path = newest / self.random.choice(
                    ["theta.safetensors", "optimizer.safetensors", "state.json"]
                )
                path.write_bytes(path.read_bytes()[:-5])
        self.driver = self._drive()

    def finish(self) -> None:
        seen, deadline = self.steps(), time.monotonic() + PATIENCE
        while self.driver.poll() is None:
            if self.steps() > seen:
                seen, deadline = self.steps(), time.monotonic() + PATIENCE
            assert time.monotonic() < deadline, (self.log, self.said())
            time.sleep(0.1)
        assert self.driver.returncode == 0, (self.log, self.said())
        assert not gone(self.nodes.workers(), 60), "workers outlive their run"

    def said(self) -> str:
        return (self.run.parent / "said").read_text()

    def close(self) -> None:
        if self.driver.poll() is None:
            end(self.driver)

    def _drive(self) -> subprocess.Popen[bytes]:
        self.run.parent.mkdir(exist_ok=True)
        line = [sys.executable, "-m", "distmeta.cli.main", "train", "job.yaml", "--resume", "auto", "--json"]
        with (self.run.parent / "said").open("a") as said:
            return subprocess.Popen(line, stdout=said, stderr=said, start_new_session=True, env=ENVIRONMENT)


def clockless(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("seconds", "tasks_per"))} for row in rows]
