"""The workers of a run on a Ray cluster: placed, started, replaced, let go. Knows nothing of what they compute."""

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
from distmeta.config.job import Run
from distmeta.errors import InputError
from distmeta.runtime.failure_policy import LostShardError, another_may_fare_better, backoff
from distmeta.runtime.ray_cluster import Nodes, resources
from distmeta.runtime.worker import Shard, Worker, WorkerSpec

POLL_SECONDS = 0.2
"""How often a waiting driver looks whether it was interrupted."""
GET_SECONDS = 60.0
"""Longest wait for a result that is said to be ready."""
SAY_SECONDS = (5.0, 60.0)
"""When it is first said that workers are waited for, and how often after that."""


class WorkerProcess:
    """The Ray actor. It is there before its worker is built: waiting for room and building have limits of their own."""

    def __init__(self) -> None:
        self._worker: Worker | None = None
        self._out: Buffer | None = None
        """A gradient's memory, shard after shard: Ray copies what a call gives back before the next one."""

    def here(self) -> str:
        """The node's id, once there was room."""
        import ray

        return ray.get_runtime_context().get_node_id()

    def build(self, spec: WorkerSpec) -> int:
        self._worker = Worker(spec)
        self._out = self._worker.buffer()
        return os.getpid()

    def compute(self, shard: Shard, edges: Sequence[int], *flat: np.ndarray) -> Any:
        """A shard's result; with `edges`, where the gradient is cut, the pieces after it: objects of their own that may
        go elsewhere.

        Args:
            flat: theta, in any number of consecutive pieces.
        """
        assert self._worker is not None
        result = self._worker.compute(flat, shard, self._out)
        if not edges:
            return result
        assert result.gradient is not None
        return replace(result, gradient=None), *cut(result.gradient, edges)

    def round(self, own: Any, flat: np.ndarray, state: Any) -> Any:
        """A replica's steps (`run.strategy: local`): three objects, for the last two may stay here."""
        from distmeta.strategies.replica import run_round  # what a worker of `local` alone needs

        assert self._worker is not None
        return run_round(self._worker, own, flat, state)


@dataclass
class _Place:
    """Where a worker stands, or will."""

    state: Literal["empty", "waiting", "building", "idle", "busy"] = "empty"
    since: float = 0.0
    """When it came into this state; empty: when the next worker is due; busy: when it began what it computes now."""
    actor: Any = None
    node: str | None = None
    call: Any = None
    """What ends the waiting or the building."""
    given: int = 0
    """Shards that it has: the one that it computes and those behind."""
    in_a_row: int = 0
    """Workers lost here since one computed a shard."""


class Fleet:
    """`run.max_workers` places. Whoever has room for one gets asked for it: that is what an autoscaler sees."""

    def __init__(self, ray: Any, run: Run, spec: Any, say: Callable[[str], None]):
        self._ray, self._run, self._spec, self._say = ray, run, spec, say
        self._places = [_Place() for _ in range(run.max_workers)]
        self._nodes = Nodes(ray)
        self._failed_starts = 0  # in a row
        self._opened = False
        self._short_since: float | None = None
        self._said = 0.0

    @property
    def size(self) -> int:
        """Workers that are ready or at work."""
        return sum(place.state in ("idle", "busy") for place in self._places)

    def idle(self) -> list[int]:
        return [worker for worker, place in enumerate(self._places) if place.state == "idle"]

    def with_one(self) -> list[int]:
        """Those that compute a shard and have none behind it, where they are to stay."""
        draining = self._nodes.draining()
        return [w for w, p in enumerate(self._places) if p.given == 1 and p.node not in draining]

    def since(self, worker: int) -> float:
        """When a worker began what it computes now."""
        return self._places[worker].since

    def node(self, worker: int) -> str | None:
        return self._places[worker].node

    def nodes(self) -> list[str]:
        """Where workers are, each node once."""
        return list(dict.fromkeys(place.node for place in self._places if place.node is not None))

    def calls(self) -> list[Any]:
        """What workers on their way are waited for by."""
        return [place.call for place in self._places if place.state in ("waiting", "building")]

    def losses(self, worker: int) -> int:
        """Workers lost in this one's place since one computed a shard."""
        return self._places[worker].in_a_row

    def open(self) -> None:
        """Waits until `run.min_workers` are ready.

        Raises:
            InputError: the cluster cannot place them in `run.start_timeout` seconds, or the job fails to build there.
            LostShardError: they die while starting.
        """
        run, least = self._run, self._run.min_workers
        begun = time.monotonic()
        while self.size < least:
            if time.monotonic() - begun > run.start_timeout:
                raise InputError(
                    f"run.workers: got {least} of {run.cpus_per_worker:g} CPU and {run.gpus_per_worker:g} GPU each, "
                    f"but only {self.size} were ready after run.start_timeout = {run.start_timeout:g} s; "
                    f"{resources(self._ray)}"
                )
            self.tend()
            self.wait([])
        self._opened = True

    def resume(self) -> None:
        """Nobody tended the workers for a while: waiting for them begins anew."""
        self._short_since = None

    def wait(self, calls: list[Any]) -> list[Any]:
        """One of `calls` that is finished, after a moment at most."""
        everything = [*calls, *self.calls()]
        if not everything:  # every worker is to be replaced, none is due yet
            time.sleep(POLL_SECONDS)
            return []
        done, _ = self._ray.wait(everything, num_returns=1, timeout=POLL_SECONDS)
        return [call for call in done if call in calls]

    def give(self, worker: int, method: str, unit: Any, arguments: Sequence[Any], outputs: int) -> list[Any]:
        """A worker computes something, once it is done with what it has: as many objects."""
        place = self._places[worker]
        assert place.state in ("idle", "busy")
        if place.state == "idle":
            place.state, place.since = "busy", time.monotonic()
        place.given += 1
        call = getattr(place.actor, method)
        return (
            call.options(num_returns=outputs).remote(unit, *arguments)
            if outputs > 1
            else [call.remote(unit, *arguments)]
        )

    def freed(self, worker: int) -> None:
        """It computed its shard."""
        place = self._places[worker]
        place.given -= 1
        place.state = "busy" if place.given else "idle"
        place.since, place.in_a_row = time.monotonic(), 0
        self._failed_starts = 0

    def went_with_its_node(self, worker: int) -> bool:
        return self._nodes.died(self._places[worker].node)

    def replace(self, worker: int, delay: float, blamed: bool = True) -> None:
        """Lets a worker go; another is asked for after `delay` seconds."""
        place = self._places[worker]
        if place.actor is not None:
            with contextlib.suppress(self._ray.exceptions.RayError):
                self._ray.kill(place.actor)  # it may be unreachable or stopped rather than dead
        place.state, place.since, place.in_a_row = "empty", time.monotonic() + delay, place.in_a_row + blamed
        place.actor = place.node = place.call = None
        place.given = 0

    def close(self) -> None:
        for worker in range(len(self._places)):
            self.replace(worker, 0.0)

    def tend(self) -> None:
        """Asks for workers that are due, takes up those that came, lets go those whose node is going.

        Raises:
            LostShardError: no worker is left and none comes, or they all die while starting.
        """
        now = time.monotonic()
        for place in self._places:
            if place.state == "empty" and place.since <= now:
                self._ask(place, now)
        on_the_way = {
            place.call: worker for worker, place in enumerate(self._places) if place.call is not None
        }
        if on_the_way:
            for call in self._ray.wait(list(on_the_way), num_returns=len(on_the_way), timeout=0)[0]:
                self._arrived(on_the_way[call], call)
        self._overdue(now)
        self._leave(self._nodes.draining())
        self._short(now)

    def _ask(self, place: _Place, now: float) -> None:
        options = {"num_cpus": self._run.cpus_per_worker, "num_gpus": self._run.gpus_per_worker}
        place.actor = self._ray.remote(WorkerProcess).options(**options).remote()
        place.state, place.since, place.call = "waiting", now, place.actor.here.remote()

    def _arrived(self, worker: int, call: Any) -> None:
        """A worker found room, or is ready, or died before it was."""
        place = self._places[worker]
        try:
            answer = self._ray.get(call, timeout=GET_SECONDS)
        except self._ray.exceptions.RayTaskError as error:
            if self._opened and isinstance(error.cause, MissingCompilerError):
                return self._failed(worker, describe(error), f"is refused (there is {error.cause.args[0]})")
            if not another_may_fare_better(error.cause):
                reraise(error)
            return self._failed(worker, describe(error))
        except lost_by(self._ray) as error:
            return self._failed(worker, describe(error))
        place.since = time.monotonic()
        if place.state == "waiting":
            place.state, place.node, place.call = "building", answer, place.actor.build.remote(self._spec)
            return None
        place.state, place.call = "idle", None
        self._failed_starts = 0
        if self._opened:
            self._say(f"worker {worker} is ready: {self.size} now")
        return None

    def _failed(self, worker: int, reason: str, how: str = "") -> None:
        if self.went_with_its_node(worker):
            return self.replace(worker, 0.0, blamed=False)
        self._failed_starts += 1
        places = len(self._places) if self._opened else self._run.min_workers
        if self._failed_starts >= self._run.max_shard_failures * places:
            raise LostShardError(
                f"{self._failed_starts} workers in a row died while starting, the last by: {reason}"
            )
        how = how or f"died while starting ({reason.partition(':')[0]})"
        self._say(f"worker {worker} {how}: another is started")
        return self.replace(worker, backoff(self._places[worker].in_a_row + 1))

    def _overdue(self, now: float) -> None:
        """Building has a limit. Room is asked for anew now and then: a process may stop before its first word."""
        for worker, place in enumerate(self._places):
            if place.state == "building" and now - place.since > self._run.start_timeout:
                self._failed(worker, f"not ready after run.start_timeout = {self._run.start_timeout:g} s")
            elif place.state == "waiting" and now - place.since > self._run.start_timeout:
                self.replace(worker, 0.0, blamed=False)

    def _leave(self, draining: frozenset[str]) -> None:
        """Workers move off nodes that were told to go; one that is at work first ends its shard."""
        moving = [
            w for w, p in enumerate(self._places) if p.node in draining and p.state in ("idle", "building")
        ]
        for worker in moving:
            self.replace(worker, 0.0, blamed=False)
        if moving:
            self._say(f"a node is going away: {len(moving)} of its workers move")

    def _short(self, now: float) -> None:
        """Says what is waited for; gives up where no worker is left and none came for `run.start_timeout` seconds."""
        if self.size >= (1 if self._opened else self._run.min_workers):
            self._short_since = None
            return
        if self._short_since is None:
            self._short_since, self._said = now, now + SAY_SECONDS[0] - SAY_SECONDS[1]
        run, waited = self._run, now - self._short_since
        if self._opened and waited > run.start_timeout:
            raise LostShardError(
                f"no worker is left, and none was ready after run.start_timeout = {run.start_timeout:g} s: "
                f"{self._waited_for()}"
            )
        if now - self._said > SAY_SECONDS[1]:
            self._said = now
            self._say(f"waiting for workers for {waited:.0f} s: {self._waited_for()}")

    def _waited_for(self) -> str:
        """`1 of 2 ready, 1 waits for room (1 CPU, 0 GPU each); the cluster has …`"""
        run, states = self._run, [place.state for place in self._places]
        room, building = states.count("waiting"), states.count("building")
        each = f"{run.cpus_per_worker:g} CPU, {run.gpus_per_worker:g} GPU each"
        needed = max(run.min_workers, 1)
        return (
            f"{self.size} of {needed} ready, {building} starting, {room} waiting for room ({each}); "
            f"{resources(self._ray)}"
        )


def lost_by(ray: Any) -> tuple[type[Exception], ...]:
    """The Ray failures by which a worker, or what it computed, is lost."""
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


def describe(error: Exception) -> str:
    """One line."""
    cause = getattr(error, "cause", None) or error
    return f"{type(cause).__name__}: " + " ".join(str(cause).split())[:200]


def reraise(error: Any) -> NoReturn:
    """Raises here what a task raised on a worker: a user's mistake alone, anything else with the worker's traceback."""
    cause = error.cause
    if not isinstance(cause, Exception):
        raise error
    if isinstance(cause, InputError):
        raise cause from None
    raise cause from error
