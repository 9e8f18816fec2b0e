"""A replica of `local`: some outer steps on its share of each step's shards, from a given theta and state.

The outcome is the same whichever worker computes it, and however often.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch

from distmeta.compute.compression import Vector, decode, encode
from distmeta.compute.vectors import Layout
from distmeta.config.sections import OuterSection
from distmeta.runtime.parameter_server import ParameterServer
from distmeta.runtime.shards import Shard, ShardResult
from distmeta.runtime.strategy import Record
from distmeta.runtime.worker import Worker
from distmeta.strategies.driver import CentralStep, plan_step

Value = TypeVar("Value")

RESIDUAL = "residual"
"""Name of the quantity that is kept beside those of the optimizer: what compression left out of the last delta."""


@dataclass(frozen=True)
class Round:
    """The steps that a replica takes before the next average."""

    index: int
    """Which replica."""
    replicas: int
    start: int
    """Completed steps before the round."""
    stop: int
    """Completed steps after the round."""
    phase: int
    """How many of the job's changes hold."""
    outer: OuterSection
    clock: dict[str, Any]
    """Clock of the schedule; empty at step 0."""

    @property
    def kind(self) -> tuple[str, int, bool]:
        """Rounds of the same kind take about equally long."""
        return "round", self.stop - self.start, False

    def __str__(self) -> str:
        return f"replica {self.index} (steps {self.start + 1} to {self.stop})"


@dataclass(frozen=True)
class RoundResult:
    """What a replica returns to the driver. Its delta and its state are separate objects."""

    records: list[Record]
    """One for each step."""
    clock: dict[str, Any]
    seconds: float
    """Duration of the round on the worker."""


class Replica(CentralStep):
    """The strategy `driver` with one worker, which is in this process, on some of a step's shards."""

    size = 1

    def __init__(self, server: ParameterServer, worker: Worker, index: int):
        super().__init__(server)
        self.pool = self
        self._worker = worker
        self._index = index

    def map(self, flat: np.ndarray, shards: Sequence[Shard], check: Callable[[], None]) -> list[ShardResult]:
        # the version is what tells the thetas of two replicas in the same worker apart
        return [
            self._worker.compute(flat, replace(shard, version=self._index, compress="none"))
            for shard in shards
        ]

    def close(self) -> None:
        pass

    def compute_shards(self, shards: Sequence[Shard], check: Callable[[], None]) -> list[ShardResult]:
        return self.map(self.flat_for(shards), shards, check)


def run_round(
    worker: Worker, one_round: Round, flat: np.ndarray, state: dict[str, np.ndarray]
) -> tuple[RoundResult, Vector, dict[str, np.ndarray]]:
    """Take a replica's outer steps.

    With compression, what it leaves out is added to the next delta (error feedback, Seide et al. 2014).

    Args:
        flat: theta before the round, a float32 vector.
        state: the replica's state as the last round returned it; empty at step 0.

    Returns:
        What happened; the delta, theta before minus theta after, as the job compresses it; the new state.
    """
    started = time.perf_counter()
    problem = worker.enter_phase(one_round.phase)
    layout = worker.layout
    theta = layout.unflatten(flat)
    server = ParameterServer(theta, one_round.outer)
    if one_round.clock:
        moments, _ = split_state(state)
        server.load(theta, to_tensors(moments), one_round.clock)
    replica = Replica(server, worker, one_round.index)
    records = []
    for step in range(one_round.start, one_round.stop):
        shards = plan_step(problem, step)
        own_shards = shards[replica_share(len(shards), one_round)]
        records.append(replica.take_step(problem, own_shards, check=lambda: None))
    delta = flat - server.flat()
    encoded: Vector = delta
    tensors, clock = server.state()
    new_state = {key: value.numpy() for key, value in tensors.items()}
    compression = problem.job.strategy.compress
    if compression != "none":
        delta = delta + flatten_residual(layout, state)
        encoded = encode(delta, compression)
        new_state |= unflatten_residual(layout, delta - decode(encoded))
    result = RoundResult(records, clock, time.perf_counter() - started)
    return result, encoded, new_state


def replica_share(shards: int, one_round: Round) -> slice:
    """Return which of a step's shards belong to the replica."""
    index = one_round.index
    replicas = one_round.replicas
    return slice(shards * index // replicas, shards * (index + 1) // replicas)


def split_state(state: Mapping[str, Value]) -> tuple[dict[str, Value], dict[str, Value]]:
    """Return what the optimizer keeps, and what compression has left out so far."""
    residuals = {key: value for key, value in state.items() if key.endswith(f"/{RESIDUAL}")}
    return {key: value for key, value in state.items() if key not in residuals}, residuals


def to_tensors(state: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Return a copy of the state as tensors."""
    return {key: torch.from_numpy(np.array(value)) for key, value in state.items()}


def flatten_residual(layout: Layout, state: dict[str, np.ndarray]) -> np.ndarray:
    """Return the residual in a replica's state as a flat vector; zeros if there is none."""
    if f"{layout.names[0]}/{RESIDUAL}" not in state:
        return np.zeros(layout.size, np.float32)
    return layout.flatten({name: torch.from_numpy(state[f"{name}/{RESIDUAL}"]) for name in layout.names})


def unflatten_residual(layout: Layout, residual: np.ndarray) -> dict[str, np.ndarray]:
    """Return a flat residual as entries of a replica's state."""
    views = layout.views(torch.from_numpy(residual))
    return {f"{name}/{RESIDUAL}": view.numpy() for name, view in views.items()}
