"""The group behind `all-reduce`: replicas of theta and optimizer under Ray Train, and the actor they are reached by.

Host (an actor)      runs TorchTrainer.fit; holds the driver's commands and the ranks' answers
  └ Ray Train's controller, which makes the group anew where one of it is lost
      └ ranks        each a replica: asks the host for the next command, and answers it
"""

from __future__ import annotations

import asyncio
import pickle
import traceback
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from distmeta.compute.vectors import Layout
from distmeta.config.sections import OuterSection, RunSection
from distmeta.runtime.checkpoint import TrainingState
from distmeta.runtime.parameter_server import ParameterServer
from distmeta.runtime.ray_workers import describe
from distmeta.runtime.worker import Shard

ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",  # its own: 2
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",  # ranks that wait for a lost one cannot leave by themselves
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # an actor more, for who saves on notice
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "MALLOC_ARENA_MAX": "1",  # Ray Train computes on a thread: its own part of memory glibc would give back
}
"""Of the host and, as Ray hands it on, of all below it."""
GET_SECONDS = 60.0
"""Longest wait for what is said to be ready."""


@dataclass(frozen=True)
class Load:
    """Take up a state, and the optimizer's settings it was made with."""

    state: list[Any]
    """A reference to its `Packed`: in a list, where Ray leaves it alone."""
    outer: OuterSection


@dataclass(frozen=True)
class Steps:
    """Take `count` steps after `step` completed ones, with so many of the job's changes."""

    step: int
    count: int
    phase: int


@dataclass(frozen=True)
class Score:
    """Score the shards, shard i on rank i mod world."""

    shards: tuple[Shard, ...]
    flat: list[Any] | None
    """A reference to what is scored; None: the replicas' theta."""


@dataclass(frozen=True)
class Give:
    """Rank 0 gives its state and every rank the checksum of its theta, or rank 0 theta alone."""

    whole: bool


@dataclass(frozen=True)
class Retune:
    outer: OuterSection


@dataclass(frozen=True)
class Halt:
    """Abandon what you are at; no answer is expected."""


@dataclass(frozen=True)
class Stop:
    """Leave."""


@dataclass(frozen=True)
class PackedState:
    """A state as numpy, which travels without a copy."""

    flat: np.ndarray
    optimizer: dict[str, np.ndarray]
    outer: dict[str, Any]

    @staticmethod
    def of(server: ParameterServer, whole: bool = True) -> PackedState:
        tensors, plain = server.state() if whole else ({}, {})
        return PackedState(server.flat(), {key: value.numpy() for key, value in tensors.items()}, plain)

    @staticmethod
    def from_state(state: TrainingState, layout: Layout) -> PackedState:
        tensors = {key: value.numpy() for key, value in state.optimizer.items()}
        return PackedState(layout.flatten(state.theta), tensors, state.outer)

    def unpacked(self, layout: Layout) -> TrainingState:
        """The copy is on purpose: the arrays are views of shared memory."""
        tensors = {key: torch.from_numpy(np.array(value)) for key, value in self.optimizer.items()}
        return TrainingState(layout.unflatten(self.flat), tensors, self.outer)


@dataclass(frozen=True)
class RankError:
    """What a rank's computation raised, and its traceback there."""

    error: Exception
    traceback: str

    @staticmethod
    def of(error: Exception) -> RankError:
        text = "".join(traceback.format_exception(error))
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # whatever a user's class may raise there
            error = RuntimeError(describe(error))
        return RankError(error, text)


@dataclass(frozen=True)
class RankAnswer:
    """A rank's: what it has so far, and what stopped it."""

    value: Any = None
    failure: RankError | None = None


@dataclass(frozen=True)
class Lost:
    """The group is no more; Ray Train makes another, unless `ended`."""

    reason: str
    count: int = 0
    """Groups lost so far."""
    ended: bool = False


class Abandoned(Exception):  # noqa: N818 - control flow within a rank
    """The driver wants no more of a command."""


class Host:
    """The actor that the driver and the ranks meet at. Whatever Ray Train starts is owned by it, and ends with it."""

    def __init__(self) -> None:
        self._changed = asyncio.Condition()
        self._attempt = ""
        """The group that is there; empty: none."""
        self._here: dict[int, RankError | None] = {}
        self._world = 0
        self._commands: list[Any] = []
        self._answers: dict[int, dict[int, RankAnswer]] = {}
        self._lost = Lost("it did not start yet")

    async def fit(self, spec: list[Any], run: RunSection, per_rank: int) -> None:
        """Runs the trainer, until its group was told to stop."""
        import ray

        from distmeta.strategies.all_reduce.ray_train import fit

        me = ray.get_runtime_context().current_actor
        try:
            await asyncio.to_thread(fit, me, spec, run, per_rank)
            reason = "it ended"
        except Exception as error:
            reason = f"{type(error).__name__}: " + " ".join(str(error).split())[:300]
        await self._drop(f"Ray Train gave up ({reason})", ended=True)

    async def join(self, attempt: str, rank: int, world: int, failure: RankError | None) -> None:
        """A rank is there, and built unless it failed to. Its first command is number 0."""
        async with self._changed:
            if attempt != self._attempt:
                if self._attempt:  # nobody was lost
                    self._lost = Lost(
                        f"Ray Train resized it from {self._world} to {world} workers", self._lost.count + 1
                    )
                self._attempt, self._world, self._here = attempt, world, {}
                self._commands, self._answers = [], {}
            self._here[rank] = failure
            self._changed.notify_all()

    async def next(self, attempt: str, number: int) -> Any:
        """A command, once there is one."""
        async with self._changed:
            await self._changed.wait_for(lambda: attempt != self._attempt or number < len(self._commands))
            return self._commands[number] if attempt == self._attempt else Stop()

    async def answer(self, attempt: str, number: int, rank: int, answer: RankAnswer) -> None:
        async with self._changed:
            if attempt == self._attempt:
                self._answers.setdefault(number, {})[rank] = answer
                self._changed.notify_all()

    async def lost(self, reason: str) -> None:
        """Ray Train found a rank that is no more."""
        await self._drop(reason)

    async def ready(self, known: int) -> tuple[str, int, RankError | None] | Lost:
        """The group, once it is there: its name, its ranks, and whether one failed to build. Sooner where more groups
        were lost than are `known` of: the last one.
        """
        async with self._changed:
            await self._changed.wait_for(
                lambda: (
                    (self._attempt and len(self._here) == self._world)
                    or self._lost.ended
                    or self._lost.count > known
                )
            )
            if not self._attempt or self._lost.count > known:
                return self._lost
            failures = [failure for failure in self._here.values() if failure is not None]
            return self._attempt, self._world, failures[0] if failures else None

    async def ask(self, attempt: str, command: Any) -> list[RankAnswer] | Lost:
        """Every rank's answer to a command, by rank."""
        async with self._changed:
            number = len(self._commands)
            self._commands.append(command)
            self._changed.notify_all()
            await self._changed.wait_for(
                lambda: attempt != self._attempt or len(self._answers.get(number, ())) == self._world
            )
            if attempt != self._attempt:
                return self._lost
            self._commands[number] = None  # it may hold a state
            answers = self._answers.pop(number)
            return [answers[rank] for rank in range(self._world)]

    async def tell(self, attempt: str, command: Any) -> None:
        """A command that has no answer."""
        async with self._changed:
            if attempt == self._attempt:
                self._commands.append(command)
                self._changed.notify_all()

    async def _drop(self, reason: str, ended: bool = False) -> None:
        async with self._changed:
            self._attempt, self._here = "", {}
            self._lost = Lost(reason, self._lost.count + 1, ended)
            self._changed.notify_all()
