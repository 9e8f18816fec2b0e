"""`sharded`: parameter servers that own a slice of theta each, its gradient sums and its part of the optimizer's state.

Shards' gradients, and the new slices, go between workers and servers through Ray's object store; what this process
sees is a few numbers a shard. Slices are cut at the norm's blocks, sums go by the same tree, clipping by the same
`fsum`: theta is that of `driver`, to the bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from distmeta.compute.compression import Compression, Vector
from distmeta.compute.vectors import edges_of
from distmeta.config.sections import OuterSection
from distmeta.errors import InputError
from distmeta.runtime.checkpoint import TrainingState
from distmeta.runtime.failure_policy import LostShardError
from distmeta.runtime.parameter_server import ParameterServer, clock_of
from distmeta.runtime.pool import RayPool, WorkOrder
from distmeta.runtime.problem import Problem
from distmeta.runtime.ray_workers import POLL_SECONDS, describe, lost_by
from distmeta.runtime.strategy import LostStateError, server_of
from distmeta.runtime.worker import Shard, ShardResult
from distmeta.strategies.gradient_step import Stepping
from distmeta.strategies.slices import Moments, Slice, SliceSpec, joined, moments_in, places_of


class SliceServer:
    """The Ray actor around a slice."""

    def __init__(self, flat: np.ndarray, spec: SliceSpec):
        self._slice = Slice(flat, spec)

    def ready(self) -> None:
        pass

    def receive(self, attempt: int, position: int, gradient: Vector) -> None:
        self._slice.receive(attempt, position, gradient)

    def average(self, tasks: int) -> tuple[bool, list[float]]:
        return self._slice.average(tasks)

    def step(self, factor: float | None, rates: Sequence[float]) -> tuple[None, np.ndarray]:
        """That it is done, and the new slice: two objects, for one of them does not travel to who asks."""
        return None, self._slice.step(factor, rates)

    def moments(self) -> Moments:
        return self._slice.moments()

    def retune(self, outer: OuterSection) -> None:
        self._slice.retune(outer)

    def mark(self) -> None:
        self._slice.mark()

    def unmark(self, undo: bool) -> None:
        self._slice.unmark(undo)


class Sharded(Stepping):
    requires_workers = True
    equals_driver = True

    pool: RayPool

    def __init__(
        self,
        problem: Problem,
        outer: OuterSection,
        state: TrainingState | None,
        report: Callable[[str], None],
        servers: Annotated[int, Field(ge=1)] = 2,
        compress: Compression = "none",  # workers read it from the job
    ):
        server = server_of(problem, outer, state)
        self._problem, self._run, self._report = problem, problem.job.run, report
        self._layout = server.layout
        asked = servers
        self._edges = edges_of(server.layout.size, asked)
        if len(self._edges) <= asked:
            report(
                f"strategy.servers: theta's {server.layout.parameters:,} numbers go to {len(self._edges) - 1} of {asked} "
                "servers, for slices are whole blocks of 65,536"
            )
        self._attempt = 0
        self._sizes: list[float] = []
        """Partial sums of the norm of the mean gradient."""
        self._marked: tuple[list[Any], ParameterServer] | None = None
        self._servers: list[Any] = []
        self._lost = ""
        self.pool = RayPool(problem, server.layout, report)
        import ray

        self._ray: Any = ray
        try:
            self._start(server)
        except LostStateError as error:
            self.close()
            raise InputError(f"strategy.servers: {error}, before training began") from None
        except BaseException:
            self.close()
            raise

    def _start(self, server: ParameterServer) -> None:
        """Servers at the state of one in this process, which then only keeps the schedule's clock."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        flat, (tensors, plain) = server.flat(), server.state()
        rates = dict(zip(self._layout.names, server.rates(), strict=True))
        self._clock = clock_of(self._layout.names, server.outer, plain)
        nodes = self.pool.nodes
        self._slices, self._names = [], []
        for index, (start, stop) in enumerate(pairwise(self._edges)):
            # beside workers, in turn: what a node's own workers send to its server does not travel
            place = (
                NodeAffinitySchedulingStrategy(nodes[index % len(nodes)], soft=True) if nodes else "SPREAD"
            )
            actor = self._ray.remote(SliceServer).options(num_cpus=0, scheduling_strategy=place)
            spans = self._layout.spans(start, stop)
            names = [span.name for span in spans]
            of_names = tuple(rates[name] for name in names)
            spec = SliceSpec(places_of(spans), of_names, server.outer, moments_in(spans, tensors))
            self._slices.append(self._ray.put(flat[start:stop]))
            self._servers.append(actor.remote(self._slices[-1], spec))
            self._names.append(names)
        self._all("ready", limit=self._run.start_timeout)

    def retune(self, outer: OuterSection) -> None:
        self._clock.retune(outer)
        self._all("retune", outer)

    def flat(self) -> np.ndarray:
        return np.concatenate(self._get(self._slices, self._run.shard_timeout))

    def state(self) -> TrainingState:
        theta = self._layout.unflatten(self.flat())
        tensors = joined(self._layout, self._edges, self._all("moments"))
        return TrainingState(theta, tensors, self._clock.state()[1])

    def load(self, state: TrainingState, outer: OuterSection) -> None:
        self._dismiss()
        self._marked, self._lost = None, ""
        self._start(server_of(self._problem, outer, state))

    def close(self) -> None:
        self._dismiss()
        self.pool.close()

    def _dismiss(self) -> None:
        for server in self._servers:
            self._ray.kill(server)
        self._servers = []

    def _map(self, shards: Sequence[Shard], check: Callable[[], None]) -> list[ShardResult]:
        for _ in range(self._run.max_shard_failures - 1):
            try:
                return self._computed(shards, check)
            except self._ray.exceptions.ObjectLostError as error:
                self._report(f"gradients are lost ({describe(error)}): the step is computed again")
        return self._computed(shards, check)

    def _computed(self, shards: Sequence[Shard], check: Callable[[], None]) -> list[ShardResult]:
        """Every gradient goes to the servers as soon as it is there."""
        self._attempt += 1
        theta = self._slices
        if self._marked is not None and shards[0].epoch:
            theta = [*theta, *self._marked[0]]
        work, sent = WorkOrder(list(shards), theta, self._edges, ahead=True), []
        try:
            for position, answer in self.pool.answers(work, check):
                for server, piece in zip(self._servers, answer.pieces, strict=True):
                    sent.append(server.receive.remote(self._attempt, position, piece))
        except LostShardError:
            self._all("ready")  # theta may have gone with a server's node
            raise
        self._get(sent, self._run.shard_timeout, check)
        return [answer.result for answer in work.left.in_order()]

    def _average(self, results: list[ShardResult], tasks: int) -> bool:
        answers = self._all("average", tasks)
        self._sizes = [size for _, sizes in answers for size in sizes]
        return all(finite for finite, _ in answers)

    def _apply(self) -> float:
        size, limit = math.sqrt(math.fsum(self._sizes)), self._clock.outer.clip_norm
        factor = limit / size if limit is not None and size > limit else None
        rates = dict(zip(self._layout.names, self._clock.rates(), strict=True))
        calls = [
            server.step.options(num_returns=2).remote(factor, [rates[name] for name in names])
            for server, names in zip(self._servers, self._names, strict=True)
        ]
        self._get([done for done, _ in calls], self._run.shard_timeout)
        self._slices = [new for _, new in calls]
        self._clock.skip()
        return size

    def _skip(self) -> float:
        return self._clock.skip()

    def _rate(self) -> float:
        return self._clock.rate()

    def _mark(self) -> None:
        self._all("mark")
        self._marked = self._slices, clock_of(self._layout.names, self._clock.outer, self._clock.state()[1])

    def _unmark(self, undo: bool) -> None:
        if self._marked is not None:
            self._all("unmark", undo)
            if undo:
                self._slices, self._clock = self._marked
        self._marked = None

    def _all(self, method: str, *arguments: Any, limit: float | None = None) -> list[Any]:
        """What every server answers."""
        calls = [getattr(server, method).remote(*arguments) for server in self._servers]
        return self._get(calls, limit or self._run.shard_timeout)

    def _get(self, calls: list[Any], limit: float, check: Callable[[], None] | None = None) -> list[Any]:
        """The calls' answers.

        Raises:
            LostStateError: a server is dead, or silent for `limit` seconds.
            ObjectLostError: what it was to be given is.
        """
        if self._lost:  # one that is silent for long may speak again, of another step than the rest
            raise LostStateError(self._lost)
        deadline = time.monotonic() + limit
        while check is not None and calls:
            check()
            ready, _ = self._ray.wait(calls, num_returns=len(calls), timeout=POLL_SECONDS)
            if len(ready) == len(calls) or time.monotonic() > deadline:
                break
        try:
            return self._ray.get(calls, timeout=max(deadline - time.monotonic(), 1.0))
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, self._ray.exceptions.ObjectLostError):
                raise error.cause from None
            raise
        except lost_by(self._ray) as error:
            if isinstance(error, self._ray.exceptions.ObjectLostError) and check is not None:
                raise
            kind = describe(error).partition(":")[0]
            self._lost = f"one of the {len(self._servers)} servers is lost ({kind})"
            raise LostStateError(self._lost) from None
