"""What travels between the driver and its workers."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from distmeta.compute.compression import Vector
from distmeta.compute.predictions import Predictions
from distmeta.compute.vectors import Layout
from distmeta.config.job import Job
from distmeta.runtime.problem import Problem, build_problem, check_data, export_constants, read_fingerprint


@dataclass(frozen=True)
class Shard:
    """Some tasks of a step or of an evaluation, which one worker computes in one go. Only integers travel."""

    index: int
    split: str
    step: int
    """The outer step, counted from 0; 0 in an evaluation."""
    count: int
    """Tasks of the whole step or evaluation."""
    start: int
    stop: int
    """The shard's tasks are [start, stop) of those."""
    inner_steps: int
    outputs: bool = False
    """Evaluation: whether to return the predictions too."""
    phase: int = 0
    """How many of the job's changes are in effect."""
    epoch: int = 0
    """Training: which outer step on the same episodes. From 1 on, the flat vector that comes with the shard is theta
    followed by the theta that the episodes were collected with."""
    version: int = 0
    """Identifies theta, if a step computes shards with different ones."""
    compress: str = "none"
    """How the gradient travels: `none`, `bf16` or `int8`."""

    @property
    def kind(self) -> tuple[str, int, bool]:
        """Shards of the same kind take about equally long. Later epochs do not draw episodes."""
        return self.split, self.inner_steps, self.epoch > 0

    def __str__(self) -> str:
        return f"shard {self.index} (tasks {self.start} to {self.stop - 1})"


@dataclass(frozen=True)
class ShardResult:
    """What comes of a shard."""

    index: int
    gradient: Vector | None
    """Training: the sum of the tasks' meta-gradients, as a flat float32 vector or compressed."""
    tasks: int
    """Number of finite tasks."""
    dropped: tuple[int, ...]
    """The other tasks, numbered within the step."""
    metrics: dict[str, np.ndarray]
    """Training: one number per task, [T]. Evaluation: [T, K+1], after 0 … K inner steps."""
    predictions: list[Predictions] | None
    """Labels and predictions of every task's query rows."""
    seconds_draw: float
    seconds_compute: float


@dataclass(frozen=True)
class WorkerSpec:
    """All that a worker needs to start. It is sent once."""

    job: dict[str, Any]
    layout: Layout
    constants: dict[str, np.ndarray]
    """The model's frozen parameters and buffers."""
    folder: str
    """The driver's working folder, which is importable on workers too."""
    data: str | None = None
    """The fingerprint of the driver's data."""

    @classmethod
    def from_problem(cls, problem: Problem, layout: Layout) -> WorkerSpec:
        data = read_fingerprint(problem.family)
        return cls(problem.job.to_dict(), layout, export_constants(problem.model), os.getcwd(), data)

    def build_problem(self) -> Problem:
        """Build the problem in the worker's process."""
        if self.folder not in sys.path:
            sys.path.insert(0, self.folder)
        with contextlib.suppress(OSError):  # if a node lacks the folder, relative paths fail later, by name
            if os.path.isdir(self.folder):
                os.chdir(self.folder)
        problem = build_problem(Job.parse(self.job), self.constants)
        check_data(problem, self.data)
        return problem


class Pool(Protocol):
    """Computes shards: this process, or Ray actors."""

    @property
    def size(self) -> int:
        """Number of workers that compute now."""
        ...

    def map(self, flat: np.ndarray, shards: Sequence[Shard], check: Callable[[], None]) -> list[ShardResult]:
        """Compute the shards with theta as `flat` (float32 vector).

        Args:
            check: called while the pool waits; raises to abandon the shards.

        Returns:
            The results in the order of `shards`. The gradients are valid until the next call.
        """
        ...

    def close(self) -> None:
        """Let the workers go."""
        ...
