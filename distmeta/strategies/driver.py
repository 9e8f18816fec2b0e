"""The step of gradient-based strategies, and `driver`: this process is the parameter server.

In `driver` every shard's gradient sum travels to this process, and theta travels from here to every worker.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from distmeta.compute.compression import Compression, decode
from distmeta.config.sections import OuterSection
from distmeta.errors import NumericsError
from distmeta.runtime.checkpoint import TrainingState
from distmeta.runtime.parameter_server import ParameterServer, is_finite, mean_metrics, mean_vector
from distmeta.runtime.pool import open_pool
from distmeta.runtime.problem import Problem
from distmeta.runtime.shards import Pool, Shard, ShardResult
from distmeta.runtime.strategy import Record, build_server
from distmeta.runtime.worker import plan_shards


class GradientStep(ABC):
    """One outer step: compute the shards, average their meta-gradients, clip, and update theta.

    With `outer_epochs > 1` this happens several times on the same episodes (as PPO does). A strategy says where theta,
    the sums and the optimizer are.
    """

    pool: Pool

    def advance(self, problem: Problem, step: int, check: Callable[[], None]) -> list[Record]:
        """Take the step after `step` completed ones. If anything is raised, nothing has changed."""
        return [self.take_step(problem, plan_step(problem, step), check)]

    @abstractmethod
    def compute_shards(self, shards: Sequence[Shard], check: Callable[[], None]) -> list[ShardResult]:
        """Compute the results that this step averages, with theta as it is."""

    @abstractmethod
    def average(self, results: list[ShardResult], tasks: int) -> bool:
        """Keep the mean meta-gradient until it is applied or skipped. Return whether it is finite."""

    @abstractmethod
    def apply(self) -> float:
        """Update theta with the mean, and return its norm before clipping. Only `LostStateError` may be raised."""

    @abstractmethod
    def skip(self) -> float:
        """Take a step without a finite task: only the schedule's clock moves."""

    @abstractmethod
    def rate(self) -> float:
        """Return the outer learning rate."""

    @abstractmethod
    def take_snapshot(self) -> None:
        """Keep the state and theta until `end_snapshot`. Episodes of later epochs belong to this theta."""

    @abstractmethod
    def end_snapshot(self, undo: bool) -> None:
        """Return to the snapshot (`undo`), or only forget it."""

    def take_step(self, problem: Problem, shards: list[Shard], check: Callable[[], None]) -> Record:
        """Take one outer step on these shards, with all its epochs."""
        if problem.outer_epochs == 1:
            return self._take_epoch(problem, shards, check)
        self.take_snapshot()
        try:
            record = self._take_epochs(problem, shards, check)
        except BaseException:
            self.end_snapshot(undo=True)
            raise
        self.end_snapshot(undo=False)
        return record

    def _take_epochs(self, problem: Problem, shards: list[Shard], check: Callable[[], None]) -> Record:
        """Return the record of the first epoch, with the seconds and dropped tasks of all epochs."""
        record = self._take_epoch(problem, shards, check)
        for epoch in range(1, problem.outer_epochs):
            later = self._take_epoch(problem, [replace(shard, epoch=epoch) for shard in shards], check)
            for key in record:
                if key.startswith("seconds_"):
                    record[key] += later[key]
            dropped = sorted({*record.get("dropped", ()), *later.get("dropped", ())})
            if dropped:
                tasks = min(record["tasks"], later["tasks"])
                record |= {"dropped": dropped, "tasks_dropped": len(dropped), "tasks": tasks}
        return record | {"tasks_per_second": problem.job.run.tasks_per_step / record["seconds_step"]}

    def _take_epoch(self, problem: Problem, shards: list[Shard], check: Callable[[], None]) -> Record:
        """Compute, average, update theta, and return the record."""
        run = problem.job.run
        step = shards[0].step + 1
        started = time.perf_counter()
        results = self.compute_shards(shards, check)
        computed = time.perf_counter()
        tasks = sum(result.tasks for result in results)
        dropped = [task for result in results for task in result.dropped]
        if not self.average(results, max(tasks, 1)):  # the sum of finite gradients may not be finite
            tasks = 0
            dropped = [task for shard in shards for task in range(shard.start, shard.stop)]
        if dropped and run.on_nonfinite == "stop":
            raise NumericsError(
                f"step {step}: non-finite meta-gradient of tasks {dropped} (run.on_nonfinite: stop)"
            )
        record: Record = {"step": step} | mean_metrics(results)
        averaged = time.perf_counter()
        rate = self.rate()
        norm = self.apply() if tasks else self.skip()
        updated = time.perf_counter()
        record |= {"grad_norm": norm, "outer_lr": rate, "tasks": tasks, "tasks_dropped": len(dropped)}
        if dropped:
            record["dropped"] = dropped
        # seconds of the workers, which work at the same time
        drawing = sum(result.seconds_draw for result in results) / self.pool.size
        computing = sum(result.seconds_compute for result in results) / self.pool.size
        return record | {
            "tasks_per_second": run.tasks_per_step / (updated - started),
            "seconds_step": updated - started,
            "seconds_draw": drawing,
            "seconds_compute": computing,
            "seconds_transfer": max(computed - started - drawing - computing, 0.0),
            "seconds_aggregate": averaged - computed,
            "seconds_outer": updated - averaged,
        }


def plan_step(problem: Problem, step: int) -> list[Shard]:
    """Return the shards of the step after `step` completed ones."""
    run = problem.job.run
    assert run.shards is not None, "resolved before step 0"
    return plan_shards(problem, "train", step, run.tasks_per_step, run.shards, problem.algorithm.inner_steps)


class CentralStep(GradientStep):
    """A step with theta, the sums and the optimizer in this process. A strategy says who computes the shards.

    `server` holds theta and the optimizer. `mean` is the mean meta-gradient between `average` and `apply`, else None.
    """

    def __init__(self, server: ParameterServer):
        self.server = server
        self.mean: np.ndarray | None = None
        self._snapshot: tuple[np.ndarray, TrainingState] | None = None

    def average(self, results: list[ShardResult], tasks: int) -> bool:
        gradients = [result.gradient for result in results if result.gradient is not None]
        self.mean = mean_vector([g if isinstance(g, np.ndarray) else decode(g) for g in gradients], tasks)
        return is_finite(self.mean)

    def apply(self) -> float:
        assert self.mean is not None
        norm = self.server.step(self.mean)
        self.mean = None
        return norm

    def skip(self) -> float:
        self.mean = None
        return self.server.skip()

    def rate(self) -> float:
        return self.server.rate()

    def flat_for(self, shards: Sequence[Shard]) -> np.ndarray:
        """Return theta itself, which the next step changes; in later epochs followed by the snapshot's theta."""
        if self._snapshot is not None and shards[0].epoch:
            return np.concatenate([self.server.vector(), self._snapshot[0]])
        return self.server.vector()

    def take_snapshot(self) -> None:
        self._snapshot = (self.server.flat(), self.state())

    def end_snapshot(self, undo: bool) -> None:
        if undo and self._snapshot is not None:
            self.server.load(*self._snapshot[1])
        self._snapshot = None

    def flat(self) -> np.ndarray:
        return self.server.flat()

    def state(self) -> TrainingState:
        return TrainingState(self.server.theta(), *self.server.state())

    def load(self, state: TrainingState, outer: OuterSection) -> None:
        self.server.retune(outer)
        self.server.load(*state)

    def retune(self, outer: OuterSection) -> None:
        self.server.retune(outer)

    def close(self) -> None:
        self.pool.close()


class Driver(CentralStep):
    """The strategy `driver`. Its option:

    Args:
        compress: how gradients travel. The workers read it from the job.
    """

    requires_workers = False
    equals_driver = True

    def __init__(
        self,
        problem: Problem,
        outer: OuterSection,
        state: TrainingState | None,
        report: Callable[[str], None],
        compress: Compression = "none",
    ):
        super().__init__(build_server(problem, outer, state))
        self.pool = open_pool(problem, self.server.layout, report)

    def compute_shards(self, shards: Sequence[Shard], check: Callable[[], None]) -> list[ShardResult]:
        return self.pool.map(self.flat_for(shards), shards, check)
