"""One rank of a gloo group, without Ray: `python ranks.py RANK WORLD FOLDER`, for each job of FOLDER/jobs.json.

Writes what came of them to FOLDER/rank-RANK.json, and theta to FOLDER/NAME-RANK.npy.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import distributed

from distmeta.config.job import Job
from distmeta.errors import NumericsError
from distmeta.runtime.problem import build
from distmeta.runtime.resolve import resolve
from distmeta.strategies.all_reduce.group import Abandoned
from distmeta.strategies.all_reduce.rank import Agreed, Replicated


def run(name: str, tree: dict[str, Any], rank: int, folder: Path) -> dict[str, Any]:
    """All steps; where one is stopped for the first time, it is taken again, as a driver would."""
    problem = resolve(build(Job.parse(tree)))
    replica = Replicated(problem)
    records, stops, step = [], [], 0
    check = trouble(name, replica, rank)
    while step < problem.job.run.steps and len(stops) < 2:
        before = replica.flat()
        try:
            records += replica.advance(problem, step, check)
            step += 1
        except (Agreed, NumericsError) as error:
            cause = error.failure.error if isinstance(error, Agreed) else error
            stops.append(f"{step}: {type(cause).__name__}")
            assert np.array_equal(replica.flat(), before), "nothing of the step was taken"
    theta = replica.state().theta
    np.save(
        folder / f"{name}-{rank}.npy", np.concatenate([theta[key].numpy().ravel() for key in sorted(theta)])
    )
    things = replica.ranks._gathered(bytes(3000 * rank)) + replica.ranks._gathered(rank)
    return {
        "records": records,
        "stops": stops,
        "gathered": [t if isinstance(t, int) else len(t) for t in things],
    }


def trouble(name: str, replica: Replicated, rank: int) -> Callable[[], None]:
    """What the job's name asks for, once, on rank 1: a mistake in its computation, or an interruption seen there."""
    left = [9] if rank == 1 and name in ("mistake", "halted") else []

    def count(error: type[Exception]) -> None:
        if left:
            left[0] -= 1
            if not left[0]:
                left.clear()
                raise error

    if name == "mistake":
        compute = replica.ranks._worker.compute

        def failing(*words: Any) -> Any:
            count(ZeroDivisionError)
            return compute(*words)

        replica.ranks._worker.compute = failing  # type: ignore[method-assign]
    return (lambda: count(Abandoned)) if name == "halted" else lambda: None


def main() -> None:
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    jobs = json.loads((folder / "jobs.json").read_text())
    found = {name: run(name, tree, rank, folder) for name, tree in jobs.items()}
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
