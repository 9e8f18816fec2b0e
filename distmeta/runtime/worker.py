"""What computes shards: the same plain class in-process and as a Ray actor."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from distmeta.compute.compiler import Compiler, MissingCompilerError, missing
from distmeta.compute.compression import Vector, encode
from distmeta.compute.episodes import episodes_of
from distmeta.compute.gradient import shard_gradient
from distmeta.compute.memory import keep_freed
from distmeta.compute.scoring import score_tasks
from distmeta.compute.vectors import Buffer, Flat, Layout, shared, whole
from distmeta.config.job import Job
from distmeta.errors import InputError
from distmeta.protocols import Theta
from distmeta.runtime.prefetch import Ahead
from distmeta.runtime.problem import (
    Problem,
    build,
    check_data,
    constants_of,
    fingerprint_of,
    numerics_of,
    shard_slices,
)
from distmeta.seeding import task_generator, task_ids

ROUNDING = 2**62
"""The part of a task's random numbers that gradients are rounded by, past those of any inner step and family."""


@dataclass(frozen=True)
class Shard:
    """The integers that say which tasks to compute."""

    index: int
    split: str
    step: int
    count: int
    """Tasks of the whole step or evaluation."""
    start: int
    stop: int
    inner_steps: int
    outputs: bool = False
    """Evaluation: also return the predictions."""
    phase: int = 0
    """How many of the job's changes hold."""
    epoch: int = 0
    """Training: which step of the outer optimizer on the same episodes. From 1 on the flat vector that comes with it is
    theta followed by the theta that the episodes are of."""
    version: int = 0
    """Which theta it is computed with, where that is not the one of its step."""
    compress: str = "none"
    """How its gradient travels."""

    @property
    def kind(self) -> tuple[str, int, bool]:
        """Shards of a kind take about as long as each other; later epochs find their episodes made."""
        return self.split, self.inner_steps, self.epoch > 0

    def __str__(self) -> str:
        return f"shard {self.index} (tasks {self.start} to {self.stop - 1})"


@dataclass(frozen=True)
class ShardResult:
    """What comes back: one flat vector (training), a number a task, and where the time went."""

    index: int
    gradient: Vector | None
    """As it travels: in float32, or coded as `strategy.compress` says."""
    tasks: int
    dropped: tuple[int, ...]
    """Task indices within the step."""
    metrics: dict[str, np.ndarray]
    predictions: list[tuple[np.ndarray, np.ndarray]] | None
    """A task's labels and predictions of its query rows, [Q] each (or [Q, D])."""
    seconds_draw: float
    seconds_compute: float


@dataclass(frozen=True)
class WorkerSpec:
    """All that a worker needs to start: sent once."""

    job: dict[str, Any]
    layout: Layout
    constants: dict[str, np.ndarray]
    folder: str
    """The driver's working folder, importable on workers too."""
    data: str | None = None
    """The fingerprint of the driver's data."""

    @classmethod
    def of(cls, problem: Problem, layout: Layout) -> WorkerSpec:
        """For a problem that the driver has built."""
        data = fingerprint_of(problem.family)
        return cls(problem.job.to_dict(), layout, constants_of(problem.model), os.getcwd(), data)


class Worker:
    """Computes any shard of a job. Holds nothing that a result depends on but the job."""

    def __init__(self, spec: WorkerSpec):
        self._start(problem_of(spec), spec.layout)
        self.draw_ahead()

    @classmethod
    def of(cls, problem: Problem, layout: Layout) -> Worker:
        """A worker in this process, on a problem that is already built."""
        worker = cls.__new__(cls)
        worker._start(problem, layout)
        return worker

    def _start(self, problem: Problem, layout: Layout) -> None:
        keep_freed()
        self.layout = layout
        if problem.job.compute.compile and (lacking := missing(problem.device.type)):
            raise MissingCompilerError(lacking)
        self._enter(problem)
        device = problem.device
        self._there = None if device.type == "cpu" else torch.zeros(layout.size, device=device)
        """Where a device with memory of its own adds a gradient up."""
        self._version: tuple[str, int, int, int] | None = None
        self._theta: Theta = {}
        self._viewed: np.ndarray | None = None
        """The vector that `_theta` lies in, where it does: whatever is written to it is seen."""
        self._kept: dict[tuple[int, int], Any] = {}
        """Episodes of this step by step and shard, where later epochs ask for them again."""
        self._ahead: Ahead | None = None
        """In a process of its own alone: the one that a debugger steps through has one thread."""

    def _enter(self, problem: Problem) -> None:
        """Takes up a problem; compiled code has the values of a phase written into it."""
        compute = problem.job.compute
        self._problem = problem
        self._compiler = Compiler(compute.precision) if compute.compile else None

    def enter(self, phase: int) -> Problem:
        """The problem at a phase, from here on."""
        if phase != self._problem.phase:
            self._enter(self._problem.at(phase))
        return self._problem

    def draw_ahead(self) -> None:
        """Draws tasks ahead from here on, where the job does: for a worker in a process of its own."""
        if self._problem.draws_ahead:
            self._ahead = Ahead(self._problem.job.compute.threads)

    def buffer(self) -> Buffer:
        """Memory for a gradient."""
        return Buffer(self.layout, self._there)

    def compute(self, flat: Flat, shard: Shard, out: Buffer | None = None) -> ShardResult:
        """The shard's gradient sum (split "train"), or its scores.

        Args:
            out: the gradient's memory; None: new.
        """
        self.enter(shard.phase)
        with numerics_of(self._problem.job, self._problem.device):
            self._receive(flat, shard)
            return self._gradient(flat, shard, out) if shard.split == "train" else self._scores(flat, shard)

    def _receive(self, flat: Flat, shard: Shard) -> None:
        """theta by name, as views of the vector where it lies: once a step, however many of its shards come here, and
        once for all where it is the same vector."""
        version = (shard.split, shard.step, shard.epoch, shard.version)
        if flat is self._viewed:
            return
        if self._viewed is not None or version != self._version or shard.split != "train":
            given = whole(flat)[: self.layout.size]
            vector = shared(given).to(self._problem.device)
            self._theta = self.layout.views(vector)
            self._viewed, self._version = None, version
            # a tuple is another one in every call: its shards go by their version
            if isinstance(flat, np.ndarray) and vector.data_ptr() == given.ctypes.data:
                self._viewed = flat

    def _episodes(self, flat: Flat, shard: Shard, ids: np.ndarray) -> tuple[Any, float]:
        """The shard's episodes, and the seconds it took.

        Later epochs on them find them here, or collect them again from the theta that they are of: the same to the bit.
        """
        problem, name = self._problem, (shard.step, shard.index)
        started = time.perf_counter()
        episodes = self._kept.get(name) if shard.epoch else None
        if self._ahead is not None and shard.split != "train":
            self._ahead.wait()
        if episodes is None and self._ahead is not None and shard.split == "train":
            episodes = self._ahead.draw(shard, lambda shard: self._draw(shard, self._ids(shard)))
        elif episodes is None:
            theta = self._theta
            if shard.epoch:
                theta = self.layout.unflatten(whole(flat)[self.layout.size :], problem.device)
            episodes = self._draw(shard, ids, theta)
        if shard.split == "train" and problem.outer_epochs > 1:
            self._kept = {key: kept for key, kept in self._kept.items() if key[0] == shard.step}
            self._kept[name] = episodes
        return episodes, time.perf_counter() - started

    def _ids(self, shard: Shard) -> np.ndarray:
        seed = self._problem.job.seed
        return task_ids(seed, shard.split, shard.step, shard.count)[shard.start : shard.stop]

    def _draw(self, shard: Shard, ids: np.ndarray, theta: Theta | None = None) -> Any:
        """The shard's episodes. None: of a family that needs no theta for them."""
        problem = self._problem
        return episodes_of(
            problem.family,
            problem.algorithm,
            theta or {},
            shard.split,
            ids,
            shard.inner_steps,
            problem.device,
        )

    def _gradient(self, flat: Flat, shard: Shard, out: Buffer | None) -> ShardResult:
        problem, out = self._problem, out or self.buffer()
        ids = self._ids(shard)
        episodes, drawing = self._episodes(flat, shard, ids)
        started = time.perf_counter()
        result = shard_gradient(
            problem.training_at(shard.step),
            problem.score("train"),
            self._theta,
            episodes,
            ids,
            problem.execution,
            self._compiler,
            into=out.views,
            before=problem.scores_before(shard.step),
        )
        gradient = out.fetched()
        # a task's own, so that the bits are the same whichever worker rounds
        draws = task_generator(ids[0], ROUNDING + shard.epoch) if shard.compress != "none" else None
        dropped = tuple(shard.start + i for i in result.dropped)
        return ShardResult(
            shard.index,
            encode(gradient, shard.compress, draws),
            result.tasks,
            dropped,
            result.metrics,
            None,
            drawing,
            time.perf_counter() - started,
        )

    def _scores(self, flat: Flat, shard: Shard) -> ShardResult:
        problem = self._problem
        ids = self._ids(shard)
        episodes, drawing = self._episodes(flat, shard, ids)
        started = time.perf_counter()
        with evaluating(problem.model.module):
            scores = score_tasks(
                problem.adapting(shard.split),
                problem.score(shard.split),
                self._theta,
                episodes,
                ids,
                problem.execution,
                shard.inner_steps,
                shard.outputs,
            )
        predictions = _predictions(problem, episodes, scores.outputs) if shard.outputs else None
        tasks = shard.stop - shard.start
        return ShardResult(
            shard.index, None, tasks, (), scores.metrics, predictions, drawing, time.perf_counter() - started
        )


def problem_of(spec: WorkerSpec) -> Problem:
    """The problem, built in a worker's process."""
    if spec.folder not in sys.path:
        sys.path.insert(0, spec.folder)
    with contextlib.suppress(OSError):  # a node may lack the folder: its relative paths then fail by name
        if os.path.isdir(spec.folder):
            os.chdir(spec.folder)
    problem = build(Job.parse(spec.job), spec.constants)
    check_data(problem, spec.data)
    return problem


@contextlib.contextmanager
def evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Dropout off, and each submodule back in its own mode afterwards."""
    modes = {m: m.training for m in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for m, training in modes.items():
            m.training = training


def _predictions(problem: Problem, episodes: Any, outputs: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    """Labels and predictions: classes for integer labels, of the ways that are scored; else the outputs themselves."""
    try:
        labels_T = [one.query.y for one in episodes] if isinstance(episodes, list) else episodes.query.y
    except AttributeError:
        raise InputError("--predictions: this task family has no labels") from None
    ways = getattr(problem.family, "eval_ways", None)
    rows = []
    for labels, output in zip(labels_T, outputs, strict=True):
        predicted = output if labels.is_floating_point() else output[..., :ways].argmax(-1)
        rows.append((labels.cpu().numpy(), predicted.cpu().numpy()))
    return rows


def shards_of(
    problem: Problem, split: str, step: int, count: int, pieces: int, inner_steps: int, outputs: bool = False
) -> list[Shard]:
    """The plan of a step (or of an evaluation): which tasks each shard holds."""
    trains = split == "train"
    more = {"phase": problem.phase, "compress": problem.job.strategy.compress if trains else "none"}
    slices = shard_slices(count, pieces, problem.algorithm.group_size if trains else 1)
    return [
        Shard(index, split, step, count, piece.start, piece.stop, inner_steps, outputs, **more)
        for index, piece in enumerate(slices)
    ]
