"""The Ray actors of a run: place, start, replace and stop them. What they compute does not matter here."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NoReturn

import numpy as np

from distmeta.compute.compiler import MissingCompilerError
from distmeta.compute.compression import cut
from distmeta.compute.vectors import Buffer
from distmeta.config.sections import RunSection
from distmeta.errors import InputError, summarize_error
from distmeta.runtime.failure_policy import LostShardError, backoff, is_worth_retrying
from distmeta.runtime.ray_cluster import Nodes, describe_resources
from distmeta.runtime.shards import Shard, WorkerSpec
from distmeta.runtime.worker import Worker

POLL_SECONDS = 0.2
"""A waiting driver checks this often whether it was interrupted."""
GET_SECONDS = 60.0
"""Longest wait for a result that Ray reports as ready."""
FIRST_REPORT_SECONDS = 5.0
"""A driver that waits for workers says so after this time."""
REPORT_SECONDS = 60.0
"""Time between two such reports."""


class WorkerProcess:
    """The Ray actor that computes.

    Ray creates the actor before its `Worker` is built, because waiting for room and building have separate time limits.
    """

    def __init__(self) -> None:
        self._worker: Worker | None = None
        self._gradient_buffer: Buffer | None = None
        """Reused for every shard: Ray copies what a call returns before the next call starts."""

    def node_id(self) -> str:
        """Return the id of the actor's node. Ray answers this call once there was room for the actor."""
        import ray

        return ray.get_runtime_context().get_node_id()

    def build(self, spec: WorkerSpec) -> int:
        """Build the job's parts; return the process id."""
        self._worker = Worker.from_spec(spec)
        self._gradient_buffer = self._worker.buffer()
        return os.getpid()

    def compute(self, shard: Shard, edges: Sequence[int], *flat: np.ndarray) -> Any:
        """Compute a shard.

        Args:
            edges: where to cut the gradient; empty: leave it in the result.
            flat: theta, as one or several consecutive float32 vectors.

        Returns:
            The shard's result. With `edges` the result has no gradient, and the gradient's pieces follow. Each piece
            is a Ray object, which may travel to another process than the result.
        """
        assert self._worker is not None
        result = self._worker.compute(flat, shard, self._gradient_buffer)
        if not edges:
            return result
        assert result.gradient is not None
        return replace(result, gradient=None), *cut(result.gradient, edges)

    def execute(self, unit: Any, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return `function(worker, unit, *arguments)`, for strategies that compute more than single shards."""
        assert self._worker is not None
        return function(self._worker, unit, *arguments)


@dataclass
class _Slot:
    """A place for one worker."""

    state: Literal["empty", "waiting", "building", "idle", "busy"] = "empty"
    """`waiting`: for room on the cluster."""
    since: float = 0.0
    """When the slot entered its state. `empty`: when the next worker is due. `busy`: when the current shard began."""
    actor: Any = None
    node: str | None = None
    call: Any = None
    """Ray reference that is ready when the waiting or the building ends."""
    assigned: int = 0
    """Shards that the worker has: the one that it computes and those queued behind it."""
    losses_in_a_row: int = 0
    """Workers lost in this slot since one of them computed a shard."""


class RayWorkers:
    """The run's workers, in `run.max_workers` slots. A worker is known by the number of its slot.

    An actor is requested for every empty slot, even if the cluster has no room: an autoscaler acts on such requests.
    """

    def __init__(self, ray: Any, run: RunSection, report: Callable[[str], None]):
        self._ray = ray
        self._run = run
        self._spec: Any = None
        self._report = report
        self._slots = [_Slot() for _ in range(run.max_workers)]
        self._nodes = Nodes(ray)
        self._failed_starts_in_a_row = 0
        self._started = False
        self._short_since: float | None = None
        self._last_report = 0.0

    @property
    def size(self) -> int:
        """Number of workers that are idle or computing."""
        return sum(slot.state in ("idle", "busy") for slot in self._slots)

    def idle(self) -> list[int]:
        """Return the workers that have nothing to do."""
        return [worker for worker, slot in enumerate(self._slots) if slot.state == "idle"]

    def without_queue(self) -> list[int]:
        """Return the workers that compute a shard and have none queued, except on nodes that will go away."""
        draining = self._nodes.draining()
        return [w for w, slot in enumerate(self._slots) if slot.assigned == 1 and slot.node not in draining]

    def busy_since(self, worker: int) -> float:
        """Return when the worker began its current shard."""
        return self._slots[worker].since

    def node_ids(self) -> list[str]:
        """Return the ids of the nodes that workers are on, each once."""
        return list(dict.fromkeys(slot.node for slot in self._slots if slot.node is not None))

    def losses_in_a_row(self, worker: int) -> int:
        """Return how many workers were lost in this slot since one of them computed a shard."""
        return self._slots[worker].losses_in_a_row

    def start(self, spec: Any) -> None:
        """Wait until `run.min_workers` workers are ready.

        Args:
            spec: a reference to the `WorkerSpec`.

        Raises:
            InputError: the cluster cannot place them within `run.start_timeout` seconds, or the job cannot be built.
            LostShardError: they die while starting.
        """
        run = self._run
        self._spec = spec
        started = time.monotonic()
        while self.size < run.min_workers:
            if time.monotonic() - started > run.start_timeout:
                raise InputError(
                    f"run.workers: got {run.min_workers} of {run.cpus_per_worker:g} CPU and {run.gpus_per_worker:g} "
                    f"GPU each, but only {self.size} were ready after run.start_timeout = {run.start_timeout:g} s; "
                    f"{describe_resources(self._ray)}"
                )
            self.update()
            self.wait([])
        self._started = True

    def resume(self) -> None:
        """Note that nobody called `update` for a while, so that the time without workers is counted anew."""
        self._short_since = None

    def wait(self, calls: list[Any]) -> list[Any]:
        """Return one of `calls` that has finished, or nothing after `POLL_SECONDS`."""
        starting = [slot.call for slot in self._slots if slot.state in ("waiting", "building")]
        pending = [*calls, *starting]
        if not pending:  # every worker is to be replaced, and none is due yet
            time.sleep(POLL_SECONDS)
            return []
        finished, _ = self._ray.wait(pending, num_returns=1, timeout=POLL_SECONDS)
        return [call for call in finished if call in calls]

    def submit(
        self, worker: int, method: str, unit: Any, arguments: Sequence[Any], outputs: int
    ) -> list[Any]:
        """Call a method of a worker, which queues behind the calls that it has.

        Returns:
            `outputs` Ray references, one for each object that the method returns.
        """
        slot = self._slots[worker]
        assert slot.state in ("idle", "busy")
        if slot.state == "idle":
            slot.state = "busy"
            slot.since = time.monotonic()
        slot.assigned += 1
        remote_method = getattr(slot.actor, method)
        if outputs == 1:
            return [remote_method.remote(unit, *arguments)]
        return remote_method.options(num_returns=outputs).remote(unit, *arguments)

    def finish(self, worker: int) -> None:
        """Note that the worker has computed a shard."""
        slot = self._slots[worker]
        slot.assigned -= 1
        slot.state = "busy" if slot.assigned else "idle"
        slot.since = time.monotonic()
        slot.losses_in_a_row = 0
        self._failed_starts_in_a_row = 0

    def is_node_dead(self, worker: int) -> bool:
        """Return whether the worker's node is gone."""
        return self._nodes.is_dead(self._slots[worker].node)

    def replace(self, worker: int, delay: float, blamed: bool = True) -> None:
        """Let a worker go. `update` requests another one after `delay` seconds.

        Args:
            blamed: whether this counts as a loss of the slot; false if its node went away.
        """
        slot = self._slots[worker]
        if slot.actor is not None:
            with contextlib.suppress(self._ray.exceptions.RayError):
                self._ray.kill(slot.actor)  # it may be unreachable or stopped, not dead
        losses = slot.losses_in_a_row + blamed
        self._slots[worker] = _Slot(since=time.monotonic() + delay, losses_in_a_row=losses)

    def close(self) -> None:
        """Let all workers go."""
        for worker in range(len(self._slots)):
            self.replace(worker, 0.0)

    def update(self) -> None:
        """Request workers that are due, continue the start of those that came, leave nodes that will go away.

        Raises:
            LostShardError: no worker is left and none comes, or all die while starting.
        """
        now = time.monotonic()
        for slot in self._slots:
            if slot.state == "empty" and slot.since <= now:
                self._request_worker(slot, now)
        starting = {slot.call: worker for worker, slot in enumerate(self._slots) if slot.call is not None}
        if starting:
            ready, _ = self._ray.wait(list(starting), num_returns=len(starting), timeout=0)
            for call in ready:
                self._continue_start(starting[call], call)
        self._check_start_timeouts(now)
        self._leave_draining_nodes()
        self._check_shortage(now)

    def _request_worker(self, slot: _Slot, now: float) -> None:
        options = {"num_cpus": self._run.cpus_per_worker, "num_gpus": self._run.gpus_per_worker}
        slot.actor = self._ray.remote(WorkerProcess).options(**options).remote()
        slot.call = slot.actor.node_id.remote()
        slot.state = "waiting"
        slot.since = now

    def _continue_start(self, worker: int, call: Any) -> None:
        """Handle the end of a call of a starting worker: it found room, or it is ready, or it failed."""
        slot = self._slots[worker]
        try:
            answer = self._ray.get(call, timeout=GET_SECONDS)
        except self._ray.exceptions.RayTaskError as error:
            reason = summarize_error(error.cause)
            if self._started and isinstance(error.cause, MissingCompilerError):
                return self._handle_failed_start(
                    worker, reason, f"is refused (there is {error.cause.args[0]})"
                )
            if not is_worth_retrying(error.cause):
                raise_task_error(error)
            return self._handle_failed_start(worker, reason)
        except worker_failures(self._ray) as error:
            return self._handle_failed_start(worker, summarize_error(error))
        slot.since = time.monotonic()
        if slot.state == "waiting":
            slot.state = "building"
            slot.node = answer
            slot.call = slot.actor.build.remote(self._spec)
            return None
        slot.state = "idle"
        slot.call = None
        self._failed_starts_in_a_row = 0
        if self._started:
            self._report(f"worker {worker} is ready: {self.size} now")
        return None

    def _handle_failed_start(self, worker: int, reason: str, what_happened: str = "") -> None:
        """Replace a worker that failed to start.

        Raises:
            LostShardError: too many in a row failed.
        """
        if self.is_node_dead(worker):
            return self.replace(worker, 0.0, blamed=False)
        self._failed_starts_in_a_row += 1
        expected_workers = len(self._slots) if self._started else self._run.min_workers
        if self._failed_starts_in_a_row >= self._run.max_shard_failures * expected_workers:
            raise LostShardError(
                f"{self._failed_starts_in_a_row} workers in a row died while starting, the last by: {reason}"
            )
        if not what_happened:
            what_happened = f"died while starting ({error_type(reason)})"
        self._report(f"worker {worker} {what_happened}: another one is started")
        return self.replace(worker, backoff(self._slots[worker].losses_in_a_row + 1))

    def _check_start_timeouts(self, now: float) -> None:
        """Replace workers that take too long to start.

        One that still waits for room is requested anew without blame: its process may hang before its first answer.
        """
        limit = self._run.start_timeout
        for worker, slot in enumerate(self._slots):
            if now - slot.since <= limit:
                continue
            if slot.state == "building":
                self._handle_failed_start(worker, f"not ready after run.start_timeout = {limit:g} s")
            elif slot.state == "waiting":
                self.replace(worker, 0.0, blamed=False)

    def _leave_draining_nodes(self) -> None:
        """Move workers off nodes that will go away. A worker that computes first finishes its shard."""
        draining = self._nodes.draining()
        moving = [
            worker
            for worker, slot in enumerate(self._slots)
            if slot.node in draining and slot.state in ("idle", "building")
        ]
        for worker in moving:
            self.replace(worker, 0.0, blamed=False)
        if moving:
            self._report(f"a node is going away: {len(moving)} of its workers move")

    def _check_shortage(self, now: float) -> None:
        """Report what the run waits for if it has too few workers.

        Raises:
            LostShardError: no worker was left for `run.start_timeout` seconds.
        """
        needed = 1 if self._started else self._run.min_workers
        if self.size >= needed:
            self._short_since = None
            return
        if self._short_since is None:
            self._short_since = now
            self._last_report = now + FIRST_REPORT_SECONDS - REPORT_SECONDS
        waited = now - self._short_since
        limit = self._run.start_timeout
        if self._started and waited > limit:
            raise LostShardError(
                f"no worker is left, and none was ready after run.start_timeout = {limit:g} s: "
                f"{self._describe_shortage()}"
            )
        if now - self._last_report > REPORT_SECONDS:
            self._last_report = now
            self._report(f"waiting for workers for {waited:.0f} s: {self._describe_shortage()}")

    def _describe_shortage(self) -> str:
        """Return `1 of 2 ready, 0 starting, 1 waiting for room (1 CPU, 0 GPU each); the cluster has …`."""
        run = self._run
        states = [slot.state for slot in self._slots]
        return (
            f"{self.size} of {max(run.min_workers, 1)} ready, {states.count('building')} starting, "
            f"{states.count('waiting')} waiting for room "
            f"({run.cpus_per_worker:g} CPU, {run.gpus_per_worker:g} GPU each); {describe_resources(self._ray)}"
        )


def worker_failures(ray: Any) -> tuple[type[Exception], ...]:
    """Return the Ray errors that mean that a worker, or an object that it made, is lost."""
    errors = ray.exceptions
    return (
        errors.RayActorError,
        errors.ActorUnschedulableError,
        errors.GetTimeoutError,
        errors.NodeDiedError,
        errors.ObjectLostError,
        errors.ObjectStoreFullError,
        errors.OutOfDiskError,
        errors.OutOfMemoryError,
        errors.RuntimeEnvSetupError,
        errors.WorkerCrashedError,
    )


def describe_number(fewest: int, most: int, noun: str) -> str:
    """Return "1 worker", "2 workers" or "2 to 4 workers" for the noun "worker"."""
    number = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    return f"{number} {noun}" if most == 1 else f"{number} {noun}s"


def error_type(reason: str) -> str:
    """Return the part of `summarize_error`'s text that names the type."""
    return reason.partition(":")[0]


def raise_task_error(error: Any) -> NoReturn:
    """Raise here what a task raised on a worker (a `RayTaskError`).

    A user's mistake is raised without a traceback, anything else with the worker's traceback.
    """
    cause = error.cause
    if not isinstance(cause, Exception):
        raise error
    if isinstance(cause, InputError):
        raise cause from None
    raise cause from error
