"""What `distmeta simulate` says a step takes, against what it took, on jobs that it was not calibrated on.

    python benchmarks/simulator.py [--quick] [--repeats N] [--minutes M] [--wait SECONDS] [--jobs NAME …] [--claimed]

The machine's costs are measured with one job, as `--calibrate` does. Each of the others is then measured in this
process alone, as `distmeta simulate` does with a job that its costs file lacks; predicted with `--link local`; and
trained for real, with 1, 2 and 4 Ray workers: the median of `seconds_step` in its metrics.jsonl, without the first
steps. Four workers share two cores here: reported, not claimed.

A machine that others share is half as fast again from one minute to the next. So a job's own computations are measured
between the steps of its training, in turn with them; a round begins with a calibration of its own; figures are medians
over rounds. `--wait`: at most so long, altogether, for the machine to be idle before a measurement.
`--minutes`: no measurement begins after that; what was not begun is left out. Ray's workers run at this process's
priority, so that what else runs on the machine slows both alike.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import report

from distmeta.config.job import Job
from distmeta.runtime import training as driver
from distmeta.runtime.problem import Problem
from distmeta.runtime.ray_cluster import connect
from distmeta.simulation.calibrate import Probes, calibrate, problem_of
from distmeta.simulation.cluster import Cluster, Link
from distmeta.simulation.costs import Costs, JobCosts
from distmeta.simulation.model import simulate, work_of

WORKERS = (1, 2, 4)
CLAIMED = (1, 2)
SERVERS = 2
STRATEGIES: dict[str, dict[str, Any]] = {
    "driver": {},
    "sharded": {"strategy": "sharded", "servers": SERVERS},
    "all-reduce": {"strategy": "all-reduce"},
}
"""What a run of each has in its job: those whose steps are claimed to be predicted."""
SKIPPED = 4
"""Steps at the beginning that are not counted."""
IDLE = 0.9
"""Of all cores, for the machine to count as quiet."""


def sinusoid(hidden: int, tasks: int, shards: int) -> dict[str, Any]:
    return {
        "model": {"type": "mlp", "hidden": [hidden, hidden]},
        "tasks": {"type": "sinusoid", "shots": 10, "queries": 10},
        "algorithm": {"type": "maml", "inner_lr": 0.01, "inner_steps": 3},
        "run": {"tasks_per_step": tasks, "shards": shards},
    }


CALIBRATED = sinusoid(256, 32, 8)
JOBS: dict[str, dict[str, Any]] = {
    "wide": sinusoid(1000, 32, 8),
    "conv4": {
        "model": {"type": "conv4", "width": 16},
        "tasks": {"type": "digits", "ways": 3, "shots": 1, "queries": 5},
        "algorithm": {"type": "maml", "inner_lr": 0.1, "inner_steps": 1},
        "run": {"tasks_per_step": 16, "shards": 8},
    },
    "wider": sinusoid(2000, 16, 4),
    "many shards": sinusoid(128, 64, 16),
}


def job_of(tree: dict[str, Any], steps: int, **run: Any) -> Job:
    quiet = {"steps": steps, "eval_every": 0, "checkpoint_every": 0, "cpus_per_worker": 0.5}
    whole = tree | {"name": "simulated", "tracking": {"type": "none"}, "run": tree["run"] | quiet | run}
    return Job.parse(whole)


class Beside(driver.Silent):
    """Measures a job's computations in this process after each step of a training."""

    def __init__(self, problem: Problem):
        self._probes = Probes(problem)
        self._seconds: dict[str, list[float]] = {name: [] for name in self._probes.each}

    def step(self, record: Mapping[str, Any]) -> None:
        for name, probe in self._probes.each.items():
            self._seconds[name].append(probe(record["step"]))

    def costs(self) -> JobCosts:
        return self._probes.costs({k: statistics.median(row[SKIPPED:]) for k, row in self._seconds.items()})


def measured(job: Job, beside: Beside) -> float:
    """The median of `seconds_step` of a real training."""
    with tempfile.TemporaryDirectory() as folder:
        run = driver.train(Job.parse(job.tree() | {"output": folder}), None, beside).run
        lines = (run / "metrics.jsonl").read_text().splitlines()
    return statistics.median(json.loads(line)["seconds_step"] for line in lines[SKIPPED:])


def one_round(
    steps: int, quiet: Callable[[], float], jobs: dict[str, dict[str, Any]], until: float, claimed: bool
) -> list[dict[str, Any]]:
    quiet()
    costs, _ = calibrate(job_of(CALIBRATED, 1, workers=1), said)
    rows = []
    for name, tree in jobs.items():
        for strategy, settings in STRATEGIES.items():
            for workers in WORKERS if strategy == "driver" and not claimed else CLAIMED:
                if time.monotonic() > until:
                    return rows
                idle = quiet()
                row = cell(costs, tree, steps, strategy, workers, settings)
                rows.append(
                    {"job": name, "strategy": strategy, "workers": workers, "idle_before": idle} | row
                )
                said(f"{name}, {strategy}, {workers} workers: {row}")
    return rows


def cell(
    costs: Costs,
    tree: dict[str, Any],
    steps: int,
    strategy: str,
    workers: int,
    settings: dict[str, Any],
) -> dict[str, Any]:
    beside = Beside(problem_of(job_of(tree, steps)))
    took = measured(job_of(tree, steps, workers=workers, **settings), beside)
    own, cluster = beside.costs(), Cluster(workers, Link(None), servers=SERVERS)
    work = work_of(tree["run"]["tasks_per_step"], own.shards, workers, scale=False)
    predicted = simulate(strategy, cluster, costs.machine, own, work).seconds_step
    return {
        "parameters": own.parameters,
        "predicted": predicted,
        "measured": took,
        "ratio": predicted / took,
    }


def idle_share(seconds: float = 2.0) -> float:
    """Of the machine's cores, over some seconds."""

    def read() -> list[int]:
        return [int(word) for word in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]

    before = read()
    time.sleep(seconds)
    spent = [b - a for a, b in zip(before, read(), strict=True)]
    return (spent[3] + spent[4]) / max(sum(spent), 1)


def waiting(most: float) -> Callable[[], float]:
    left = [most]

    def quiet() -> float:
        idle = idle_share()
        while idle < IDLE and left[0] > 0:
            idle = idle_share()
            left[0] -= 2.0
        return round(idle, 2)

    return quiet


def summary(rounds: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Medians over the rounds."""
    found: list[dict[str, Any]] = []
    cells: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in (row for rows in rounds for row in rows):
        cells.setdefault((row["job"], row["strategy"], row["workers"]), []).append(row)
    for same in cells.values():
        figures = {
            key: statistics.median(row[key] for row in same)
            for key in ("predicted", "measured", "ratio", "idle_before")
        }
        names = {key: same[0][key] for key in ("job", "parameters", "strategy", "workers")}
        found.append(names | figures | {"ratios": [row["ratio"] for row in same]})
    return found


def said(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a smoke run; writes nothing")
    parser.add_argument("--jobs", nargs="+", choices=list(JOBS), default=list(JOBS), help="some of the jobs")
    parser.add_argument("--claimed", action="store_true", help="with 1 and 2 workers alone")
    parser.add_argument("--repeats", type=int, default=3, help="rounds")
    parser.add_argument("--wait", type=float, default=0.0, help="seconds, at most, for a quiet machine")
    parser.add_argument("--minutes", type=float, default=60.0, help="after which nothing more is begun")
    given = parser.parse_args()
    start = report.environment()
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - its name; at 15, others go first on a busy machine
    import ray

    leave = connect(ray, None, max(WORKERS))
    jobs = {"many shards": JOBS["many shards"]} if given.quick else {name: JOBS[name] for name in given.jobs}
    steps = 8 if given.quick else 20
    rounds, until, quiet = [], time.monotonic() + 60 * given.minutes, waiting(given.wait)
    try:
        for _ in range(1 if given.quick else given.repeats):
            if time.monotonic() < until:
                rounds.append(one_round(steps, quiet, jobs, until, given.claimed))
    finally:
        leave()
    rows = summary(rounds)
    cells = [
        [
            row["job"], f"{row['parameters']:,}", row["strategy"], str(row["workers"]),
            f"{1e3 * row['predicted']:.1f}", f"{1e3 * row['measured']:.1f}", f"{row['ratio']:.2f}",
        ]
        for row in rows
    ]  # fmt: skip
    header = [
        "job",
        "parameters",
        "strategy",
        "workers",
        "predicted, ms",
        "measured, ms",
        "ratio",
    ]
    print(report.table(header, cells))
    claimed = [row["ratio"] for row in rows if row["workers"] in CLAIMED]
    within = sum(abs(ratio - 1) <= 0.2 for ratio in claimed)
    print(f"\nwithin 20 %: {within} of {len(claimed)} with 1 or 2 workers")
    report.write("simulator", start, {"steps": rows, "rounds": len(rounds)}, quick=given.quick)


if __name__ == "__main__":
    os.chdir(Path(__file__).parents[1])
    main()
