"""Who computes the shards: this process, or Ray actors. The driver cannot tell which."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from distmeta.compute.vectors import Buffer, Layout
from distmeta.runtime.failure_policy import LostShardError, another_may_fare_better, backoff, gives_up, hung
from distmeta.runtime.pending_shards import PendingShards
from distmeta.runtime.problem import Problem
from distmeta.runtime.ray_cluster import connect, import_ray
from distmeta.runtime.ray_workers import GET_SECONDS, Fleet, describe, lost_by, reraise
from distmeta.runtime.worker import Shard, ShardResult, Worker, WorkerSpec

TIMED = 64
"""Shards of a kind whose times are remembered."""
STORE_SECONDS = 1.0
"""Between two tries to put theta into an object store that is full."""


class Pool(Protocol):
    @property
    def size(self) -> int:
        """Workers that compute now."""
        ...

    def map(self, flat: np.ndarray, shards: Sequence[Shard], check: Callable[[], None]) -> list[ShardResult]:
        """All shards' results in the order of `shards`; `check` raises to abandon them. Gradients hold until the next
        call."""
        ...

    def close(self) -> None: ...


class LocalPool:
    """Computes in this process, one shard after the other: the pool a debugger steps through."""

    size = 1

    def __init__(self, problem: Problem, layout: Layout):
        self.worker = Worker.of(problem, layout)
        self._outs: list[Buffer] = []

    def map(self, flat: np.ndarray, shards: Sequence[Shard], check: Callable[[], None]) -> list[ShardResult]:
        results = []
        for position, shard in enumerate(shards):
            check()
            if shard.split == "train" and position == len(self._outs):
                self._outs.append(self.worker.buffer())
            out = self._outs[position] if shard.split == "train" else None
            results.append(self.worker.compute(flat, shard, out))
        check()
        return results

    def close(self) -> None:
        pass


def open_pool(problem: Problem, layout: Layout, say: Callable[[str], None]) -> Pool:
    """The pool that the job asks for."""
    return RayPool(problem, layout, say) if problem.job.run.max_workers else LocalPool(problem, layout)


class ShardAnswer(NamedTuple):
    """What came of a shard (or of a replica's round)."""

    shard: Any
    """As it was handed out."""
    result: Any
    pieces: list[Any]
    """Ray objects that stay where they were made: its gradient, cut (a round: its delta and state)."""


@dataclass
class WorkOrder:
    """Shards to compute, and what with from here on."""

    shards: list[Any]
    """All of a kind; `kind` says how long they take, `str` what they are."""
    theta: Sequence[Any]
    """Ray objects: the flat vector in any number of pieces (a round: theta and the replica's state)."""
    edges: Sequence[int] = ()
    """Where gradients are cut; none: they come back with the results."""
    rounds: bool = False
    ahead: bool = False
    """Whether a worker may be given its next shard while it computes one: theta is what it will be then."""
    left: PendingShards[ShardAnswer] = field(init=False)

    def __post_init__(self) -> None:
        self.left = PendingShards(len(self.shards))

    @property
    def call(self) -> tuple[str, Sequence[Any], int]:
        """The worker's method, its further arguments, and how many objects it makes."""
        if self.rounds:
            return "round", self.theta, 3
        return "compute", [tuple(self.edges), *self.theta], max(len(self.edges), 1)


@dataclass(frozen=True)
class _Call:
    """What a worker computes, or will when it is done with what it was given before."""

    worker: int
    shard: Any
    position: int
    of: PendingShards[ShardAnswer]
    """What it was made for; it may outlast it, where another worker was faster."""
    pieces: list[Any]


class RayPool:
    """Hands shards to whichever worker is free, and again where one is lost or slow: whoever computes them, the bits
    are the same."""

    def __init__(self, problem: Problem, layout: Layout, say: Callable[[str], None]):
        self._ray = ray = import_ray(problem.job.run.address)
        self._run, self._say = problem.job.run, say
        least, most = self._run.min_workers, self._run.max_workers
        number = f"{least}" if least == most else f"{least} to {most}"
        say(f"starting {number} Ray worker{'s' * (most > 1)} …")
        self._disconnect = connect(ray, self._run.address, math.ceil(least * self._run.cpus_per_worker))
        self._compiles = problem.job.compute.compile
        self._calls: dict[Any, _Call] = {}
        self._timed: dict[tuple[str, int, bool], deque[float]] = {}
        try:
            spec = ray.put(WorkerSpec.of(problem, layout))
            self._fleet = Fleet(ray, self._run, spec, say)
            self._fleet.open()
        except BaseException:
            self.close()
            raise

    @property
    def size(self) -> int:
        return max(self._fleet.size, 1)

    @property
    def nodes(self) -> list[str]:
        """Ids of the nodes that workers are on."""
        return self._fleet.nodes()

    def map(self, flat: np.ndarray, shards: Sequence[Shard], check: Callable[[], None]) -> list[ShardResult]:
        work = WorkOrder(list(shards), [self.put(flat, check)], ahead=True)
        for _ in self.answers(work, check):
            pass
        return [answer.result for answer in work.left.in_order()]

    def answers(self, work: WorkOrder, check: Callable[[], None]) -> Iterator[tuple[int, ShardAnswer]]:
        """Each position's first answer, as it comes."""
        self.begin()
        while not work.left.done:
            check()
            self.turn([work])
            yield from work.left.fresh()

    def begin(self) -> None:
        """Before the first turn after a while."""
        self._fleet.resume()

    def turn(self, works: Sequence[WorkOrder]) -> None:
        """A moment of looking after workers that compute `works`, the first ones first.

        Raises:
            LostShardError: a shard cost too many workers, or none is left.
        """
        self._fleet.tend()
        self._hand_out(works)
        for finished in self._fleet.wait(list(self._calls)):
            self._take(finished)
        self._replace_hung()

    def close(self) -> None:
        if hasattr(self, "_fleet"):
            self._fleet.close()
        self._disconnect()

    def put(self, flat: np.ndarray, check: Callable[[], None]) -> Any:
        """theta in the object store; a full one is waited for."""
        errors, begun = self._ray.exceptions, time.monotonic()
        while True:
            try:
                return self._ray.put(flat)
            except (errors.ObjectStoreFullError, errors.OutOfDiskError) as error:
                if time.monotonic() - begun > self._run.start_timeout:
                    raise LostShardError(
                        f"theta finds no room in Ray's object store: {describe(error)}"
                    ) from None
                if time.monotonic() - begun < STORE_SECONDS:
                    self._say("Ray's object store is full: waiting for room")
                check()
                time.sleep(STORE_SECONDS)

    def _hand_out(self, works: Sequence[WorkOrder]) -> None:
        """Every idle worker gets a shard that nobody has, else one that another is slow with. Then a worker may get one
        more, so that it need not wait for this process, but the last shards wait for whoever is done first."""
        for worker in self._fleet.idle():
            work, position = self._next(works, time.monotonic())
            if work is None:
                return
            if work.left.next() != position:
                self._say(f"shard {work.shards[position].index} is slow: worker {worker} computes it as well")
            self._give(worker, work, position)
        for work in works:
            for worker in self._fleet.with_one():
                position = work.left.next()
                if position is not None and work.ahead and work.left.waiting > self._fleet.size:
                    self._give(worker, work, position)

    def _give(self, worker: int, work: WorkOrder, position: int) -> None:
        shard = work.shards[position]
        work.left.given(position, time.monotonic())
        method, arguments, outputs = work.call
        call, *pieces = self._fleet.give(worker, method, shard, arguments, outputs)
        self._calls[call] = _Call(worker, shard, position, work.left, pieces)

    def _next(self, works: Sequence[WorkOrder], now: float) -> tuple[WorkOrder | None, int]:
        for work in works:
            position = work.left.next()
            if position is not None:
                return work, position
        for work in works:
            position = work.left.straggler(now, self._times(work.shards[0].kind))
            if position is not None:
                return work, position
        return None, 0

    def _take(self, finished: Any) -> None:
        """A finished call: a result, or a worker lost. What the computation itself raised is raised."""
        call = self._calls[finished]
        try:
            result = self._ray.get(finished, timeout=GET_SECONDS)
        except self._ray.exceptions.RayTaskError as error:
            if not another_may_fare_better(error.cause):
                reraise(error)
            return self._lost(call.worker, describe(error))
        except lost_by(self._ray) as error:
            return self._lost(call.worker, describe(error))
        del self._calls[finished]
        self._times(call.shard.kind).append(time.monotonic() - self._fleet.since(call.worker))
        call.of.answered(call.position, ShardAnswer(call.shard, result, call.pieces))
        return self._fleet.freed(call.worker)

    def _lost(self, worker: int, reason: str) -> None:
        """Another worker in the lost one's place; its shards, unless answered, go to whoever is free. The one that it
        computed is blamed.

        Raises:
            LostShardError: this shard has cost too many.
        """
        keys = [key for key, one in self._calls.items() if one.worker == worker]
        call, *behind = [self._calls.pop(key) for key in keys]
        for other in reversed(behind):
            other.of.lost(other.position, blamed=False)
        blamed = not self._fleet.went_with_its_node(worker)
        failures = call.of.lost(call.position, blamed)
        wanted = call.position not in call.of.results
        delay = backoff(self._fleet.losses(worker) + 1) if blamed else 0.0
        if blamed and wanted:
            message = gives_up(str(call.shard), failures, self._run.max_shard_failures, reason)
            if message is not None:
                raise LostShardError(message)
        where = reason.partition(":")[0] if blamed else "its node is gone"
        again = f": its shard {call.shard.index} is computed again" if wanted else ""
        self._say(f"lost worker {worker} ({where}){again}")
        self._fleet.replace(worker, delay, blamed)

    def _replace_hung(self) -> None:
        """A worker that gives no answer for too long is taken for lost."""
        now = time.monotonic()
        first = {call.worker: call for call in reversed(self._calls.values())}
        for worker, call in first.items():
            silent = now - self._fleet.since(worker)
            failures = call.of.failures[call.position]
            # a first shard may take a minute to compile
            timed = () if self._compiles else self._times(call.shard.kind)
            if hung(silent, timed, failures, self._run.shard_timeout):
                self._lost(worker, f"no answer for {silent:.0f} s")

    def _times(self, kind: tuple[str, int, bool]) -> deque[float]:
        return self._timed.setdefault(kind, deque(maxlen=TIMED))
