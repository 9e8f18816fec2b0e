"""`driver`: this process is the parameter server. Every shard's gradient sum travels to it, theta to every worker."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from distmeta.config.sections import Outer
from distmeta.runtime.checkpoint import TrainingState
from distmeta.runtime.pool import open_pool
from distmeta.runtime.problem import Problem
from distmeta.runtime.strategy import server_of
from distmeta.runtime.worker import Shard, ShardResult
from distmeta.strategies.gradient_step import Central


class Driver(Central):
    def __init__(self, problem: Problem, outer: Outer, state: TrainingState | None, say: Callable[[str], None]):
        super().__init__(server_of(problem, outer, state))
        self.pool = open_pool(problem, self._server.layout, say)

    def _map(self, shards: Sequence[Shard], check: Callable[[], None]) -> list[ShardResult]:
        return self.pool.map(self._flat_for(shards), shards, check)
