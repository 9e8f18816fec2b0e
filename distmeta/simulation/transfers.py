"""Measure what moving vectors costs on this machine: Ray's object store, the driver's additions, gloo's ring."""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from distmeta.runtime.parameter_server import tree_sum
from distmeta.simulation.costs import CostCurve

SIZES = (4_000, 64_000, 256_000, 1_000_000, 4_000_000, 16_000_000, 64_000_000)
"""Bytes. Ray sends results up to 100 kB with the answer itself, larger ones through the object store."""
ROUNDS = 9
CALLS_AT_ONCE = 16
"""Calls per actor to measure what one of many costs."""
SUMMED_VECTORS = 4
TIMEOUT = 120.0
"""Seconds that an answer may take."""


class TransferCosts(NamedTuple):
    """The fields of `costs.MachineCosts` with the same names."""

    message: float
    message_driver: float
    put: CostCurve
    receive: CostCurve
    reply: CostCurve
    reply_shared: float
    add: CostCurve
    ring: CostCurve


class EchoActor:
    """A Ray actor that moves vectors and computes nothing."""

    def __init__(self, largest: int):
        self._vector = np.full(largest // 4, 1e-3, np.float32)

    def take(self, vector: np.ndarray) -> None:
        vector.max()  # reads it in place, as a shard reads theta

    def give(self, size: int) -> np.ndarray:
        return self._vector[: size // 4]

    def join_group(self, rank: int, port: int) -> None:
        import torch.distributed as dist

        dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)

    def time_all_reduce(self, size: int, rounds: int) -> float:
        """Return the seconds of gloo's all-reduce."""
        import torch
        import torch.distributed as dist

        vector = torch.from_numpy(self._vector[: size // 4].copy())
        return statistics.median(time_call(lambda: dist.all_reduce(vector)) for _ in range(rounds))


class TransferProbe:
    """Measures transfers with two actors."""

    def __init__(self, ray: Any):
        self._ray = ray
        self._actors = [ray.remote(EchoActor).options(num_cpus=0).remote(SIZES[-1]) for _ in range(2)]

    def close(self) -> None:
        for actor in self._actors:
            self._ray.kill(actor)

    def _get(self, calls: Any) -> Any:
        return self._ray.get(calls, timeout=TIMEOUT)

    def time_take_nothing(self) -> float:
        tiny = self._ray.put(np.zeros(1, np.float32))
        return take_median(lambda: time_call(lambda: self._get(self._actors[0].take.remote(tiny))))

    def time_give(self, size: int) -> float:
        return take_median(lambda: time_call(lambda: self._get(self._actors[0].give.remote(size))))

    def time_give_by_both(self, size: int) -> float:
        """Return the seconds until both actors have given a vector at the same time."""

        def give() -> None:
            self._get([actor.give.remote(size) for actor in self._actors])

        return take_median(lambda: time_call(give))

    def time_one_of_many_calls(self) -> float:
        actors = CALLS_AT_ONCE * self._actors

        def give() -> None:
            self._get([actor.give.remote(4) for actor in actors])

        return take_median(lambda: time_call(give)) / len(actors)

    def time_put(self, size: int) -> float:
        vector = make_vector(size)
        return take_median(lambda: time_call(lambda: self._ray.put(vector)))

    def time_take_after_put(self, size: int) -> float:
        """Return the seconds of a call with a vector that was just put into the object store."""
        vector = make_vector(size)

        def put_and_take() -> float:
            theta = self._ray.put(vector)
            return time_call(lambda: self._get(self._actors[0].take.remote(theta)))

        return take_median(put_and_take)

    def time_add(self, size: int) -> float:
        """Return the seconds per added vector, of vectors that workers have just given."""

        def add() -> float:
            vectors = self._get([self._actors[k % 2].give.remote(size) for k in range(SUMMED_VECTORS)])
            return time_call(lambda: tree_sum(vectors)) / (SUMMED_VECTORS - 1)

        return take_median(add)

    def time_ring(self) -> CostCurve:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._get([actor.join_group.remote(rank, port) for rank, actor in enumerate(self._actors)])
        points = []
        for size in SIZES:
            self._get([actor.time_all_reduce.remote(size, 1) for actor in self._actors])
            seconds = self._get([actor.time_all_reduce.remote(size, ROUNDS) for actor in self._actors])
            points.append((float(size), max(seconds)))
        return CostCurve(tuple(points))


def measure_transfers(ray: Any) -> TransferCosts:
    """Measure all transfers with two actors on this machine."""
    probe = TransferProbe(ray)
    try:
        nothing = probe.time_take_nothing()
        message = probe.time_give(4)
        puts: list[tuple[float, float]] = []
        receives: list[tuple[float, float]] = []
        replies: list[tuple[float, float]] = []
        adds: list[tuple[float, float]] = []
        for size in SIZES:
            puts.append((float(size), probe.time_put(size)))
            receives.append((float(size), max(probe.time_take_after_put(size) - nothing, 0.0)))
            replies.append((float(size), max(probe.time_give(size) - message, 0.0)))
            adds.append((float(size), probe.time_add(size)))
        message_driver = min(probe.time_one_of_many_calls(), message)
        both = probe.time_give_by_both(SIZES[-1])
        one = replies[-1][1]
        shared = min(max((both - message - one) / one, 0.0), 1.0) if one else 0.0
        ring = probe.time_ring()
    finally:
        probe.close()
    return TransferCosts(
        message=message,
        message_driver=message_driver,
        put=CostCurve(tuple(puts)),
        receive=CostCurve(tuple(receives)),
        reply=CostCurve(tuple(replies)),
        reply_shared=shared,
        add=CostCurve(tuple(adds)),
        ring=ring,
    )


def make_vector(size: int) -> np.ndarray:
    return np.full(size // 4, 1e-3, np.float32)


def time_call(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def take_median(measure: Callable[[], float]) -> float:
    """Return the median of several measurements, after one that does not count."""
    measure()
    return statistics.median(measure() for _ in range(ROUNDS))
