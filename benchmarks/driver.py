"""What a step costs that computes nothing, against a Ray step written by hand; and the bandwidth of adding shards.

    python benchmarks/driver.py [--quick]

The driver's step: two workers, 8 shards with no work in them: each worker gives back a vector that it has. By hand: one
`put` of theta, a call a shard to two actors that give back a vector of the same size, one `get` of all, the adds. In
turn, medians. The null step is that of an algorithm whose gradient is 0 everywhere: its shards draw their tasks, go
through autograd and are checked, as all do.

Aggregation: `tree_sum` of 2 to 32 vectors of 1 to 100 million numbers against `numpy.add` of one after the other into
one output, which moves at least the bytes that any sum must: the ratio of their times.
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
import report
import torch

from distmeta.compute.vectors import tree_sum
from distmeta.config.job import Job
from distmeta.protocols import Episode, Theta
from distmeta.runtime import ray_workers as fleet
from distmeta.runtime.parameter_server import ParameterServer
from distmeta.runtime.pool import open_pool
from distmeta.runtime.problem import build
from distmeta.runtime.ray_workers import WorkerProcess
from distmeta.runtime.resolve import resolve
from distmeta.runtime.worker import Shard, ShardResult, WorkerSpec, shards_of

WORKERS, SHARDS = 2, 8
MILLIONS = (1, 10, 100)
VECTORS = (2, 8, 32)
MOST_MEMORY = 0.8
"""Of what is free; larger sums are left out."""


class Null:
    """An algorithm with `size` parameters and nothing to compute."""

    group_size, inner_steps = 1, 0

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
        nothing = torch.zeros(())
        return nothing, {"loss": nothing}


class Ready(WorkerProcess):
    """A worker with every shard's result at hand."""

    def build(self, spec: WorkerSpec) -> int:
        self._gradient = np.zeros(spec.layout.size, np.float32)
        return super().build(spec)

    def compute(self, shard: Shard, edges: Sequence[int], *flat: np.ndarray) -> ShardResult:
        metrics = {name: np.zeros(shard.stop - shard.start) for name in ("loss_before", "loss_after")}
        return ShardResult(shard.index, self._gradient, 1, (), metrics, None, 0.0, 0.0)


def step(size: int, rounds: int, process: type[WorkerProcess]) -> dict[str, float]:
    """Milliseconds of distmeta's step up to the mean gradient, of the same by hand, and their ratio."""
    import ray

    run = {"tasks_per_step": SHARDS, "shards": SHARDS, "workers": WORKERS, "cpus_per_worker": 0.5}
    tree = {
        "name": "null",
        "model": {"type": "mlp", "hidden": []},
        "tasks": {"type": "linear", "shots": 1, "queries": 1},
        "algorithm": {"type": "driver:Null", "size": size},
        "run": run | {"eval_every": 0},
        "tracking": {"type": "none"},
    }
    problem = resolve(build(Job.parse(tree)))
    server = ParameterServer(problem.init(), problem.job.outer)
    setattr(fleet, "WorkerProcess", process)  # noqa: B010 - the actors' class
    pool = open_pool(problem, server.layout, lambda text: None)

    class Echo:
        def __init__(self, size: int):
            self.gradient = np.zeros(size, np.float32)

        def compute(self, theta: np.ndarray, shard: int) -> np.ndarray:
            return self.gradient

    actors = [ray.remote(Echo).options(num_cpus=0.5).remote(size) for _ in range(WORKERS)]
    theta = server.flat()

    def ours(step: int) -> None:
        plan = shards_of(problem, "train", step, SHARDS, SHARDS, 0)
        results = pool.map(theta, plan, lambda: None)
        tree_sum([result.gradient for result in results if result.gradient is not None])

    def by_hand(step: int) -> None:
        sent = ray.put(theta)
        calls = [actors[i % WORKERS].compute.remote(sent, i) for i in range(SHARDS)]
        vectors = ray.get(calls)
        total = vectors[0] + vectors[1]
        for vector in vectors[2:]:
            total += vector

    times = alternately(ours, by_hand, rounds)
    pool.close()
    return {
        "ours_ms": 1e3 * statistics.median(a for a, _ in times),
        "by_hand_ms": 1e3 * statistics.median(b for _, b in times),
        "ratio": statistics.median(a / b for a, b in times),
    }


def aggregation(size: int, count: int, rounds: int) -> dict[str, float]:
    """Milliseconds of the tree and of plain adds, and plain over tree: the share of its bandwidth."""
    vectors = [np.full(size, k, np.float32) for k in range(count)]
    total = np.empty(size, np.float32)

    def plain(_: int) -> None:
        np.add(vectors[0], vectors[1], out=total)
        for vector in vectors[2:]:
            np.add(total, vector, out=total)

    times = alternately(lambda _: tree_sum(vectors), plain, rounds)
    return {
        "tree_ms": 1e3 * statistics.median(a for a, _ in times),
        "plain_ms": 1e3 * statistics.median(b for _, b in times),
        "share": statistics.median(b / a for a, b in times),
    }


def alternately(
    one: Callable[[int], object], other: Callable[[int], object], rounds: int
) -> list[tuple[float, float]]:
    """Seconds of the two in turn; the first round is not counted."""
    found = []
    for step in range(rounds + 1):
        row = []
        for call in (one, other):
            started = time.perf_counter()
            call(step)
            row.append(time.perf_counter() - started)
        found.append((row[0], row[1]))
    return found[1:]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a smoke run; writes nothing")
    given = parser.parse_args()
    os.chdir(Path(__file__).parent)  # workers find `driver:Null` in the working folder
    start = report.environment()
    sizes = (10_000,) if given.quick else (10_000, 100_000, 1_000_000, 10_000_000)
    steps = {
        name: {size: step(size, 3 if given.quick else 60, process) for size in sizes}
        for name, process in (("driver's step", Ready), ("null step", WorkerProcess))
    }
    for name, rows in steps.items():
        cells = [
            [f"{size:,}", f"{row['ours_ms']:.1f}", f"{row['by_hand_ms']:.1f}", f"{row['ratio']:.2f}"]
            for size, row in rows.items()
        ]
        print(report.table(["parameters", f"{name}, ms", "by hand, ms", "ratio"], cells), "\n")
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    sums = [
        {"millions": millions, "vectors": count, **aggregation(millions * 10**6, count, 5)}
        for millions in ((1,) if given.quick else MILLIONS)
        for count in VECTORS
        if 4e6 * millions * (count + 2) <= MOST_MEMORY * free
    ]
    cells = [
        [f"{row['millions']} M", str(row["vectors"]), f"{row['tree_ms']:.1f}", f"{row['share']:.2f}"]
        for row in sums
    ]
    print(report.table(["parameters", "shards", "tree, ms", "share of plain adds' bandwidth"], cells))
    report.write("driver", start, {"steps": steps, "aggregation": sums}, quick=given.quick)


if __name__ == "__main__":
    main()
