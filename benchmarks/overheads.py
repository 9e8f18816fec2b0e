"""What a whole step costs beside its gradient, and what distribution costs: two systems in turn, in many short rounds.

    python benchmarks/overheads.py [--quick] [--only WORKLOAD ...] [--eager] [--store data/omniglot.arrow]

"step": the time of a whole step (tasks drawn, gradient, Adam) over that of the meta-gradient of episodes in memory, in
one process. "distribution": the rate of two Ray workers over that of two processes with half of the tasks each and
nothing between them.

A ratio is of two times in one round; whichever was first comes second in the next round. Medians over the rounds, and
the middle half: the machine's own noise is between rounds rather than in them.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import report
import torch
from processes import independent
from systems import System, Way, Workload, distmeta_gradient, distmeta_step, ways_of
from throughput import image_store, workloads


def pairs(workload: Workload) -> Iterator[tuple[str, Callable[[ExitStack], tuple[System, System]]]]:
    """What is compared: how the two are made. Its ratio: the time of the second over that of the first."""
    for way in ways_of(workload)[1]:
        yield f"step, {way.name}", partial(_step_and_gradient, way, workload)
        yield f"distribution, {way.name}", partial(_workers_and_processes, way, workload)


def _step_and_gradient(way: Way, workload: Workload, stack: ExitStack) -> tuple[System, System]:
    return distmeta_gradient(way, workload), distmeta_step(way, 0, workload, stack)


def _workers_and_processes(way: Way, workload: Workload, stack: ExitStack) -> tuple[System, System]:
    return distmeta_step(way, 2, workload, stack), independent(way, workload, stack)


def compare(first: System, second: System, rounds: int, seconds: float) -> dict[str, Any]:
    """Times both in each round, `seconds` each."""
    both = (first, second)
    calls = [max(1, round(seconds / system.seconds(1))) for system in both]
    times = []
    for k in range(rounds):
        row = [0.0, 0.0]
        for i in (0, 1) if k % 2 == 0 else (1, 0):
            row[i] = both[i].seconds(calls[i])
        times.append(row)
    torch.set_num_threads(1)
    ratios = [b / a for a, b in times]
    low, middle, high = statistics.quantiles(ratios, n=4) if rounds > 1 else ratios * 3
    return {
        "systems": [system.name for system in both],
        "milliseconds": [1e3 * statistics.median(column) for column in zip(*times, strict=True)],
        "ratio": middle,
        "middle_half": [low, high],
        "calls_a_round": calls,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = list(workloads(""))
    parser.add_argument("--quick", action="store_true", help="a smoke run with 4 tasks; writes nothing")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="some of the workloads")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--seconds", type=float, default=0.5, help="of one system in one round, at least")
    parser.add_argument("--store", default="data/omniglot.arrow", help="random images where there is none")
    parser.add_argument("--eager", action="store_true", help="without what is compiled, which takes minutes")
    given = parser.parse_args()
    rounds, seconds = (1, 0.01) if given.quick else (given.rounds, given.seconds)
    torch.set_num_threads(1)
    start, found, rows = report.environment(), dict[str, Any](), []
    with image_store(given.store) as (store, images):
        chosen = workloads(str(Path(store).absolute()), 4 if given.quick else None)
        for name in given.only:
            for title, made in pairs(replace(chosen[name], compiled=not given.eager)):
                with ExitStack() as stack:
                    row = compare(*made(stack), rounds, seconds)
                print(f"{name}, {title}: {row['ratio']:.3f}", flush=True)
                found[f"{name}, {title}"] = row
                low, high = row["middle_half"]
                times = " and ".join(f"{one:,.2f}" for one in row["milliseconds"])
                rows.append(
                    [chosen[name].title, title, times, f"{row['ratio']:.2f}", f"{low:.2f}–{high:.2f}"]
                )
    print("\n" + report.table(["workload", "what", "ms", "ratio", "middle half"], rows))
    name = "overheads" if given.only == names else "overheads-" + "-".join(given.only)
    settings = {"rounds": rounds, "seconds_a_round": seconds, "images": images}
    report.write(name, start, {"settings": settings, "pairs": found}, given.quick)


if __name__ == "__main__":
    main()
