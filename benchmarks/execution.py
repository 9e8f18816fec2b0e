"""Vectorised shards against a loop over tasks, by kind and size of the model: the basis of `compute.execution: auto`.

    python benchmarks/execution.py

MAML with one inner step in this process with one thread, all tasks in one shard. Images are random, since their content
does not change the time. Both ways take turns. A row has the median ratio of their processor seconds; above 1 `vmap` is
faster.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from raw_results import describe_environment, save_section

from distmeta.compute.execution import WHOLE_SHARD, Execution, shard_gradient
from distmeta.compute.inspection import inspect_model
from distmeta.compute.memory import keep_freed_memory
from distmeta.config.job import Job
from distmeta.runtime.problem import apply_job_numerics, build_problem
from distmeta.seeding import task_ids
from distmeta.tasks.image_preparation import Preparation
from distmeta.tasks.store import write_store

LOOP = Execution("loop", 1)
VECTORISED = Execution("vmap", WHOLE_SHARD)
HIDDEN = (40, 256, 1000, 2000)
WIDTHS = (8, 16, 32, 64)
SIDES = (8, 28, 84)
TASKS = (2, 4, 16)
QUERIES = 15
LARGEST_SHARD = 2**26
"""Elements of a shard's feature maps at full resolution. Larger shards are left out."""


class Case(NamedTuple):
    title: str
    job: dict[str, Any]
    elements: int
    """Elements of one task's feature map at full resolution; 0 for an MLP."""


def mlp_case(hidden: int, shots: int) -> Case:
    job = {
        "model": {"type": "mlp", "hidden": [hidden, hidden]},
        "tasks": {"type": "sinusoid", "shots": shots, "queries": shots},
        "algorithm": {"type": "maml", "inner_lr": 0.01, "inner_steps": 1},
    }
    return Case(f"MLP {hidden}-{hidden}, {shots} shots", job, 0)


def conv4_case(width: int, pool: str, side: int, store: str) -> Case:
    job = {
        "model": {"type": "conv4", "width": width, "pool": pool},
        "tasks": {"type": "arrow", "path": store, "queries": QUERIES},
        "algorithm": {"type": "maml", "inner_lr": 0.4, "inner_steps": 1},
    }
    images = 5 * (QUERIES + 1)
    return Case(f"conv4-{width}, {pool}, {side}×{side}", job, width * side**2 * images)


def make_cases(folder: str) -> list[Case]:
    cases = [mlp_case(hidden, shots) for hidden in HIDDEN for shots in (10, 100)]
    for side in SIDES:
        store = write_random_images(folder, side)
        cases += [conv4_case(width, pool, side, store) for width in WIDTHS for pool in ("stride", "max")]
    return [case for case in cases if case.elements * TASKS[0] <= LARGEST_SHARD]


def write_random_images(folder: str, side: int) -> str:
    path = str(Path(folder) / f"{side}.arrow")
    pixels = np.random.default_rng(0).integers(0, 256, (60 * 20, 1, side, side), dtype=np.uint8)
    write_store(path, pixels, [str(k) for k in range(60)], [""] * 60, [20] * 60, Preparation(size=side))
    return path


def measure(case: Case, tasks: int, rounds: int) -> dict[str, Any]:
    """Return the processor seconds of the loop over those of vmap, and the largest feature map of the query set."""
    problem = build_problem(Job.parse({"name": "execution", "tracking": {"type": "none"}, **case.job}))
    theta = problem.init()
    ids = task_ids(0, "train", 0, tasks)
    episodes: Any = problem.family.draw("train", ids)
    score = problem.score("train")

    def processor_seconds(execution: Execution) -> float:
        started = time.process_time()
        with apply_job_numerics(problem.job, problem.device):
            shard_gradient(problem.algorithm, score, theta, episodes, ids, execution, before=False)
        return time.process_time() - started

    pairs = [(processor_seconds(LOOP), processor_seconds(VECTORISED)) for _ in range(rounds + 1)][1:]
    traits = inspect_model(problem.model.module, episodes.query.x[0])
    return {
        "model": case.title,
        "tasks": tasks,
        "loop_ms": 1e3 * statistics.median(loop for loop, _ in pairs),
        "ratio": statistics.median(loop / vectorised for loop, vectorised in pairs),
        "largest_feature_map": traits.largest_feature_map,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a smoke run; writes nothing")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    environment = describe_environment()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for case in make_cases(folder)[:: 9 if given.quick else 1]:
            for tasks in TASKS[: 1 if given.quick else None]:
                if case.elements * tasks <= LARGEST_SHARD:
                    rows.append(measure(case, tasks, 1 if given.quick else given.rounds))
                    print(rows[-1], flush=True)
    save_section("execution", "cpu", environment, rows, given.quick)


if __name__ == "__main__":
    main()
