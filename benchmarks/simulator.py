"""The seconds per step that `distmeta simulate` predicts, against real runs of jobs that it was not calibrated on.

    python benchmarks/simulator.py [--repeats N] [--minutes M] [--jobs NAME …] [--claimed]

The machine's costs are measured with one job, as `distmeta simulate --calibrate` does. Every other job is predicted
with `--link local` and trained with 1, 2 and (only `driver`) 4 Ray workers. Measured: the median of `seconds_step` in
its metrics.jsonl without the first steps. With four workers on two cores no accuracy is claimed.

On a shared machine the speed changes within minutes. So a job's own computations are measured between the steps of its
training, and every round starts with a new calibration; a row has medians over rounds. Ray's workers run at the
priority of this process, so that other work slows both alike.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raw_results import describe_environment, save_section
from training import note

from distmeta.config.job import Job
from distmeta.runtime.problem import Problem
from distmeta.runtime.ray_cluster import connect
from distmeta.runtime.reporter import SilentReporter
from distmeta.runtime.training import train
from distmeta.simulation.calibrate import JobProbes, calibrate, prepare_problem
from distmeta.simulation.costs import JobCosts, MeasuredCosts
from distmeta.simulation.prediction import Scenario, choose_step_size, predict
from distmeta.simulation.settings import ClusterSettings, Link

WORKERS = (1, 2, 4)
CLAIMED_WORKERS = (1, 2)
SERVERS = 2
STRATEGIES: dict[str, dict[str, Any]] = {
    "driver": {},
    "sharded": {"type": "sharded", "servers": SERVERS},
    "all-reduce": {"type": "all-reduce"},
}
"""The job's `strategy` section of each. Only for these strategies are predictions claimed."""
SKIPPED_STEPS = 4
"""Steps at the beginning that do not count."""


def sinusoid(hidden: int, tasks: int, shards: int) -> dict[str, Any]:
    return {
        "model": {"type": "mlp", "hidden": [hidden, hidden]},
        "tasks": {"type": "sinusoid", "shots": 10, "queries": 10},
        "algorithm": {"type": "maml", "inner_lr": 0.01, "inner_steps": 3},
        "run": {"tasks_per_step": tasks, "shards": shards},
    }


CALIBRATION_JOB = sinusoid(256, 32, 8)
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


def make_job(tree: dict[str, Any], steps: int, strategy: dict[str, Any] | None = None, **run: Any) -> Job:
    quiet = {"steps": steps, "eval_every": 0, "checkpoint_every": 0, "cpus_per_worker": 0.5}
    whole = tree | {"name": "simulated", "tracking": {"type": "none"}, "run": tree["run"] | quiet | run}
    if strategy:
        whole["strategy"] = strategy
    return Job.parse(whole)


class MeasureBetweenSteps(SilentReporter):
    """A reporter that measures a job's own computations in this process after each step of a training."""

    def __init__(self, problem: Problem):
        self._probes = JobProbes(problem)
        self._seconds: dict[str, list[float]] = {name: [] for name in self._probes.by_name}

    def step(self, record: Mapping[str, Any]) -> None:
        for name, probe in self._probes.by_name.items():
            self._seconds[name].append(probe(record["step"]))

    def costs(self) -> JobCosts:
        medians = {name: statistics.median(row[SKIPPED_STEPS:]) for name, row in self._seconds.items()}
        return self._probes.to_costs(medians)


def measure_step(job: Job, reporter: SilentReporter) -> float:
    """Train and return the median seconds per step."""
    with tempfile.TemporaryDirectory() as folder:
        run = train(Job.parse(job.to_dict() | {"output": folder}), None, reporter).run
        lines = (run / "metrics.jsonl").read_text().splitlines()
    return statistics.median(json.loads(line)["seconds_step"] for line in lines[SKIPPED_STEPS:])


def run_round(
    steps: int, jobs: dict[str, dict[str, Any]], until: float, claimed: bool
) -> list[dict[str, Any]]:
    """Calibrate, then predict and measure every job. Nothing starts after `until`."""
    costs, _ = calibrate(make_job(CALIBRATION_JOB, 1, workers=1), note)
    rows = []
    for name, tree in jobs.items():
        for strategy in STRATEGIES:
            for workers in WORKERS if strategy == "driver" and not claimed else CLAIMED_WORKERS:
                if time.monotonic() > until:
                    return rows
                row = {"job": name, "strategy": strategy, "workers": workers}
                rows.append(row | compare(costs, tree, steps, strategy, workers))
    return rows


def compare(
    costs: MeasuredCosts, tree: dict[str, Any], steps: int, strategy: str, workers: int
) -> dict[str, Any]:
    """Return predicted and measured seconds per step."""
    reporter = MeasureBetweenSteps(prepare_problem(make_job(tree, steps)))
    measured = measure_step(make_job(tree, steps, STRATEGIES[strategy], workers=workers), reporter)
    job_costs = reporter.costs()
    cluster = ClusterSettings(workers, Link(None), servers=SERVERS)
    size = choose_step_size(tree["run"]["tasks_per_step"], job_costs.shards, workers, scale=False)
    predicted = predict(Scenario(strategy, cluster, costs.machine, job_costs, size)).seconds_step
    return {
        "parameters": job_costs.parameters,
        "predicted": predicted,
        "measured": measured,
        "ratio": predicted / measured,
    }


def take_medians(rounds: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    cells: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in (row for rows in rounds for row in rows):
        cells.setdefault((row["job"], row["strategy"], row["workers"]), []).append(row)
    found = []
    for same in cells.values():
        medians = {
            key: statistics.median(row[key] for row in same) for key in ("predicted", "measured", "ratio")
        }
        found.append(same[0] | medians | {"ratios": [row["ratio"] for row in same]})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a smoke run; writes nothing")
    parser.add_argument("--jobs", nargs="+", choices=list(JOBS), default=list(JOBS), help="some of the jobs")
    parser.add_argument("--claimed", action="store_true", help="only with 1 and 2 workers")
    parser.add_argument("--repeats", type=int, default=3, help="rounds")
    parser.add_argument("--minutes", type=float, default=60.0, help="nothing starts after that")
    given = parser.parse_args()
    environment = describe_environment()
    os.chdir(Path(__file__).parents[1])
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - Ray's own spelling; by default other work goes first
    import ray

    leave = connect(ray, None, max(WORKERS))
    jobs = {name: JOBS[name] for name in (["many shards"] if given.quick else given.jobs)}
    steps = 8 if given.quick else 20
    until = time.monotonic() + 60 * given.minutes
    rounds = []
    try:
        for _ in range(1 if given.quick else given.repeats):
            if time.monotonic() < until:
                rounds.append(run_round(steps, jobs, until, given.claimed))
    finally:
        leave()
    rows = take_medians(rounds)
    save_section("simulator", "local", environment, rows, given.quick, rounds=len(rounds))


if __name__ == "__main__":
    main()
