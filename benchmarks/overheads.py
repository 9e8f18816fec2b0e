"""What a whole step costs beside its gradient, and what distribution costs.

    python benchmarks/overheads.py [--only WORKLOAD ...] [--eager] [--store data/omniglot.arrow]

"step": the time of a whole step (draw tasks, gradient, Adam) over the time of the meta-gradient of episodes in memory,
in one process. "distribution": the rate of two Ray workers over the rate of two processes with half of the tasks each
that exchange nothing.

The two systems of a pair take turns in many short rounds, and each round starts with the other one. A row has the
median of the rounds' ratios and their quartiles, so that slow changes of the machine cancel.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from processes import step_in_two_processes
from raw_results import describe_environment, save_section
from systems import System, Workload, distmeta_gradient, distmeta_step, list_ways
from throughput import image_store, make_workloads, parse_arguments

MakePair = Callable[[ExitStack], tuple[System, System]]


def make_pairs(workload: Workload) -> Iterator[tuple[str, str, MakePair]]:
    """Yield the kind, the way, and a function that makes the two systems of each pair."""
    _, ways = list_ways(workload)
    for way in ways:

        def step_and_gradient(stack: ExitStack, way=way) -> tuple[System, System]:
            return distmeta_gradient(way, workload), distmeta_step(way, 0, workload, stack)

        def workers_and_processes(stack: ExitStack, way=way) -> tuple[System, System]:
            return distmeta_step(way, 2, workload, stack), step_in_two_processes(way, workload, stack)

        yield "step", way.name, step_and_gradient
        yield "distribution", way.name, workers_and_processes


def compare(first: System, second: System, rounds: int, seconds: float) -> dict[str, Any]:
    """Time both systems in each round, for about `seconds` each. The ratio is that of the second to the first."""
    systems = (first, second)
    calls = [max(1, round(seconds / system.seconds(1))) for system in systems]
    times: list[list[float]] = []
    for k in range(rounds):
        row = [0.0, 0.0]
        order = (0, 1) if k % 2 == 0 else (1, 0)
        for i in order:
            row[i] = systems[i].seconds(calls[i])
        times.append(row)
    torch.set_num_threads(1)
    ratios = [row[1] / row[0] for row in times]
    low, middle, high = statistics.quantiles(ratios, n=4) if rounds > 1 else ratios * 3
    return {
        "systems": [system.name for system in systems],
        "milliseconds": [1e3 * statistics.median(row[i] for row in times) for i in (0, 1)],
        "ratio": middle,
        "middle_half": [low, high],
        "calls_a_round": calls,
    }


def main() -> None:
    given = parse_arguments(str(__doc__), rounds=21, seconds=0.5)
    torch.set_num_threads(1)
    environment = describe_environment()
    with image_store(given.store) as (store, images):
        workloads = make_workloads(str(Path(store).absolute()), given.tasks)
        for name in given.only:
            rows = []
            for kind, way, make_systems in make_pairs(replace(workloads[name], compiled=not given.eager)):
                with ExitStack() as stack:
                    row = compare(*make_systems(stack), given.rounds, given.seconds)
                rows.append({"kind": kind, "way": way, **row})
            settings = {"rounds": given.rounds, "seconds_a_round": given.seconds, "images": images}
            save_section("overheads", name, environment, rows, given.quick, **settings)


if __name__ == "__main__":
    main()
