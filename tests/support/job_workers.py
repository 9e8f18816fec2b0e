"""Worker processes that outlive a run, for tests over many jobs: a process takes seconds to start."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from distmeta.compute.vectors import Layout
from distmeta.runtime.problem import Problem
from distmeta.runtime.shards import Shard, ShardResult, WorkerSpec
from distmeta.runtime.worker import Worker


class JobWorker:
    """A Ray actor that is the worker of one job after the other."""

    def __init__(self) -> None:
        self.worker: Worker | None = None

    def start(self, spec: WorkerSpec) -> int:
        """Become the worker of a job; return the process id."""
        self.worker = Worker.from_spec(spec)
        return os.getpid()

    def compute(self, flat: np.ndarray, shard: Shard) -> ShardResult:
        assert self.worker is not None
        return self.worker.compute(flat, shard)


class JobWorkerPool:
    """A pool of given `JobWorker` actors, which take the shards in turn."""

    def __init__(
        self, actors: Sequence[Any], problem: Problem, layout: Layout, report: Callable[[str], None]
    ):
        import ray

        self._ray = ray
        self._actors = actors
        self.size = len(actors)
        spec = ray.put(WorkerSpec.from_problem(problem, layout))
        pids = ray.get([actor.start.remote(spec) for actor in actors], timeout=60)
        assert len({*pids, os.getpid()}) == len(actors) + 1

    def map(self, flat: np.ndarray, shards: Sequence[Shard], check: Callable[[], None]) -> list[ShardResult]:
        theta = self._ray.put(flat)
        calls = [self._actors[i % self.size].compute.remote(theta, shard) for i, shard in enumerate(shards)]
        return self._ray.get(calls, timeout=60)

    def close(self) -> None:
        pass
