"""A step on the mean gradient of some shards: the same for whoever holds theta, its sums and the optimizer."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from distmeta.compute.compression import decode
from distmeta.compute.vectors import finite, mean_of
from distmeta.config.sections import OuterSection
from distmeta.errors import NumericsError
from distmeta.runtime.checkpoint import TrainingState
from distmeta.runtime.parameter_server import ParameterServer
from distmeta.runtime.pool import Pool
from distmeta.runtime.problem import Problem
from distmeta.runtime.scores import mean_metrics
from distmeta.runtime.strategy import Record
from distmeta.runtime.worker import Shard, ShardResult, shards_of


def plan_of(problem: Problem, step: int) -> list[Shard]:
    """The shards of the step after `step` completed ones."""
    settings = problem.job.run
    assert settings.shards is not None, "resolved before step 0"
    steps = problem.algorithm.inner_steps
    return shards_of(problem, "train", step, settings.tasks_per_step, settings.shards, steps)


class Stepping(ABC):
    """Map, add by the fixed tree, divide by the finite tasks, clip, step; `outer_epochs` times on the same episodes."""

    pool: Pool

    def advance(self, problem: Problem, step: int, check: Callable[[], None]) -> list[Record]:
        """The outer epochs of one step: the record of the first, with all seconds. What fails on the way undoes all."""
        return [self._advance(problem, plan_of(problem, step), check)]

    @abstractmethod
    def _map(self, shards: Sequence[Shard], check: Callable[[], None]) -> list[ShardResult]:
        """What the step takes the mean of: the results of these shards, with theta as it is."""

    @abstractmethod
    def _average(self, results: list[ShardResult], tasks: int) -> bool:
        """The mean meta-gradient, kept until it is applied or skipped; whether it is finite."""

    @abstractmethod
    def _apply(self) -> float:
        """One outer step on it; its norm before clipping. From here on nothing may fail but for a lost state."""

    @abstractmethod
    def _skip(self) -> float:
        """A step without a finite task: only the schedule's clock moves."""

    @abstractmethod
    def _rate(self) -> float: ...

    @abstractmethod
    def _mark(self) -> None:
        """Keeps the state, and theta as what later epochs' episodes are of, until `_unmark`."""

    @abstractmethod
    def _unmark(self, undo: bool) -> None:
        """Goes back to what was marked, or lets go of it."""

    def _advance(self, problem: Problem, plan: list[Shard], check: Callable[[], None]) -> Record:
        if problem.outer_epochs == 1:
            return self._epoch(problem, plan, check)
        self._mark()
        try:
            record = self._epochs(problem, plan, check)
        except BaseException:
            self._unmark(undo=True)
            raise
        self._unmark(undo=False)
        return record

    def _epochs(self, problem: Problem, plan: list[Shard], check: Callable[[], None]) -> Record:
        record = self._epoch(problem, plan, check)
        for epoch in range(1, problem.outer_epochs):
            later = self._epoch(problem, [replace(shard, epoch=epoch) for shard in plan], check)
            record |= {key: record[key] + later[key] for key in record if key.startswith("seconds_")}
            dropped = sorted({*record.get("dropped", ()), *later.get("dropped", ())})
            if dropped:  # in any epoch
                tasks = min(record["tasks"], later["tasks"])
                record |= {"dropped": dropped, "tasks_dropped": len(dropped), "tasks": tasks}
        return record | {"tasks_per_second": problem.job.run.tasks_per_step / record["seconds_step"]}

    def _epoch(self, problem: Problem, plan: list[Shard], check: Callable[[], None]) -> Record:
        """Map, aggregate, outer step: the record."""
        settings, step = problem.job.run, plan[0].step
        started = time.perf_counter()
        results = self._map(plan, check)
        mapped = time.perf_counter()
        tasks = sum(result.tasks for result in results)
        dropped = [task for result in results for task in result.dropped]
        if not self._average(results, max(tasks, 1)):  # finite gradients whose sum is not
            tasks, dropped = 0, [task for shard in plan for task in range(shard.start, shard.stop)]
        if dropped and settings.on_nonfinite == "stop":
            raise NumericsError(
                f"step {step + 1}: non-finite meta-gradient of tasks {dropped} (run.on_nonfinite: stop)"
            )
        record: Record = {"step": step + 1} | mean_metrics(results)
        added = time.perf_counter()
        rate = self._rate()
        size = self._apply() if tasks else self._skip()
        stepped = time.perf_counter()
        busy = sum(r.seconds_draw + r.seconds_compute for r in results) / self.pool.size
        record |= {"grad_norm": size, "outer_lr": rate, "tasks": tasks, "tasks_dropped": len(dropped)}
        if dropped:
            record["dropped"] = dropped
        return record | {
            "tasks_per_second": settings.tasks_per_step / (stepped - started),
            "seconds_step": stepped - started,
            "seconds_draw": sum(r.seconds_draw for r in results) / self.pool.size,
            "seconds_compute": sum(r.seconds_compute for r in results) / self.pool.size,
            "seconds_transfer": max(mapped - started - busy, 0.0),
            "seconds_aggregate": added - mapped,
            "seconds_outer": stepped - added,
        }


class Central(Stepping):
    """theta, the sums and the optimizer are in this process."""

    def __init__(self, server: ParameterServer):
        self._server = server
        self._mean: np.ndarray | None = None
        self._marked: tuple[np.ndarray, TrainingState] | None = None

    def retune(self, outer: OuterSection) -> None:
        self._server.retune(outer)

    def flat(self) -> np.ndarray:
        return self._server.flat()

    def state(self) -> TrainingState:
        return TrainingState(self._server.theta(), *self._server.state())

    def load(self, state: TrainingState, outer: OuterSection) -> None:
        self._server.retune(outer)
        self._server.load(*state)

    def close(self) -> None:
        self.pool.close()

    def _flat_for(self, shards: Sequence[Shard]) -> np.ndarray:
        """theta itself, which the next step moves; in later epochs followed by the one that the episodes are of."""
        if self._marked is not None and shards[0].epoch:
            return np.concatenate([self._server.vector(), self._marked[0]])
        return self._server.vector()

    def _average(self, results: list[ShardResult], tasks: int) -> bool:
        self._mean = mean_of([decode(r.gradient) for r in results if r.gradient is not None], tasks)
        return finite(self._mean)

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
