"""A pool whose workers finish in a fixed order: asynchronous training without processes and clocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from distmeta.compute.vectors import Layout
from distmeta.runtime.pool import ShardAnswer, WorkOrder
from distmeta.runtime.problem import Problem
from distmeta.runtime.shards import Shard, ShardResult
from distmeta.runtime.worker import Worker


class ScriptedPool:
    """Stands in for RayPool. Worker i needs `ticks[i]` for every shard."""

    def __init__(self, ticks: Sequence[int], problem: Problem, layout: Layout, report: Callable[[str], None]):
        self.ticks = ticks
        self.size = len(ticks)
        self.now = 0
        self.workers = [Worker(problem, layout) for _ in ticks]
        self.busy: dict[int, tuple[int, Any, int, ShardAnswer]] = {}
        """Worker -> when it finishes, the pending shards, the position among them, the answer."""

    def put(self, flat: np.ndarray, check: Callable[[], None]) -> np.ndarray:
        return flat.copy()

    def resume(self) -> None:
        pass

    def work(self, orders: Sequence[WorkOrder]) -> None:
        """Give every free worker a shard, then let the next one finish."""
        for worker in set(range(self.size)) - set(self.busy):
            order = next((order for order in orders if order.pending.next_unassigned() is not None), None)
            if order is not None:
                position = order.pending.next_unassigned()
                assert position is not None
                order.pending.assign(position, self.now)
                shard = order.shards[position]
                answer = ShardAnswer(shard, self.workers[worker].compute(tuple(order.theta), shard), [])
                self.busy[worker] = (self.now + self.ticks[worker], order.pending, position, answer)
        self._finish_one()

    def _finish_one(self) -> None:
        first = min(self.busy, key=lambda worker: self.busy[worker][0])
        self.now, pending, position, answer = self.busy.pop(first)
        pending.answer(position, answer)

    def map(self, flat: np.ndarray, shards: Sequence[Shard], check: Callable[[], None]) -> list[ShardResult]:
        """Compute an evaluation. All workers finish what they have in the meantime."""
        while self.busy:
            self._finish_one()
        return [self.workers[0].compute(flat, shard) for shard in shards]

    def close(self) -> None:
        pass
