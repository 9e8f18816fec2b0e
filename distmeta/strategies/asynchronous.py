"""`async`: workers do not wait for each other.

A step takes the next `run.shards` gradients that arrive, from whichever step their tasks are and whichever theta they
were computed with (n-softsync; Zhang et al. 2016, "Staleness-aware async-SGD for distributed deep learning").

The staleness τ of a gradient is the number of steps since its theta. If τ > `strategy.max_staleness`, the gradient is
dropped and its tasks are computed again with the current theta. Besides the current step, the shards of up to
`max_staleness` further steps may be computed at the same time. With `strategy.staleness_aware` gradients are weighted
by 1 / (1 + τ):

    θ ← θ − optimizer(Σᵢ wᵢ gᵢ / Σ tasks) at the rate lr · w̄,   wᵢ = 1 / (1 + τᵢ) / w̄,  w̄ the mean of 1 / (1 + τᵢ)

For SGD this is the paper's rate lr / τ for each gradient (the paper counts τ from 1). With `max_staleness: 0` only one
step is computed at a time, and theta is that of `driver` to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated

import numpy as np
from pydantic import Field

from distmeta.compute.compression import Compression, decode
from distmeta.config.sections import OuterSection
from distmeta.errors import InputError
from distmeta.runtime.checkpoint import TrainingState
from distmeta.runtime.pool import RayPool, ShardAnswer, WorkOrder
from distmeta.runtime.problem import Problem
from distmeta.runtime.shards import Shard, ShardResult
from distmeta.runtime.strategy import Record, build_server
from distmeta.strategies.driver import CentralStep, plan_step


class Async(CentralStep):
    """The strategy `async`. Its options:

    Args:
        max_staleness: most steps between the theta of a gradient and the theta that it is applied to.
        staleness_aware: weigh gradients by 1 / (1 + staleness), and the learning rate of the step as well.
        compress: how gradients travel. The workers read it from the job.
    """

    requires_workers = True
    equals_driver = False

    pool: RayPool

    def __init__(
        self,
        problem: Problem,
        outer: OuterSection,
        state: TrainingState | None,
        report: Callable[[str], None],
        max_staleness: Annotated[int, Field(ge=0)] = 2,
        staleness_aware: bool = False,
        compress: Compression = "none",
    ):
        if problem.outer_epochs > 1:
            raise InputError(
                f"strategy.type: got 'async' for an algorithm that takes {problem.outer_epochs} outer steps on the "
                "same episodes (algorithm.outer_epochs), expected 1"
            )
        super().__init__(build_server(problem, outer, state))
        self._max_staleness = max_staleness
        self._staleness_aware = staleness_aware
        self._reset(problem)
        self.pool = RayPool(problem, self.server.layout, report)

    def _reset(self, problem: Problem) -> None:
        """Forget all shards that are being computed."""
        self._problem = problem
        self._orders: list[WorkOrder] = []
        """Shards that are being computed, one order per step."""
        self._arrived: list[tuple[WorkOrder, int, ShardAnswer]] = []
        """Answers that no step has used yet: the order, the position in it, the answer."""
        self._next_planned: int | None = None
        """The first step whose shards are not ordered yet, counted from 0."""
        self._ages: list[int] = []
        """Staleness of each gradient of the current step."""
        self._stale_tasks = 0
        """Tasks whose gradients were too old in the current step."""

    def advance(self, problem: Problem, step: int, check: Callable[[], None]) -> list[Record]:
        if problem is not self._problem or self._next_planned is None:
            # a change of the job took effect: gradients that are under way belong to the old values
            self._reset(problem)
            self._next_planned = step
        self._stale_tasks = 0
        (record,) = super().advance(problem, step, check)
        mean_age = sum(self._ages) / len(self._ages)
        return [record | {"staleness": mean_age, "tasks_stale": self._stale_tasks}]

    def load(self, state: TrainingState, outer: OuterSection) -> None:
        super().load(state, outer)
        self._reset(self._problem)

    def compute_shards(self, shards: Sequence[Shard], check: Callable[[], None]) -> list[ShardResult]:
        """Return the next `len(shards)` results that arrive, sorted by their step and shard."""
        step = shards[0].step
        count = len(shards)
        theta = self.pool.put(self.server.flat(), check)
        left_over = self._arrived
        self._arrived = []
        for order, position, answer in left_over:
            self._keep_or_reject(order, position, answer, step)
        self.pool.resume()
        self._gather(step)  # what arrived while the pool computed an evaluation
        while len(self._arrived) < count:
            check()
            self._order_shards(step, count)
            for order in self._orders:
                order.theta = [theta]
                order.shards = [replace(shard, version=step) for shard in order.shards]
            self.pool.work(self._orders)
            self._gather(step)
        answers = [answer for _, _, answer in self._arrived[:count]]
        answers.sort(key=lambda answer: (answer.shard.step, answer.shard.index))
        self._arrived = self._arrived[count:]
        self._ages = [step - answer.shard.version for answer in answers]
        return [answer.result for answer in answers]

    def _gather(self, step: int) -> None:
        """Take the new answers of all orders."""
        for order in list(self._orders):
            for position, answer in list(order.pending.new_results()):
                self._keep_or_reject(order, position, answer, step)

    def _keep_or_reject(self, order: WorkOrder, position: int, answer: ShardAnswer, step: int) -> None:
        """Keep an answer for this step or a later one. If it is too old, let its tasks be computed again."""
        if step - answer.shard.version <= self._max_staleness:
            self._arrived.append((order, position, answer))
            return
        self._stale_tasks += answer.shard.stop - answer.shard.start
        order.pending.reject(position)
        if order not in self._orders:
            self._orders.insert(0, order)

    def _order_shards(self, step: int, count: int) -> None:
        """Order the shards of further steps, as many as may be computed at the same time."""
        most = (1 + self._max_staleness) * count
        self._orders = [order for order in self._orders if order.pending.remaining]
        under_way = sum(order.pending.remaining for order in self._orders) + len(self._arrived)
        planned = step if self._next_planned is None else self._next_planned
        while under_way + count <= most and planned < self._problem.job.run.steps:
            self._orders.append(WorkOrder(plan_step(self._problem, planned), []))
            under_way += count
            planned += 1
        self._next_planned = planned

    def average(self, results: list[ShardResult], tasks: int) -> bool:
        if self._staleness_aware and len(set(self._ages)) > 1:
            mean_weight = self._mean_weight()
            weights = [staleness_weight(age) / mean_weight for age in self._ages]
            results = [
                replace(result, gradient=decode(result.gradient) * np.float32(weight))
                for result, weight in zip(results, weights, strict=True)
                if result.gradient is not None
            ]
        return super().average(results, tasks)

    def apply(self) -> float:
        assert self.mean is not None
        norm = self.server.step(self.mean, self._mean_weight())
        self.mean = None
        return norm

    def _mean_weight(self) -> float:
        """Return w̄, or 1 if the strategy is not aware of staleness."""
        if not self._staleness_aware:
            return 1.0
        return math.fsum(map(staleness_weight, self._ages)) / len(self._ages)


def staleness_weight(age: int) -> float:
    """Return 1 / (1 + τ)."""
    return 1 / (1 + age)
