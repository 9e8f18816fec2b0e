"""`async`: workers do not wait for each other.

A step takes the next `run.shards` gradients that arrive, whichever steps' tasks they are of and whichever theta they
were computed with (n-softsync; Zhang et al. 2016, "Staleness-aware async-SGD for distributed deep learning"). A
gradient's staleness τ is the number of steps since its theta. One with τ > `strategy.max_staleness` is dropped and its
tasks are computed again with theta as it is by then; so many steps' shards may be under way besides those of this
step. With `strategy.staleness_aware` gradients are weighted by 1 / (1 + τ):

    θ ← θ − optimizer(Σᵢ wᵢ gᵢ / Σ tasks) at the rate lr · w̄,   wᵢ = 1 / (1 + τᵢ) / w̄,  w̄ the mean of 1 / (1 + τᵢ)

which for SGD is the paper's rate lr / τ of each gradient, its τ counted from 1. With `strategy.max_staleness: 0` there is
no more than one step under way: `driver`, to the bit.
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
from distmeta.runtime.strategy import Record, server_of
from distmeta.runtime.worker import Shard, ShardResult
from distmeta.strategies.gradient_step import Central, plan_of


class Async(Central):
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
        compress: Compression = "none",  # workers read it from the job
    ):
        self._max_staleness = max_staleness
        self._staleness_aware = staleness_aware
        if problem.outer_epochs > 1:
            raise InputError(
                f"strategy.type: got 'async' for an algorithm that takes {problem.outer_epochs} outer steps on the same "
                "episodes (algorithm.outer_epochs), expected 1"
            )
        super().__init__(server_of(problem, outer, state))
        self._forget(problem)
        self.pool = RayPool(problem, self._server.layout, report)

    def _forget(self, problem: Problem) -> None:
        """Nothing is under way."""
        self._problem = problem
        self._works: list[WorkOrder] = []
        self._arrived: list[tuple[WorkOrder, int, ShardAnswer]] = []
        self._planned: int | None = None
        self._ages: list[int] = []
        self._stale = 0

    def advance(self, problem: Problem, step: int, check: Callable[[], None]) -> list[Record]:
        if (
            problem is not self._problem or self._planned is None
        ):  # what is under way has the values of before
            self._forget(problem)
            self._planned = step
        self._stale = 0
        (record,) = super().advance(problem, step, check)
        return [record | {"staleness": sum(self._ages) / len(self._ages), "tasks_stale": self._stale}]

    def load(self, state: TrainingState, outer: OuterSection) -> None:
        super().load(state, outer)
        self._forget(self._problem)

    def _map(self, shards: Sequence[Shard], check: Callable[[], None]) -> list[ShardResult]:
        """The next answers, in the order of their steps and shards."""
        step, count = shards[0].step, len(shards)
        theta = self.pool.put(self._server.flat(), check)
        before, self._arrived = self._arrived, []
        for work, position, answer in before:
            self._take(work, position, answer, step)
        self.pool.begin()
        self._gather(step)  # what came while the pool computed an evaluation
        while len(self._arrived) < count:
            check()
            self._plan(step, count)
            for work in self._works:
                work.theta = [theta]
                work.shards = [replace(shard, version=step) for shard in work.shards]
            self.pool.turn(self._works)
            self._gather(step)
        taken = sorted(
            (answer for _, _, answer in self._arrived[:count]), key=lambda a: (a.shard.step, a.shard.index)
        )
        self._arrived = self._arrived[count:]
        self._ages = [step - answer.shard.version for answer in taken]
        return [answer.result for answer in taken]

    def _gather(self, step: int) -> None:
        for work in list(self._works):
            for position, answer in list(work.left.fresh()):
                self._take(work, position, answer, step)

    def _take(self, work: WorkOrder, position: int, answer: ShardAnswer, step: int) -> None:
        """Keeps an answer for this step or the next; the tasks of one that is too old are computed again."""
        if step - answer.shard.version <= self._max_staleness:
            self._arrived.append((work, position, answer))
            return
        self._stale += answer.shard.stop - answer.shard.start
        work.left.again(position)
        if work not in self._works:
            self._works.insert(0, work)

    def _plan(self, step: int, count: int) -> None:
        """Opens further steps' shards, as many as may be under way."""
        settings = self._problem.job.run
        most = (1 + (settings.max_staleness or 0)) * count
        self._works = [work for work in self._works if work.left.remaining]
        left = sum(work.left.remaining for work in self._works) + len(self._arrived)
        planned = step if self._planned is None else self._planned
        while left + count <= most and planned < settings.steps:
            self._works.append(WorkOrder(plan_of(self._problem, planned), []))
            left, planned = left + count, planned + 1
        self._planned = planned

    def _average(self, results: list[ShardResult], tasks: int) -> bool:
        if self._staleness_aware and len(set(self._ages)) > 1:
            weights = [weight_of(age) / self._factor() for age in self._ages]
            results = [
                replace(r, gradient=decode(r.gradient) * np.float32(weight))
                for r, weight in zip(results, weights, strict=True)
                if r.gradient is not None
            ]
        return super()._average(results, tasks)

    def _apply(self) -> float:
        assert self._mean is not None
        size, self._mean = self._server.step(self._mean, self._factor()), None
        return size

    def _factor(self) -> float:
        """w̄; 1 where the rate is not staleness-aware."""
        if not self._staleness_aware:
            return 1.0
        return math.fsum(map(weight_of, self._ages)) / len(self._ages)


def weight_of(age: int) -> float:
    return 1 / (1 + age)
