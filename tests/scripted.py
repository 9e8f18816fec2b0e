"""A pool whose workers finish in a fixed order: what is asynchronous, without processes and clocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from distmeta.compute.vectors import Layout
from distmeta.runtime.pool import ShardAnswer, WorkOrder
from distmeta.runtime.problem import Problem
from distmeta.runtime.worker import Shard, ShardResult, Worker


class ScriptedPool:
    """Worker i takes `ticks[i]` for a shard. Stands in for RayPool."""

    def __init__(self, ticks: Sequence[int], problem: Problem, layout: Layout, say: Callable[[str], None]):
        self.ticks, self.size, self.now = ticks, len(ticks), 0
        self.workers = [Worker.of(problem, layout) for _ in ticks]
        self.busy: dict[int, tuple[int, Any, int, ShardAnswer]] = {}

    def put(self, flat: np.ndarray, check: Callable[[], None]) -> np.ndarray:
        return flat.copy()

    def begin(self) -> None:
        pass

    def turn(self, works: Sequence[WorkOrder]) -> None:
        for i in set(range(self.size)) - set(self.busy):
            work = next((work for work in works if work.left.next() is not None), None)
            if work is not None:
                position = work.left.next()
                assert position is not None
                work.left.given(position, self.now)
                shard = work.shards[position]
                result = self.workers[i].compute(tuple(work.theta), shard)
                self.busy[i] = self.now + self.ticks[i], work.left, position, ShardAnswer(shard, result, [])
        self._end_one()

    def _end_one(self) -> None:
        first = min(self.busy, key=lambda i: self.busy[i][0])
        self.now, left, position, answer = self.busy.pop(first)
        left.answered(position, answer)

    def map(self, flat: np.ndarray, shards: Sequence[Shard], check: Callable[[], None]) -> list[ShardResult]:
        """An evaluation; what is under way ends meanwhile."""
        while self.busy:
            self._end_one()
        return [self.workers[0].compute(flat, shard) for shard in shards]

    def close(self) -> None:
        pass
