"""Vectorised against one task after the other, by kind and size of the model: what `compute.execution: auto` goes by.

    python benchmarks/execution.py [--quick]

MAML with one inner step in this process, one thread, the tasks of one shard; images are random, for their content does
not matter to the time. Both ways in turn; medians of the ratio of their processor seconds. Above 1 `vmap` is faster.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import report
import torch

from distmeta.compute.choose_execution import traits
from distmeta.compute.gradient import WHOLE_SHARD, Execution, shard_gradient
from distmeta.compute.memory import keep_freed
from distmeta.config.job import Job
from distmeta.runtime.problem import build, numerics_of
from distmeta.seeding import task_ids
from distmeta.tasks.image_preparation import Preparation
from distmeta.tasks.store import write_store

WAYS = (Execution("loop", 1), Execution("vmap", WHOLE_SHARD))
HIDDEN = (40, 256, 1000, 2000)
WIDTHS = (8, 16, 32, 64)
SIDES = (8, 28, 84)
TASKS = (2, 4, 16)
MOST = 2**26
"""Larger shards, by the numbers in a map as large as their images, are left out."""


def mlp(hidden: int, shots: int) -> dict[str, Any]:
    return {
        "model": {"type": "mlp", "hidden": [hidden, hidden]},
        "tasks": {"type": "sinusoid", "shots": shots, "queries": shots},
        "algorithm": {"type": "maml", "inner_lr": 0.01, "inner_steps": 1},
    }


def conv4(width: int, pool: str, store: str) -> dict[str, Any]:
    return {
        "model": {"type": "conv4", "width": width, "pool": pool},
        "tasks": {"type": "arrow", "path": store, "queries": 15},
        "algorithm": {"type": "maml", "inner_lr": 0.4, "inner_steps": 1},
    }


def image_store(folder: str, side: int) -> str:
    path = str(Path(folder) / f"{side}.arrow")
    pixels = np.random.default_rng(0).integers(0, 256, (60 * 20, 1, side, side), dtype=np.uint8)
    write_store(path, pixels, [str(k) for k in range(60)], [""] * 60, [20] * 60, Preparation(size=side))
    return path


def ratio(job: dict[str, Any], tasks: int, rounds: int) -> dict[str, float]:
    """Processor seconds of the loop over those of vmap."""
    problem = build(Job.parse({"name": "execution", "tracking": {"type": "none"}, **job}))
    theta, ids = problem.init(), task_ids(0, "train", 0, tasks)
    episodes = problem.family.draw("train", ids)

    def seconds(way: Execution) -> float:
        started = time.process_time()
        with numerics_of(problem.job, problem.device):
            shard_gradient(problem.algorithm, problem.score("train"), theta, episodes, ids, way, before=False)
        return time.process_time() - started

    rows = [[seconds(way) for way in WAYS] for _ in range(rounds + 1)][1:]
    found = traits(problem.model.module, episodes.query.x[0])
    return {
        "loop_ms": 1e3 * statistics.median(row[0] for row in rows),
        "ratio": statistics.median(row[0] / row[1] for row in rows),
        "largest_map": found.largest_map,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a smoke run; writes nothing")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed()
    start, found = report.environment(), []
    with tempfile.TemporaryDirectory() as folder:
        models = [
            (f"MLP {hidden}-{hidden}, {shots} shots", mlp(hidden, shots), 0)
            for hidden in HIDDEN
            for shots in (10, 100)
        ]
        for side in SIDES:
            store = image_store(folder, side)
            models += [
                (f"conv4-{width}, {pool}, {side}×{side}", conv4(width, pool, store), numbers)
                for width in WIDTHS
                for pool in ("stride", "max")
                if (numbers := width * side**2 * 80) * TASKS[0] <= MOST
            ]
        for name, job, numbers in models[:: 9 if given.quick else 1]:
            row = {"model": name}
            for tasks in TASKS[: 1 if given.quick else None]:
                if numbers * tasks <= MOST:
                    row |= {str(tasks): ratio(job, tasks, 1 if given.quick else given.rounds)}
            found.append(row)
            print(name, *(f"{row[str(n)]['ratio']:.2f}" for n in TASKS if str(n) in row), flush=True)
    cells = [
        [
            row["model"],
            f"{row[str(TASKS[0])]['largest_map']:,}",
            *(f"{row[str(n)]['ratio']:.2f}" if str(n) in row else "" for n in TASKS),
        ]
        for row in found
    ]
    print("\n" + report.table(["model", "largest map", *(f"{n} tasks" for n in TASKS)], cells))
    report.write("execution", start, {"rows": found}, given.quick)


if __name__ == "__main__":
    main()
