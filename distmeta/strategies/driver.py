"""`driver`: this process is the parameter server. Every shard's gradient sum travels to it, theta to every worker."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from distmeta.compute.compression import Compression
from distmeta.config.sections import OuterSection
from distmeta.runtime.checkpoint import TrainingState
from distmeta.runtime.pool import open_pool
from distmeta.runtime.problem import Problem
from distmeta.runtime.strategy import server_of
from distmeta.runtime.worker import Shard, ShardResult
from distmeta.strategies.gradient_step import Central


class Driver(Central):
    requires_workers = False
    equals_driver = True

    def __init__(
        self,
        problem: Problem,
        outer: OuterSection,
        state: TrainingState | None,
        report: Callable[[str], None],
        compress: Compression = "none",  # workers read it from the job
    ):
        super().__init__(server_of(problem, outer, state))
        self.pool = open_pool(problem, self._server.layout, report)

    def _map(self, shards: Sequence[Shard], check: Callable[[], None]) -> list[ShardResult]:
        return self.pool.map(self._flat_for(shards), shards, check)
