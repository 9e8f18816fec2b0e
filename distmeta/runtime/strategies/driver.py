"""`driver`: this process is the parameter server. Every shard's gradient sum travels to it, theta to every worker."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from distmeta.compute.flat import tree_sum
from distmeta.runtime.checkpoint import State
from distmeta.runtime.pool import open_pool
from distmeta.runtime.problem import Problem
from distmeta.runtime.strategies.synchronous import Synchronous
from distmeta.runtime.strategy import server_of
from distmeta.runtime.worker import Shard, ShardResult
from distmeta.sections import Outer


class Driver(Synchronous):
    def __init__(self, problem: Problem, outer: Outer, state: State | None, say: Callable[[str], None]):
        self._server = server_of(problem, outer, state)
        self._mean: np.ndarray | None = None
        self._marked: tuple[np.ndarray, State] | None = None
        self.pool = open_pool(problem, self._server.layout, say)

    def retune(self, outer: Outer) -> None:
        self._server.retune(outer)

    def flat(self) -> np.ndarray:
        return self._server.flat()

    def state(self) -> State:
        return State(self._server.theta(), *self._server.state())

    def load(self, state: State, outer: Outer) -> None:
        self._server.retune(outer)
        self._server.load(*state)

    def close(self) -> None:
        self.pool.close()

    def _map(self, shards: Sequence[Shard], check: Callable[[], None]) -> list[ShardResult]:
        flat = self._server.flat()
        if self._marked is not None and shards[0].epoch:
            flat = np.concatenate([flat, self._marked[0]])
        return self.pool.map(flat, shards, check)

    def _average(self, results: list[ShardResult], tasks: int) -> bool:
        total = tree_sum([r.gradient for r in results if r.gradient is not None])
        self._mean = total / np.float32(tasks)
        return bool(np.isfinite(self._mean).all())

    def _apply(self) -> float:
        assert self._mean is not None
        size, self._mean = self._server.step(self._mean), None
        return size

    def _skip(self) -> float:
        self._mean = None
        return self._server.skip()

    def _rate(self) -> float:
        return self._server.rate()

    def _mark(self) -> None:
        self._marked = self._server.flat(), self.state()

    def _unmark(self, undo: bool) -> None:
        if undo and self._marked is not None:
            self._server.load(*self._marked[1])
        self._marked = None
