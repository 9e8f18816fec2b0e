"""Worker processes that outlive a run, for tests over many jobs: a process takes seconds to start."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from distmeta.compute.vectors import Layout
from distmeta.runtime.problem import Problem
from distmeta.runtime.worker import Shard, ShardResult, Worker, WorkerSpec


class Host:
    """A Ray actor that is the worker of one job after the other."""

    def __init__(self) -> None:
        self.worker: Worker | None = None

    def start(self, spec: WorkerSpec) -> int:
        self.worker = Worker(spec)
        return os.getpid()

    def compute(self, flat: np.ndarray, shard: Shard) -> ShardResult:
        assert self.worker is not None
        return self.worker.compute(flat, shard)


class HostPool:
    """A pool on given hosts, which take the shards in turn."""

    def __init__(self, hosts: Sequence[Any], problem: Problem, layout: Layout, say: Callable[[str], None]):
        import ray

        self._ray, self._hosts, self.size = ray, hosts, len(hosts)
        spec = ray.put(WorkerSpec.of(problem, layout))
        pids = ray.get([host.start.remote(spec) for host in hosts], timeout=60)
        assert len({*pids, os.getpid()}) == len(hosts) + 1

    def map(self, flat: np.ndarray, shards: Sequence[Shard], check: Callable[[], None]) -> list[ShardResult]:
        theta = self._ray.put(flat)
        calls = [self._hosts[i % self.size].compute.remote(theta, shard) for i, shard in enumerate(shards)]
        return self._ray.get(calls, timeout=60)

    def close(self) -> None:
        pass
