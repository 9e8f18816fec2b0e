"""Hand shards to Ray workers. The training loop cannot tell whether these or this process compute."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from distmeta.compute.vectors import Layout
from distmeta.errors import summarize_error
from distmeta.runtime.failure_policy import (
    LostShardError,
    backoff,
    give_up_message,
    is_hung,
    is_worth_retrying,
)
from distmeta.runtime.pending_shards import PendingShards
from distmeta.runtime.problem import Problem
from distmeta.runtime.ray_cluster import connect, import_ray
from distmeta.runtime.ray_workers import (
    GET_SECONDS,
    RayWorkers,
    describe_number,
    error_type,
    raise_task_error,
    worker_failures,
)
from distmeta.runtime.shards import Pool, Shard, ShardResult, WorkerSpec
from distmeta.runtime.worker import LocalPool

TIMES_KEPT = 64
"""How many of the last computing times are kept for each kind of shard."""
STORE_RETRY_SECONDS = 1.0
"""Time between two attempts to put theta into a full object store."""

ShardKind = tuple[str, int, bool]
"""Shards of the same kind take about equally long (`Shard.kind`)."""


def open_pool(problem: Problem, layout: Layout, report: Callable[[str], None]) -> Pool:
    """Start the pool that the job asks for (`run.workers`)."""
    if problem.job.run.max_workers:
        return RayPool(problem, layout, report)
    return LocalPool(problem, layout)


class ShardAnswer(NamedTuple):
    """A worker's answer to one unit of a work order."""

    shard: Any
    """The unit as it was handed out: usually a `Shard`."""
    result: Any
    """What the worker returned to this process."""
    pieces: list[Any]
    """References to further Ray objects, which stay where they were made until someone needs them."""


@dataclass
class WorkOrder:
    """Shards to compute, and what to compute them with.

    A strategy may order other units than shards by giving a `function`. A unit has a `kind` (a `ShardKind`), an `index`
    and a text form that names it in error messages. All units of an order have the same kind.
    """

    shards: list[Any]
    theta: Sequence[Any]
    """What the worker receives besides the unit: references to theta as a flat vector in any number of consecutive
    pieces, or the further arguments of `function`."""
    edges: Sequence[int] = ()
    """Where to cut the gradients into separate Ray objects; empty: they come back with the results."""
    queue: bool = False
    """Whether a worker may get its next shard while it still computes one."""
    function: Callable[..., Any] | None = None
    """Called as `function(worker, unit, *theta)` on the worker, instead of computing a shard."""
    outputs: int = 1
    """Number of objects that `function` returns."""
    pending: PendingShards[ShardAnswer] = field(init=False)

    def __post_init__(self) -> None:
        self.pending = PendingShards(len(self.shards))

    def call(self) -> tuple[str, Sequence[Any], int]:
        """Return the method of `WorkerProcess`, its arguments after the unit, and the number of objects it returns."""
        if self.function is not None:
            return "execute", [self.function, *self.theta], self.outputs
        return "compute", [tuple(self.edges), *self.theta], max(len(self.edges), 1)


@dataclass(frozen=True)
class _Call:
    """A unit that a worker computes, or will compute when it has finished its earlier ones."""

    worker: int
    shard: Any
    position: int
    pending: PendingShards[ShardAnswer]
    """Where the answer goes. The call may outlive the order if another worker was faster."""
    pieces: list[Any]


class RayPool:
    """Hands each shard to the next free worker, and again if that worker is lost or slow.

    The result has the same bits whichever worker computes a shard.
    """

    def __init__(self, problem: Problem, layout: Layout, report: Callable[[str], None]):
        self._run = problem.job.run
        self._report = report
        self._ray = import_ray(self._run.address)
        self._may_compile = problem.job.compute.compile
        self._calls: dict[Any, _Call] = {}
        self._times: dict[ShardKind, deque[float]] = {}
        self._workers = RayWorkers(self._ray, self._run, report)
        report(f"starting {describe_number(self._run.min_workers, self._run.max_workers, 'Ray worker')} …")
        cpus = math.ceil(self._run.min_workers * self._run.cpus_per_worker)
        self._disconnect = connect(self._ray, self._run.address, cpus)
        try:
            self._workers.start(self._ray.put(WorkerSpec.from_problem(problem, layout)))
        except BaseException:
            self.close()
            raise

    @property
    def size(self) -> int:
        return max(self._workers.size, 1)

    @property
    def node_ids(self) -> list[str]:
        """Ids of the nodes that workers are on."""
        return self._workers.node_ids()

    def map(self, flat: np.ndarray, shards: Sequence[Shard], check: Callable[[], None]) -> list[ShardResult]:
        order = WorkOrder(list(shards), [self.put(flat, check)], queue=True)
        for _ in self.answers(order, check):
            pass
        return [answer.result for answer in order.pending.in_order()]

    def answers(self, order: WorkOrder, check: Callable[[], None]) -> Iterator[tuple[int, ShardAnswer]]:
        """Yield each position's first answer, in order of arrival."""
        self.resume()
        while not order.pending.done:
            check()
            self.work([order])
            yield from order.pending.new_results()

    def resume(self) -> None:
        """Call this before the first `work` after a pause."""
        self._workers.resume()

    def work(self, orders: Sequence[WorkOrder]) -> None:
        """Hand out shards and collect answers for a moment (`POLL_SECONDS`). The first order has priority.

        Raises:
            LostShardError: a shard has cost too many workers, or no worker is left.
        """
        self._workers.update()
        self._hand_out(orders)
        for call in self._workers.wait(list(self._calls)):
            self._collect(call)
        self._replace_hung_workers()

    def close(self) -> None:
        self._workers.close()
        self._disconnect()

    def put(self, flat: np.ndarray, check: Callable[[], None]) -> Any:
        """Put a vector into Ray's object store and return the reference. Wait if the store is full.

        Raises:
            LostShardError: there was no room for `run.start_timeout` seconds.
        """
        errors = self._ray.exceptions
        started = time.monotonic()
        reported = False
        while True:
            try:
                return self._ray.put(flat)
            except (errors.ObjectStoreFullError, errors.OutOfDiskError) as error:
                if time.monotonic() - started > self._run.start_timeout:
                    raise LostShardError(
                        f"theta finds no room in Ray's object store: {summarize_error(error)}"
                    ) from None
            if not reported:
                self._report("Ray's object store is full: waiting for room")
                reported = True
            check()
            time.sleep(STORE_RETRY_SECONDS)

    def _hand_out(self, orders: Sequence[WorkOrder]) -> None:
        """Give each idle worker a shard, then let busy workers queue one more, so that they need not wait for us.

        The last shards are not queued: they go to whichever worker is free first.
        """
        for worker in self._workers.idle():
            order, position = self._next_shard(orders, time.monotonic())
            if order is None:
                return
            if order.pending.next_unassigned() != position:
                self._report(
                    f"shard {order.shards[position].index} is slow: worker {worker} computes it as well"
                )
            self._submit(worker, order, position)
        for order in orders:
            for worker in self._workers.without_queue():
                position = order.pending.next_unassigned()
                if position is not None and order.queue and order.pending.unassigned > self._workers.size:
                    self._submit(worker, order, position)

    def _next_shard(self, orders: Sequence[WorkOrder], now: float) -> tuple[WorkOrder | None, int]:
        """Return a shard that no worker has; if there is none, one that another worker is slow with."""
        for order in orders:
            position = order.pending.next_unassigned()
            if position is not None:
                return order, position
        for order in orders:
            position = order.pending.straggler(now, self._recent_times(order.shards[0].kind))
            if position is not None:
                return order, position
        return None, 0

    def _submit(self, worker: int, order: WorkOrder, position: int) -> None:
        shard = order.shards[position]
        order.pending.assign(position, time.monotonic())
        method, arguments, outputs = order.call()
        call, *pieces = self._workers.submit(worker, method, shard, arguments, outputs)
        self._calls[call] = _Call(worker, shard, position, order.pending, pieces)

    def _collect(self, finished: Any) -> None:
        """Take the result of a finished call, or handle the loss of its worker.

        What the computation itself raised is raised here.
        """
        call = self._calls[finished]
        try:
            result = self._ray.get(finished, timeout=GET_SECONDS)
        except self._ray.exceptions.RayTaskError as error:
            if not is_worth_retrying(error.cause):
                raise_task_error(error)
            return self._handle_loss(call.worker, summarize_error(error.cause))
        except worker_failures(self._ray) as error:
            return self._handle_loss(call.worker, summarize_error(error))
        del self._calls[finished]
        seconds = time.monotonic() - self._workers.busy_since(call.worker)
        self._recent_times(call.shard.kind).append(seconds)
        call.pending.answer(call.position, ShardAnswer(call.shard, result, call.pieces))
        return self._workers.finish(call.worker)

    def _handle_loss(self, worker: int, reason: str) -> None:
        """Replace a lost worker. Its unanswered shards go to other workers; the one that it computed takes the blame.

        Raises:
            LostShardError: this shard has cost too many workers.
        """
        lost = [reference for reference, call in self._calls.items() if call.worker == worker]
        current, *queued = [self._calls.pop(reference) for reference in lost]
        for call in reversed(queued):
            call.pending.lose(call.position, blamed=False)
        blamed = not self._workers.is_node_dead(worker)
        failures = current.pending.lose(current.position, blamed)
        is_unanswered = current.position not in current.pending.results
        if blamed and is_unanswered:
            message = give_up_message(str(current.shard), failures, self._run.max_shard_failures, reason)
            if message is not None:
                raise LostShardError(message)
        cause = error_type(reason) if blamed else "its node is gone"
        consequence = f": its shard {current.shard.index} is computed again" if is_unanswered else ""
        self._report(f"lost worker {worker} ({cause}){consequence}")
        delay = backoff(self._workers.losses_in_a_row(worker) + 1) if blamed else 0.0
        self._workers.replace(worker, delay, blamed)

    def _replace_hung_workers(self) -> None:
        """Treat workers that do not answer for too long as lost."""
        now = time.monotonic()
        current_calls = {call.worker: call for call in reversed(self._calls.values())}
        for worker, call in current_calls.items():
            silent = now - self._workers.busy_since(worker)
            failures = call.pending.failures[call.position]
            # the first shard of a worker may take a minute longer, for compiling
            peer_seconds = () if self._may_compile else self._recent_times(call.shard.kind)
            if is_hung(silent, peer_seconds, failures, self._run.shard_timeout):
                self._handle_loss(worker, f"no answer for {silent:.0f} s")

    def _recent_times(self, kind: ShardKind) -> deque[float]:
        return self._times.setdefault(kind, deque(maxlen=TIMES_KEPT))
