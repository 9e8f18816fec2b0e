"""What moving a vector costs on this machine: Ray's object store, the driver's adds, gloo's ring; by its bytes."""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from distmeta.compute.vectors import tree_sum
from distmeta.simulation.costs import Curve

SIZES = (4_000, 64_000, 256_000, 1_000_000, 4_000_000, 16_000_000, 64_000_000)
"""Bytes. Ray sends results up to 100 kB with the answer itself, larger ones through the object store."""
ROUNDS = 9
MANY = 16
VECTORS = 4
"""That are added at once."""
LIMIT = 120.0
"""Seconds that any answer may take."""


class Transfers(NamedTuple):
    """See `costs.Machine`."""

    message: float
    message_driver: float
    put: Curve
    receive: Curve
    reply: Curve
    reply_shared: float
    add: Curve
    ring: Curve


class Echo:
    """A Ray actor that moves vectors and computes nothing."""

    def __init__(self, largest: int):
        self._vector = np.full(largest // 4, 1e-3, np.float32)

    def take(self, vector: np.ndarray) -> None:
        vector.max()  # where it lies, as a shard reads theta

    def give(self, size: int) -> np.ndarray:
        return self._vector[: size // 4]

    def join(self, rank: int, port: int) -> None:
        import torch.distributed as dist

        dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)

    def reduce(self, size: int, rounds: int) -> float:
        """Seconds of gloo's all-reduce."""
        import torch
        import torch.distributed as dist

        vector = torch.from_numpy(self._vector[: size // 4].copy())
        return statistics.median(timed(lambda: dist.all_reduce(vector)) for _ in range(rounds))


def measure(ray: Any) -> Transfers:
    """With two workers."""
    actors = [ray.remote(Echo).options(num_cpus=0).remote(SIZES[-1]) for _ in range(2)]
    one, two = actors
    try:
        tiny = ray.put(np.zeros(1, np.float32))
        nothing = _usual(lambda: timed(lambda: _got(ray, one.take.remote(tiny))))
        empty = _usual(lambda: timed(lambda: _got(ray, one.give.remote(4))))
        puts, receives, replies, adds = [], [], [], []
        for size in SIZES:
            vector = np.full(size // 4, 1e-3, np.float32)
            puts.append((size, _usual(lambda vector=vector: timed(lambda: ray.put(vector)))))
            fetched = _usual(lambda vector=vector: _fetch(ray, one, vector))
            receives.append((size, max(fetched - nothing, 0.0)))
            given = _usual(lambda size=size: timed(lambda: _got(ray, one.give.remote(size))))
            replies.append((size, max(given - empty, 0.0)))
            adds.append((size, _usual(lambda size=size: _add(ray, actors, size))))
        many = _usual(lambda: timed(lambda: _got(ray, [a.give.remote(4) for a in MANY * actors]))) / len(
            MANY * actors
        )
        both = _usual(lambda: timed(lambda: _got(ray, [a.give.remote(SIZES[-1]) for a in (one, two)])))
        last = replies[-1][1]
        shared = min(max((both - empty - last) / last, 0.0), 1.0) if last else 0.0
        ring = _ring(ray, actors)
    finally:
        for actor in actors:
            ray.kill(actor)
    return Transfers(
        empty, min(many, empty), _curve(puts), _curve(receives), _curve(replies), shared, _curve(adds), ring
    )


def _got(ray: Any, calls: Any) -> Any:
    return ray.get(calls, timeout=LIMIT)


def timed(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def _usual(measured: Callable[[], float]) -> float:
    measured()
    return statistics.median(measured() for _ in range(ROUNDS))


def _fetch(ray: Any, actor: Any, vector: np.ndarray) -> float:
    """Seconds of a call with a vector that is in the object store since now."""
    theta = ray.put(vector)
    return timed(lambda: _got(ray, actor.take.remote(theta)))


def _add(ray: Any, actors: list[Any], size: int) -> float:
    """Seconds a vector more, of vectors that workers have just given."""
    vectors = _got(ray, [actors[k % 2].give.remote(size) for k in range(VECTORS)])
    return timed(lambda: tree_sum(vectors)) / (VECTORS - 1)


def _ring(ray: Any, actors: list[Any]) -> Curve:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    _got(ray, [actor.join.remote(rank, port) for rank, actor in enumerate(actors)])
    points = []
    for size in SIZES:
        _got(ray, [actor.reduce.remote(size, 1) for actor in actors])
        points.append((size, max(_got(ray, [actor.reduce.remote(size, ROUNDS) for actor in actors]))))
    return _curve(points)


def _curve(points: list[tuple[int, float]]) -> Curve:
    return Curve(tuple((float(size), seconds) for size, seconds in points))
