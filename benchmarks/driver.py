"""What a step that computes nothing costs, against a Ray step written by hand; and the bandwidth of adding shards.

    python benchmarks/driver.py

Steps: two workers and eight shards. "vector at hand": each worker returns a vector that it has already. "gradient of
zeros": the algorithm's gradient is 0, but shards draw tasks, go through autograd and are checked, as always. By hand:
one `put` of theta, one call per shard to two actors that return a vector of the same size, one `get` of all, the sum.
Both take turns; medians.

Sums: `tree_sum` of 2 to 32 vectors of 1 to 100 million numbers against `numpy.add` of one after the other into one
output, which moves at least the bytes that any sum must move.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from raw_results import describe_environment, save_section

from distmeta.config.job import Job
from distmeta.protocols import Episode, Theta
from distmeta.runtime import ray_workers
from distmeta.runtime.parameter_server import ParameterServer, tree_sum
from distmeta.runtime.pool import open_pool
from distmeta.runtime.problem import build_problem
from distmeta.runtime.ray_workers import WorkerProcess
from distmeta.runtime.resolve import resolve
from distmeta.runtime.shards import Shard, ShardResult, WorkerSpec
from distmeta.runtime.worker import plan_shards

WORKERS = 2
SHARDS = 8
PARAMETERS = (10_000, 100_000, 1_000_000, 10_000_000)
SUMMED_PARAMETERS = (1_000_000, 10_000_000, 100_000_000)
VECTORS = (2, 8, 32)
MEMORY_SHARE = 0.8
"""Sums that need more than this share of the free memory are left out."""


class ZeroGradient:
    """An algorithm with `size` parameters and nothing to compute."""

    group_size = 1
    inner_steps = 0

    def __init__(self, size: int):
        self.size = size

    def init(self, generator: torch.Generator) -> Theta:
        return {"model.all": torch.zeros(self.size)}

    def begin(self, theta: Theta, support: Any) -> Any:
        return ()

    def step(self, theta: Theta, state: Any, support: Any, k: int) -> Any:
        return state

    def predict(self, theta: Theta, state: Any, x: torch.Tensor) -> torch.Tensor:
        return x

    def meta_loss(self, theta: Theta, episode: Episode, unroll: Any, score: Any) -> Any:
        zero = torch.zeros(())
        return zero, {"loss": zero}


class ReadyWorker(WorkerProcess):
    """A worker that has the result of every shard already."""

    def build(self, spec: WorkerSpec) -> int:
        self._gradient = np.zeros(spec.layout.size, np.float32)
        return super().build(spec)

    def compute(self, shard: Shard, edges: Sequence[int], *flat: np.ndarray) -> ShardResult:
        metrics = {name: np.zeros(shard.stop - shard.start) for name in ("loss_before", "loss_after")}
        return ShardResult(shard.index, self._gradient, 1, (), metrics, None, 0.0, 0.0)


class Echo:
    """An actor that returns a vector it has, for the step by hand."""

    def __init__(self, size: int):
        self.gradient = np.zeros(size, np.float32)

    def compute(self, theta: np.ndarray, shard: int) -> np.ndarray:
        return self.gradient


def measure_step(size: int, rounds: int, worker: type[WorkerProcess]) -> dict[str, float]:
    """Return the milliseconds of distmeta's step up to the mean gradient, of the same by hand, and their ratio."""
    import ray

    tree = {
        "name": "zero-gradient",
        "model": {"type": "mlp", "hidden": []},
        "tasks": {"type": "linear", "shots": 1, "queries": 1},
        "algorithm": {"type": "driver:ZeroGradient", "size": size},
        "run": {
            "tasks_per_step": SHARDS,
            "shards": SHARDS,
            "workers": WORKERS,
            "cpus_per_worker": 0.5,
            "eval_every": 0,
        },
        "tracking": {"type": "none"},
    }
    problem = resolve(build_problem(Job.parse(tree)))
    server = ParameterServer(problem.init(), problem.job.outer)
    setattr(ray_workers, "WorkerProcess", worker)  # noqa: B010 - the class of the actors
    pool = open_pool(problem, server.layout, lambda text: None)
    actors = [ray.remote(Echo).options(num_cpus=0.5).remote(size) for _ in range(WORKERS)]
    theta = server.flat()

    def step(number: int) -> None:
        plan = plan_shards(problem, "train", number, SHARDS, SHARDS, 0)
        results = pool.map(theta, plan, lambda: None)
        gradients: list[Any] = [result.gradient for result in results if result.gradient is not None]
        tree_sum(gradients)

    def step_by_hand(number: int) -> None:
        sent = ray.put(theta)
        calls = [actors[i % WORKERS].compute.remote(sent, i) for i in range(SHARDS)]
        vectors = ray.get(calls)
        total = vectors[0] + vectors[1]
        for vector in vectors[2:]:
            total += vector

    times = time_in_turn(step, step_by_hand, rounds)
    pool.close()
    return {
        "ours_ms": 1e3 * statistics.median(ours for ours, _ in times),
        "by_hand_ms": 1e3 * statistics.median(by_hand for _, by_hand in times),
        "ratio": statistics.median(ours / by_hand for ours, by_hand in times),
    }


def measure_sum(size: int, count: int, rounds: int) -> dict[str, float]:
    """Return the milliseconds of the tree and of plain additions, and the tree's share of their bandwidth."""
    vectors = [np.full(size, k, np.float32) for k in range(count)]
    total = np.empty(size, np.float32)

    def add_plainly(_: int) -> None:
        np.add(vectors[0], vectors[1], out=total)
        for vector in vectors[2:]:
            np.add(total, vector, out=total)

    times = time_in_turn(lambda _: tree_sum(vectors), add_plainly, rounds)
    return {
        "tree_ms": 1e3 * statistics.median(tree for tree, _ in times),
        "plain_ms": 1e3 * statistics.median(plain for _, plain in times),
        "share": statistics.median(plain / tree for tree, plain in times),
    }


def time_in_turn(
    first: Callable[[int], object], second: Callable[[int], object], rounds: int
) -> list[tuple[float, float]]:
    """Return the seconds of both in each round. The first round does not count."""
    times = []
    for step in range(rounds + 1):
        started = time.perf_counter()
        first(step)
        between = time.perf_counter()
        second(step)
        times.append((between - started, time.perf_counter() - between))
    return times[1:]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a smoke run; writes nothing")
    given = parser.parse_args()
    os.chdir(Path(__file__).parent)  # workers find `driver:ZeroGradient` in the working folder
    environment = describe_environment()
    rounds = 3 if given.quick else 60
    rows = [
        {"shards_return": name, "parameters": size, **measure_step(size, rounds, worker)}
        for name, worker in (("vector at hand", ReadyWorker), ("gradient of zeros", WorkerProcess))
        for size in PARAMETERS[: 1 if given.quick else None]
    ]
    save_section("driver", "steps", environment, rows, given.quick)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    rows = [
        {"parameters": size, "vectors": count, **measure_sum(size, count, 5)}
        for size in SUMMED_PARAMETERS[: 1 if given.quick else None]
        for count in VECTORS
        if 4 * size * (count + 2) <= MEMORY_SHARE * free
    ]
    save_section("driver", "sums", environment, rows, given.quick)


if __name__ == "__main__":
    main()
