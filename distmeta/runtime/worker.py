"""Computes shards: plans them, draws their tasks, and takes their gradients or scores.

`LocalPool` does so in this process. In a Ray worker an actor holds a `Worker` (`runtime.ray_workers`).
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import numpy as np
import torch

from distmeta.compute.compiler import Compiler, MissingCompilerError, find_missing_tool
from distmeta.compute.compression import encode
from distmeta.compute.episodes import collect_episodes, draw_episodes
from distmeta.compute.execution import build_method
from distmeta.compute.gradient import build_objective, sum_gradients
from distmeta.compute.memory import keep_freed_memory
from distmeta.compute.vectors import Buffer, Flat, Layout, as_tensor, join
from distmeta.protocols import CollectsData, Episodes, Theta
from distmeta.runtime.prefetch import Prefetcher
from distmeta.runtime.problem import Problem, apply_job_numerics
from distmeta.runtime.shard_scores import score_shard
from distmeta.runtime.shards import Shard, ShardResult, WorkerSpec
from distmeta.seeding import task_generator, task_ids

ROUNDING = 2**62
"""The part of a task's random numbers that rounds gradients. Inner steps and families use lower parts."""


def plan_shards(
    problem: Problem, split: str, step: int, count: int, pieces: int, inner_steps: int, outputs: bool = False
) -> list[Shard]:
    """Cut the tasks of a step or an evaluation into fixed shards of whole groups, as even as possible."""
    is_training = split == "train"
    compress = problem.job.strategy.compress if is_training else "none"
    group_size = problem.algorithm.group_size if is_training else 1
    groups = count // group_size
    edges = [math.floor(groups * i / pieces) * group_size for i in range(pieces + 1)]
    same = {"outputs": outputs, "phase": problem.phase, "compress": compress}
    return [Shard(i, split, step, count, edges[i], edges[i + 1], inner_steps, **same) for i in range(pieces)]


class Worker:
    """Computes any shard of a job. Its results only depend on the job, theta and the shard."""

    def __init__(self, problem: Problem, layout: Layout):
        keep_freed_memory()
        compiles = problem.job.compute.compile
        missing_tool = find_missing_tool(problem.device.type) if compiles else None
        if missing_tool is not None:
            raise MissingCompilerError(missing_tool)
        self.layout = layout
        self._enter(problem)
        self._holds_numerics = False
        on_cpu = problem.device.type == "cpu"
        self._device_gradient = None if on_cpu else torch.zeros(layout.size, device=problem.device)
        """The flat vector in GPU memory that gradients are summed in."""
        self._theta: Theta = {}
        self._theta_version: tuple[str, int, int, int] | None = None
        self._viewed: np.ndarray | None = None
        """The vector that `_theta` views, if it does: whatever is written to the vector is seen."""
        self._kept: dict[tuple[int, int], Episodes] = {}
        """Episodes of this step by step and shard, if later epochs need them."""
        self._prefetcher: Prefetcher | None = None

    @classmethod
    def from_spec(cls, spec: WorkerSpec) -> Worker:
        """Build a worker in its own process. It may draw tasks ahead, in a second thread."""
        worker = cls(spec.build_problem(), spec.layout)
        worker.start_prefetching()
        return worker

    def start_prefetching(self) -> None:
        """Draw the next shard's tasks while computing this one, if the job does so."""
        if self._problem.draws_ahead:
            self._prefetcher = Prefetcher(self._problem.job.compute.threads)

    def enter_phase(self, phase: int) -> Problem:
        """Take up the values of a phase of the job, and return the problem with them."""
        if phase != self._problem.phase:
            self._enter(self._problem.at(phase))
        return self._problem

    def _enter(self, problem: Problem) -> None:
        """Take up a problem. Compiled code has the values of a phase built in."""
        compute = problem.job.compute
        compiler = Compiler(compute.precision) if compute.compile else None
        self._problem = problem
        self._score = problem.score("train")
        self._method = build_method(problem.execution, compiler)

    @contextlib.contextmanager
    def hold_numerics(self) -> Iterator[None]:
        """Apply the job's numerical settings once for all shards in the block. Without it, each shard applies them."""
        with apply_job_numerics(self._problem.job, self._problem.device):
            self._holds_numerics = True
            try:
                yield
            finally:
                self._holds_numerics = False

    def buffer(self) -> Buffer:
        """Return memory for a gradient."""
        return Buffer(self.layout, self._device_gradient)

    def compute(self, flat: Flat, shard: Shard, gradient: Buffer | None = None) -> ShardResult:
        """Compute the sum of the shard's gradients (split "train"), or its scores.

        Args:
            flat: theta; in later epochs followed by the theta that the episodes were collected with.
            gradient: memory for the gradient; None: new memory.
        """
        if shard.phase != self._problem.phase:
            self.enter_phase(shard.phase)
        if self._holds_numerics:
            return self._compute(flat, shard, gradient)
        with apply_job_numerics(self._problem.job, self._problem.device):
            return self._compute(flat, shard, gradient)

    def _compute(self, flat: Flat, shard: Shard, gradient: Buffer | None) -> ShardResult:
        self._receive(flat, shard)
        ids = self._find_ids(shard)
        started = time.perf_counter()
        episodes = self._make_episodes(flat, shard, ids)
        drawn = time.perf_counter()
        if shard.split != "train":
            metrics, predictions = score_shard(self._problem, self._theta, shard, ids, episodes)
            seconds = time.perf_counter() - drawn
            return ShardResult(
                shard.index, None, len(ids), (), metrics, predictions, drawn - started, seconds
            )
        algorithm = self._problem.training_at(shard.step)
        every = self._problem.job.run.before_every
        objective = build_objective(algorithm, self._score, every > 0 and shard.step % every == 0)
        gradient = gradient or self.buffer()
        result = sum_gradients(objective, self._theta, episodes, ids, self._method, gradient.views)
        if self._device_gradient is not None:
            gradient.fetch()
        vector = gradient.vector
        if shard.compress != "none":
            # random numbers of the task: the bits are the same, whichever worker rounds
            vector = encode(vector, shard.compress, task_generator(ids[0], ROUNDING + shard.epoch))
        dropped = tuple(shard.start + position for position in result.dropped)
        seconds = time.perf_counter() - drawn
        return ShardResult(
            shard.index, vector, result.tasks, dropped, result.metrics, None, drawn - started, seconds
        )

    def _receive(self, flat: Flat, shard: Shard) -> None:
        """Make theta's tensors views of the vector: once per step, or only once if it is always the same vector."""
        if flat is self._viewed:
            return
        version = (shard.split, shard.step, shard.epoch, shard.version)
        if self._viewed is None and version == self._theta_version and shard.split == "train":
            return
        vector = join(flat)[: self.layout.size]
        tensor = as_tensor(vector).to(self._problem.device)
        self._theta = self.layout.views(tensor)
        self._theta_version = version
        # Ray passes another tuple with every call; only an array that stays the same can be recognised
        self._viewed = None
        if isinstance(flat, np.ndarray) and tensor.data_ptr() == vector.ctypes.data:
            self._viewed = flat

    def _find_ids(self, shard: Shard) -> np.ndarray:
        seed = self._problem.job.seed
        return task_ids(seed, shard.split, shard.step, shard.count)[shard.start : shard.stop]

    def _make_episodes(self, flat: Flat, shard: Shard, ids: np.ndarray) -> Episodes:
        """Return the shard's episodes. Later epochs find them here, or collect them again with the same theta."""
        is_training = shard.split == "train"
        name = (shard.step, shard.index)
        episodes = self._kept.get(name) if shard.epoch else None
        if self._prefetcher is not None and not is_training:
            self._prefetcher.wait()  # a family is used by one thread at a time
        if episodes is None and self._prefetcher is not None and is_training:
            episodes = self._prefetcher.draw(
                shard, lambda shard: self._draw(shard, self._find_ids(shard), {})
            )
        elif episodes is None:
            theta = self._theta
            if shard.epoch:
                theta = self.layout.unflatten(join(flat)[self.layout.size :], self._problem.device)
            episodes = self._draw(shard, ids, theta)
        if is_training and self._problem.outer_epochs > 1:
            self._kept = {key: kept for key, kept in self._kept.items() if key[0] == shard.step}
            self._kept[name] = episodes
        return episodes

    def _draw(self, shard: Shard, ids: np.ndarray, theta: Theta) -> Episodes:
        problem = self._problem
        family = problem.family
        if isinstance(family, CollectsData):
            return collect_episodes(
                family, problem.algorithm, theta, shard.split, ids, shard.inner_steps, problem.device
            )
        return draw_episodes(family, shard.split, ids, problem.device)


class LocalPool:
    """Computes in this process, one shard after the other. A debugger can step through it."""

    size = 1

    def __init__(self, problem: Problem, layout: Layout):
        self.worker = Worker(problem, layout)
        self._gradients: list[Buffer] = []
        self._held = ExitStack()
        self._held.enter_context(self.worker.hold_numerics())

    def map(self, flat: np.ndarray, shards: Sequence[Shard], check: Callable[[], None]) -> list[ShardResult]:
        results = []
        for position, shard in enumerate(shards):
            check()
            gradient = None
            if shard.split == "train":
                if position == len(self._gradients):
                    self._gradients.append(self.worker.buffer())
                gradient = self._gradients[position]
            results.append(self.worker.compute(flat, shard, gradient))
        check()
        return results

    def close(self) -> None:
        self._held.close()
