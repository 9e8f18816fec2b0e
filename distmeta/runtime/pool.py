"""Who computes the shards: this process, or Ray actors. The driver cannot tell which."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, Protocol

import numpy as np

from distmeta.compute.flat import Layout
from distmeta.core import InputError
from distmeta.runtime.failure import Loss, LostShardError, Stop, after_loss, backoff
from distmeta.runtime.problem import Problem, constants_of
from distmeta.runtime.worker import Shard, ShardResult, Worker, WorkerSpec

POLL_SECONDS = 0.2
"""How often a waiting driver looks whether it was interrupted."""
GET_SECONDS = 60.0
"""Longest wait for a result that is said to be ready."""
CONNECT_SECONDS = 5.0
"""Longest wait for a cluster's head to answer at all."""


class Pool(Protocol):
    size: int

    def map(self, flat: np.ndarray, shards: Sequence[Shard], check: Callable[[], None]) -> list[ShardResult]:
        """All shards' results in the order of `shards`; `check` raises to abandon them."""
        ...

    def close(self) -> None: ...


class LocalPool:
    """Computes in this process, one shard after the other: the pool a debugger steps through."""

    size = 1

    def __init__(self, problem: Problem, layout: Layout):
        self._worker = Worker.of(problem, layout)

    def map(self, flat: np.ndarray, shards: Sequence[Shard], check: Callable[[], None]) -> list[ShardResult]:
        results = []
        for shard in shards:
            check()
            results.append(self._worker.compute(flat, shard))
        check()
        return results

    def close(self) -> None:
        pass


def open_pool(problem: Problem, layout: Layout, say: Callable[[str], None]) -> Pool:
    """The pool that the job asks for."""
    return RayPool(problem, layout, say) if problem.job.run.workers else LocalPool(problem, layout)


class RayPool:
    """`run.workers` actors. A free worker takes the next shard; a dead one is replaced and its shard done again."""

    def __init__(self, problem: Problem, layout: Layout, say: Callable[[str], None]):
        import ray

        self._ray, self._run, self._say = ray, problem.job.run, say
        say(f"starting {self._run.workers} Ray worker{'s' * (self._run.workers > 1)} …")
        self._owns_ray = connect(
            ray, self._run.address, math.ceil(self._run.workers * self._run.cpus_per_worker)
        )
        try:
            constants = constants_of(problem.model)
            self._spec = ray.put(WorkerSpec(problem.job.tree(), layout, constants, os.getcwd()))
            self._workers = [self._spawn() for _ in range(self._run.workers)]
            self._await_ready()
        except BaseException:
            self.close()
            raise
        self.size = self._run.workers
        self._free = deque(range(self.size))
        self._starting: dict[Any, tuple[int, float]] = {}  # a replacement's `ready` -> (worker, since when)
        self._due: dict[int, float] = {}  # a lost worker -> when its replacement may start
        self._lost_in_a_row = 0

    def map(self, flat: np.ndarray, shards: Sequence[Shard], check: Callable[[], None]) -> list[ShardResult]:
        theta = self._ray.put(flat)
        waiting = deque(range(len(shards)))
        running: dict[Any, tuple[int, int]] = {}  # a call -> (position in shards, worker)
        failures = [0] * len(shards)
        results: dict[int, ShardResult] = {}
        while len(results) < len(shards):
            check()
            self._revive(bool(running))
            while waiting and self._free:
                position, worker = waiting.popleft(), self._free.popleft()
                running[self._workers[worker].compute.remote(theta, shards[position])] = (position, worker)
            for call in self._finished([*running, *self._starting]):
                if call in self._starting:
                    self._started(call)
                    continue
                position, worker = running.pop(call)
                result = self._result(call)
                if isinstance(result, ShardResult):
                    results[position] = result
                    self._lost_in_a_row = 0
                    self._free.append(worker)
                else:
                    failures[position] += 1
                    self._lost(worker, shards[position], failures[position], result)
                    waiting.appendleft(position)
        return [results[position] for position in range(len(shards))]

    def close(self) -> None:
        for worker in getattr(self, "_workers", ()):
            with contextlib.suppress(self._ray.exceptions.RayError):
                self._ray.kill(worker)
        if self._owns_ray:
            self._ray.shutdown()

    def _finished(self, calls: list[Any]) -> list[Any]:
        if not calls:  # every worker is to be replaced, none is due yet
            time.sleep(POLL_SECONDS)
            return []
        return self._ray.wait(calls, num_returns=1, timeout=POLL_SECONDS)[0]

    def _result(self, call: Any) -> ShardResult | str:
        """A finished call's result, or why its worker was lost. What the computation itself raised is raised."""
        errors = self._ray.exceptions
        try:
            return self._ray.get(call, timeout=GET_SECONDS)
        except errors.RayTaskError as error:
            _reraise(error)
        except (errors.RayActorError, errors.ObjectLostError, errors.OutOfMemoryError) as error:
            return type(error).__name__ + ": " + " ".join(str(error).split())[:200]

    def _lost(self, worker: int, shard: Shard, failures: int, reason: str) -> None:
        """Plans another worker in the lost one's place; the shard goes to whichever is free."""
        self._lost_in_a_row += 1
        loss = Loss(shard.index, range(shard.start, shard.stop), failures, self._lost_in_a_row, reason)
        action = after_loss(loss, self._run.max_shard_failures)
        if isinstance(action, Stop):
            raise LostShardError(action.message)
        self._say(
            f"lost worker {worker} ({reason.partition(':')[0]}): its shard {shard.index} is computed again"
        )
        with contextlib.suppress(self._ray.exceptions.RayError):
            self._ray.kill(self._workers[worker])  # it may be unreachable rather than dead
        self._due[worker] = time.monotonic() + action.delay

    def _revive(self, computing: bool) -> None:
        """Starts the replacements that are due; a worker gets shards only once it is ready.

        Raises:
            LostShardError: no worker is left, and none was ready for `run.start_timeout` seconds.
        """
        now = time.monotonic()
        for worker in [worker for worker, due in self._due.items() if due <= now]:
            del self._due[worker]
            self._workers[worker] = self._spawn()
            self._starting[self._workers[worker].ready.remote()] = (worker, now)
        if self._starting and not computing and not self._free:
            waited = now - min(since for _, since in self._starting.values())
            if waited > self._run.start_timeout:
                raise LostShardError(
                    f"no worker is left: {len(self._starting)} replacements were not ready after run.start_timeout = "
                    f"{self._run.start_timeout:g} s ({self._resources()})"
                )

    def _started(self, call: Any) -> None:
        """A replacement is ready, or died while starting and is replaced in its turn."""
        worker, _ = self._starting.pop(call)
        try:
            self._ray.get(call, timeout=GET_SECONDS)
            self._free.append(worker)
        except self._ray.exceptions.RayActorError as error:
            _reraise_init(self._ray, error)
            self._lost_in_a_row += 1
            if self._lost_in_a_row >= self._run.max_shard_failures * self.size:
                raise LostShardError(
                    f"{self._lost_in_a_row} workers in a row died, the last while starting"
                ) from None
            self._due[worker] = time.monotonic() + backoff(self._lost_in_a_row)

    def _spawn(self) -> Any:
        options = {"num_cpus": self._run.cpus_per_worker, "num_gpus": self._run.gpus_per_worker}
        return self._ray.remote(Worker).options(**options).remote(self._spec)

    def _await_ready(self) -> None:
        """Waits until every worker is built.

        Raises:
            InputError: the cluster cannot place them in `run.start_timeout` seconds, or the job fails to build there.
        """
        ray, run = self._ray, self._run
        calls = [worker.ready.remote() for worker in self._workers]
        done, pending = ray.wait(calls, num_returns=len(calls), timeout=run.start_timeout)
        for call in done:
            try:
                ray.get(call, timeout=GET_SECONDS)
            except ray.exceptions.RayActorError as error:
                _reraise_init(ray, error)
                raise RuntimeError(f"a worker could not start: {error}") from None
        if pending:
            raise InputError(
                f"run.workers: got {run.workers} of {run.cpus_per_worker:g} CPU and {run.gpus_per_worker:g} GPU each, "
                f"but only {len(done)} were ready after run.start_timeout = {run.start_timeout:g} s; "
                f"{self._resources()}"
            )

    def _resources(self) -> str:
        have = {key: self._ray.cluster_resources().get(key, 0) for key in ("CPU", "GPU")}
        return f"the cluster has {have['CPU']:g} CPU and {have['GPU']:g} GPU"


def _reraise(error: Any) -> NoReturn:
    """Raises here what a task raised on a worker: a user's mistake alone, anything else with the worker's traceback."""
    cause = error.cause
    if not isinstance(cause, Exception):
        raise error
    if isinstance(cause, InputError):
        raise cause from None
    raise cause from error


def _reraise_init(ray: Any, error: Any) -> None:
    """Raises what a worker's constructor raised, if that is why it died: another worker would fare no better."""
    inner = error.args[0] if error.args else None
    if isinstance(inner, ray.exceptions.RayTaskError):
        _reraise(inner)


def connect(ray: Any, address: str | None, cpus: int) -> bool:
    """Joins the cluster that is named or running, else starts a local one; whether this call started Ray here."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else Ray warns about its own default
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if ray.is_initialized():
        return False
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    address = address or os.environ.get("RAY_ADDRESS")
    if not address or address == "local":
        ray.init(address="local", num_cpus=max(os.cpu_count() or 1, cpus), include_dashboard=False, **quiet)
        return True
    _check_reachable(address)
    try:
        ray.init(address=address, **quiet)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InputError(
            f"run.address: cannot join the Ray cluster at {address!r} ({str(error).splitlines()[0]}): is it running, "
            "and are RAY_AUTH_MODE and RAY_AUTH_TOKEN the cluster's?"
        ) from None
    return True


def _check_reachable(address: str) -> None:
    """Tries HOST:PORT for a few seconds: Ray itself tries for minutes.

    Raises:
        InputError: nothing listens there.
    """
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdigit():
        return  # auto, or another of Ray's own names
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise InputError(
            f"run.address: nothing answers at {address!r} ({error}), expected a Ray cluster's head"
        ) from None
