"""One rank of a gloo group, without Ray: `python ranks.py RANK WORLD FOLDER` trains each job in FOLDER/jobs.json.

Writes what happened to FOLDER/rank-RANK.json, and each job's theta to FOLDER/NAME-RANK.npy.
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
from distmeta.runtime.problem import build_problem
from distmeta.runtime.resolve import resolve
from distmeta.strategies.all_reduce.messages import Abandoned
from distmeta.strategies.all_reduce.rank import GroupFailure, ReplicatedDriver

FAILING_CALL = 9
"""Which call on rank 1 fails, in the jobs `mistake` and `abandoned`."""


def train(name: str, tree: dict[str, Any], rank: int, folder: Path) -> dict[str, Any]:
    """Take all steps. A step that fails for the first time is taken again, as the driver would do."""
    problem = resolve(build_problem(Job.parse(tree)))
    replica = ReplicatedDriver(problem)
    records: list[dict[str, Any]] = []
    failures: list[str] = []
    step = 0
    check = disturb(name, replica, rank)
    while step < problem.job.run.steps and len(failures) < 2:
        before = replica.flat()
        try:
            records += replica.advance(problem, step, check)
            step += 1
        except (GroupFailure, NumericsError) as error:
            cause = error.failure.error if isinstance(error, GroupFailure) else error
            failures.append(f"{step}: {type(cause).__name__}")
            assert np.array_equal(replica.flat(), before), "no part of the step was taken"
    theta = replica.state().theta
    np.save(
        folder / f"{name}-{rank}.npy", np.concatenate([theta[key].numpy().ravel() for key in sorted(theta)])
    )
    gathered = replica.pool.gather(bytes(3000 * rank)) + replica.pool.gather(rank)
    sizes_and_ranks = [thing if isinstance(thing, int) else len(thing) for thing in gathered]
    return {"records": records, "failures": failures, "gathered": sizes_and_ranks}


def disturb(name: str, replica: ReplicatedDriver, rank: int) -> Callable[[], None]:
    """Make the 9th call on rank 1 fail, once: in the computation (`mistake`) or in the returned check (`abandoned`)."""
    calls = 0

    def fail_once(error: type[Exception]) -> None:
        nonlocal calls
        calls += 1
        if rank == 1 and calls == FAILING_CALL:
            raise error

    if name == "mistake":
        worker = replica.pool._worker
        compute = worker.compute

        def failing_compute(*arguments: Any) -> Any:
            fail_once(ZeroDivisionError)
            return compute(*arguments)

        worker.compute = failing_compute  # type: ignore[method-assign]
    if name == "abandoned":
        return lambda: fail_once(Abandoned)
    return lambda: None


def main() -> None:
    rank = int(sys.argv[1])
    world = int(sys.argv[2])
    folder = Path(sys.argv[3])
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    jobs = json.loads((folder / "jobs.json").read_text())
    found = {name: train(name, tree, rank, folder) for name, tree in jobs.items()}
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
