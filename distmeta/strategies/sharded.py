"""`sharded`: each parameter server owns a slice of theta, with its gradient sums and its part of the optimizer state.

Gradients and new slices travel between workers and servers through Ray's object store. This process only sees a few
numbers per shard. Slices are cut at block boundaries of the norm, sums follow the same tree, and clipping uses the same
`fsum`, so theta is that of `driver` to the bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from distmeta.compute.compression import Compression
from distmeta.compute.vectors import choose_edges
from distmeta.config.sections import OuterSection
from distmeta.errors import InputError, summarize_error
from distmeta.runtime.checkpoint import TrainingState
from distmeta.runtime.failure_policy import LostShardError
from distmeta.runtime.outer_optimizer import OPTIMIZERS, GroupOptions, read_clock
from distmeta.runtime.outer_rates import OuterRates
from distmeta.runtime.parameter_server import ParameterServer
from distmeta.runtime.pool import RayPool, WorkOrder
from distmeta.runtime.problem import Problem
from distmeta.runtime.ray_workers import POLL_SECONDS, worker_failures
from distmeta.runtime.shards import Shard, ShardResult
from distmeta.runtime.strategy import LostStateError, build_server
from distmeta.strategies.driver import GradientStep
from distmeta.strategies.slices import (
    SliceServer,
    SliceSpec,
    cut_moments,
    join_moments,
    local_ranges,
)


class Sharded(GradientStep):
    """The strategy `sharded`. Its options:

    Args:
        servers: parameter servers, each a Ray actor. Fewer are used if theta has fewer blocks of 65,536 elements.
        compress: how gradients travel. The workers read it from the job.
    """

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
        compress: Compression = "none",
    ):
        server = build_server(problem, outer, state)
        self._problem = problem
        self._run = problem.job.run
        self._report = report
        self._layout = server.layout
        self._edges = choose_edges(server.layout.size, servers)
        """Where theta is cut: slice i is [edges[i], edges[i + 1])."""
        self._attempt = 0
        """Counts the attempts at a step, so that servers can tell gradients of an abandoned one from new ones."""
        self._norm_sums: list[float] = []
        """Partial sums of the squared norm of the mean gradient, one per block."""
        self._snapshot: tuple[list[Any], int] | None = None
        """Slices and clock before the first outer epoch of the current step."""
        self._servers: list[Any] = []
        self._slices: list[Any] = []
        """References to the current slices of theta."""
        self._names: list[list[str]] = []
        """For each server, the entries of theta that have elements in its slice."""
        self._lost = ""
        """Why theta is lost; empty if it is not."""
        self._report_unused_servers(servers)
        self.pool = RayPool(problem, server.layout, report)
        import ray

        self._ray: Any = ray
        try:
            self._start_servers(server)
        except LostStateError as error:
            self.close()
            raise InputError(f"strategy.servers: {error}, before training began") from None
        except BaseException:
            self.close()
            raise

    def _report_unused_servers(self, asked: int) -> None:
        used = len(self._edges) - 1
        if used < asked:
            self._report(
                f"strategy.servers: theta's {self._layout.parameters:,} numbers go to {used} of {asked} servers, "
                "because slices are whole blocks of 65,536"
            )

    def _start_servers(self, server: ParameterServer) -> None:
        """Start the servers from the state of a parameter server in this process.

        This process then only keeps the rates and the schedule's clock.
        """
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        flat = server.flat()
        tensors, plain = server.state()
        self._rates = OuterRates(self._layout.names, server.outer, read_clock(plain))
        self._slices = []
        self._names = []
        node_ids = self.pool.node_ids
        for index, (start, stop) in enumerate(pairwise(self._edges)):
            placement: Any = "SPREAD"
            if node_ids:
                # beside workers: what they send to a server on their own node does not cross the network
                placement = NodeAffinitySchedulingStrategy(node_ids[index % len(node_ids)], soft=True)
            actor = self._ray.remote(SliceServer).options(num_cpus=0, scheduling_strategy=placement)
            spans = self._layout.spans(start, stop)
            names = [span.name for span in spans]
            spec = SliceSpec(
                local_ranges(spans), self._select_options(names), server.outer, cut_moments(spans, tensors)
            )
            self._slices.append(self._ray.put(flat[start:stop]))
            self._servers.append(actor.remote(self._slices[-1], spec))
            self._names.append(names)
        self._call_all("ready", limit=self._run.start_timeout)

    def _select_options(self, names: list[str]) -> tuple[GroupOptions, ...]:
        """Return the optimizer options of these entries of theta."""
        groups = self._rates.groups
        indices = dict(zip(self._layout.names, groups.indices, strict=True))
        return tuple(groups.options[indices[name]] for name in names)

    @staticmethod
    def check_job(job: Any, options: Mapping[str, Any]) -> None:
        """Raise InputError if the optimizer cannot work on slices of theta."""
        if ":" in job.outer.optimizer:
            raise InputError(
                f"outer.optimizer: got {job.outer.optimizer!r} with strategy.type: sharded, expected one of "
                f"{', '.join(OPTIMIZERS)}: its servers hold slices of theta, not whole tensors"
            )

    def retune(self, outer: OuterSection) -> None:
        self._rates.retune(outer)
        calls = [
            server.retune.remote(outer, self._select_options(names))
            for server, names in zip(self._servers, self._names, strict=True)
        ]
        self._get(calls, self._run.shard_timeout)

    def flat(self) -> np.ndarray:
        return np.concatenate(self._get(self._slices, self._run.shard_timeout))

    def state(self) -> TrainingState:
        theta = self._layout.unflatten(self.flat())
        tensors = join_moments(self._layout, self._edges, self._call_all("moments"))
        return TrainingState(theta, tensors, {"clock": self._rates.steps})

    def load(self, state: TrainingState, outer: OuterSection) -> None:
        self._kill_servers()
        self._snapshot = None
        self._lost = ""
        self._start_servers(build_server(self._problem, outer, state))

    def close(self) -> None:
        self._kill_servers()
        self.pool.close()

    def _kill_servers(self) -> None:
        for server in self._servers:
            self._ray.kill(server)
        self._servers = []

    def compute_shards(self, shards: Sequence[Shard], check: Callable[[], None]) -> list[ShardResult]:
        for _ in range(self._run.max_shard_failures - 1):
            try:
                return self._compute_and_send(shards, check)
            except self._ray.exceptions.ObjectLostError as error:
                self._report(f"gradients are lost ({summarize_error(error)}): the step is computed again")
        return self._compute_and_send(shards, check)

    def _compute_and_send(self, shards: Sequence[Shard], check: Callable[[], None]) -> list[ShardResult]:
        """Compute the shards and send each gradient to the servers as soon as it is there."""
        self._attempt += 1
        theta = self._slices
        if self._snapshot is not None and shards[0].epoch:
            theta = [*theta, *self._snapshot[0]]
        order = WorkOrder(list(shards), theta, self._edges, queue=True)
        sent = []
        try:
            for position, answer in self.pool.answers(order, check):
                for server, piece in zip(self._servers, answer.pieces, strict=True):
                    sent.append(server.receive.remote(self._attempt, position, piece))
        except LostShardError:
            self._call_all("ready")  # raises LostStateError if theta was lost with a server's node
            raise
        self._get(sent, self._run.shard_timeout, check)
        return [answer.result for answer in order.pending.in_order()]

    def average(self, results: list[ShardResult], tasks: int) -> bool:
        answers = self._call_all("average", tasks)
        self._norm_sums = [value for _, norm_sums in answers for value in norm_sums]
        return all(is_finite for is_finite, _ in answers)

    def apply(self) -> float:
        norm = math.sqrt(math.fsum(self._norm_sums))
        limit = self._rates.outer.clip_norm
        factor = limit / norm if limit is not None and norm > limit else None
        rates = dict(zip(self._layout.names, self._rates.of_tensors(), strict=True))
        calls = [
            server.step.options(num_returns=2).remote(factor, [rates[name] for name in names])
            for server, names in zip(self._servers, self._names, strict=True)
        ]
        self._get([done for done, _ in calls], self._run.shard_timeout)
        self._slices = [new_slice for _, new_slice in calls]
        self._rates.advance()
        return norm

    def skip(self) -> float:
        self._rates.advance()
        return math.nan

    def rate(self) -> float:
        return self._rates.of_groups()[0]

    def take_snapshot(self) -> None:
        self._call_all("take_snapshot")
        self._snapshot = self._slices, self._rates.steps

    def end_snapshot(self, undo: bool) -> None:
        if self._snapshot is None:
            return
        self._call_all("end_snapshot", undo)
        if undo:
            self._slices, self._rates.steps = self._snapshot
        self._snapshot = None

    def _call_all(self, method: str, *arguments: Any, limit: float | None = None) -> list[Any]:
        """Call a method of every server and return the answers."""
        calls = [getattr(server, method).remote(*arguments) for server in self._servers]
        return self._get(calls, limit or self._run.shard_timeout)

    def _get(self, calls: list[Any], limit: float, check: Callable[[], None] | None = None) -> list[Any]:
        """Return the answers to calls of servers.

        Args:
            limit: seconds after which a silent server counts as lost.
            check: called while waiting; raises to abandon the calls. Only for calls that receive gradients.

        Raises:
            LostStateError: a server is dead or silent.
            ObjectLostError: a gradient that a server was to receive is lost.
        """
        if self._lost:  # a server that was silent may answer later, but it is at another step than the others
            raise LostStateError(self._lost)
        errors = self._ray.exceptions
        deadline = time.monotonic() + limit
        while check is not None and calls:
            check()
            ready, _ = self._ray.wait(calls, num_returns=len(calls), timeout=POLL_SECONDS)
            if len(ready) == len(calls) or time.monotonic() > deadline:
                break
        try:
            return self._ray.get(calls, timeout=max(deadline - time.monotonic(), 1.0))
        except errors.RayTaskError as error:
            if isinstance(error.cause, errors.ObjectLostError):
                raise error.cause from None
            raise
        except worker_failures(self._ray) as error:
            if isinstance(error, errors.ObjectLostError) and check is not None:
                raise
            self._lost = f"one of the {len(self._servers)} servers is lost ({type(error).__name__})"
            raise LostStateError(self._lost) from None
