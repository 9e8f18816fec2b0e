"""A replica of `local`: some outer steps on its own share of each step's shards, from a given theta and state.

Whichever worker computes it, and however often, what comes out is the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from distmeta.compute.compression import Vector, decode, encode
from distmeta.compute.vectors import Layout
from distmeta.config.sections import OuterSection
from distmeta.runtime.parameter_server import ParameterServer
from distmeta.runtime.problem import Problem
from distmeta.runtime.strategy import Record
from distmeta.runtime.worker import Shard, ShardResult, Worker
from distmeta.strategies.gradient_step import Central, plan_of

RESIDUAL = "residual"
"""The quantity beside the optimizer's: what coding the last delta left out."""


@dataclass(frozen=True)
class Round:
    """The steps that a replica takes on its own."""

    index: int
    """The replica."""
    of: int
    """Replicas."""
    start: int
    stop: int
    """Completed steps before and after."""
    phase: int
    outer: OuterSection
    clock: dict[str, Any]
    """The schedule's clock; nothing at step 0."""

    @property
    def kind(self) -> tuple[str, int, bool]:
        return "round", self.stop - self.start, False

    def __str__(self) -> str:
        return f"replica {self.index} (steps {self.start + 1} to {self.stop})"


@dataclass(frozen=True)
class RoundResult:
    """What every replica tells; its delta and its state are objects of their own."""

    records: list[Record]
    clock: dict[str, Any]
    seconds: float


class Replica(Central):
    """`driver` on one worker and some of the shards."""

    def __init__(self, server: ParameterServer, worker: Worker, index: int):
        super().__init__(server)
        self.pool = self
        self._worker, self._index = worker, index

    size = 1

    def map(self, flat: np.ndarray, shards: Sequence[Shard], check: Callable[[], None]) -> list[ShardResult]:
        return [
            self._worker.compute(flat, replace(shard, version=self._index, compress="none"))
            for shard in shards
        ]

    def close(self) -> None:
        pass

    def take(self, problem: Problem, plan: list[Shard]) -> Record:
        """One step on some shards."""
        return self._advance(problem, plan, lambda: None)

    def _map(self, shards: Sequence[Shard], check: Callable[[], None]) -> list[ShardResult]:
        return self.map(self._flat_for(shards), shards, check)


def run_round(
    worker: Worker, own: Round, flat: np.ndarray, state: dict[str, np.ndarray]
) -> tuple[RoundResult, Vector, dict[str, np.ndarray]]:
    """H outer steps: what happened, theta before minus theta after (coded, as the run compresses), the new state.

    What coding leaves out is added to the next delta (error feedback, Seide et al. 2014).
    """
    started = time.perf_counter()
    problem, layout = worker.enter(own.phase), worker.layout
    theta = layout.unflatten(flat)
    server = ParameterServer(theta, own.outer)
    if own.clock:
        moments = {key: value for key, value in state.items() if not key.endswith(f"/{RESIDUAL}")}
        server.load(theta, tensors_of(moments), own.clock)
    replica, records = Replica(server, worker, own.index), []
    for step in range(own.start, own.stop):
        plan = plan_of(problem, step)
        records.append(replica.take(problem, plan[share(len(plan), own)]))
    delta = flat - server.flat()
    tensors, clock = server.state()
    kept = {key: value.numpy() for key, value in tensors.items()}
    how = problem.job.strategy.compress
    coded = delta
    if how != "none":
        delta = delta + residual_of(layout, state)
        coded = encode(delta, how)
        kept |= by_name(layout, delta - decode(coded))
    return RoundResult(records, clock, time.perf_counter() - started), coded, kept


def share(shards: int, own: Round) -> slice:
    """Which of a step's shards are the replica's."""
    return slice(shards * own.index // own.of, shards * (own.index + 1) // own.of)


def tensors_of(state: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(np.array(value)) for key, value in state.items()}


def residual_of(layout: Layout, state: dict[str, np.ndarray]) -> np.ndarray:
    if f"{layout.names[0]}/{RESIDUAL}" not in state:
        return np.zeros(layout.size, np.float32)
    return layout.flatten({name: torch.from_numpy(state[f"{name}/{RESIDUAL}"]) for name in layout.names})


def by_name(layout: Layout, residual: np.ndarray) -> dict[str, np.ndarray]:
    views = layout.views(torch.from_numpy(residual))
    return {f"{name}/{RESIDUAL}": view.numpy() for name, view in views.items()}
