"""Compare strategies for a job on clusters of several sizes. The costs are read from a file or measured."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from distmeta.config.job import Job
from distmeta.simulation.costs import JobCosts, MeasuredCosts, load_costs, save_costs
from distmeta.simulation.prediction import (
    SAME_STEPS,
    Prediction,
    Scenario,
    choose_step_size,
    predict,
    recommend,
)
from distmeta.simulation.settings import ClusterSettings

REPORTED_WORKERS = 1000
"""So many workers take seconds to simulate, which is reported."""


@dataclass(frozen=True)
class StrategyComparison:
    """What was asked, the costs, and the predictions."""

    job: Job
    costs: MeasuredCosts
    job_costs: JobCosts
    settings: ClusterSettings
    """Of the first size. The others differ only in their workers."""
    scaled: bool
    predictions: dict[int, dict[str, Prediction]]
    """By number of workers, then by strategy."""

    @property
    def recommended(self) -> dict[int, str]:
        """The recommended strategy for each number of workers."""
        return {workers: recommend(by_strategy) for workers, by_strategy in self.predictions.items()}

    @property
    def recommended_same_steps(self) -> dict[int, str | None]:
        """The same among strategies that take the driver's steps; None if none of those was asked for."""
        found: dict[int, str | None] = {}
        for workers, by_strategy in self.predictions.items():
            same = {name: by_strategy[name] for name in SAME_STEPS if name in by_strategy}
            found[workers] = recommend(same) if same else None
        return found


def compare_strategies(
    job: Job,
    costs: MeasuredCosts,
    job_costs: JobCosts,
    settings: ClusterSettings,
    workers: Sequence[int],
    strategies: Sequence[str],
    scale: bool = False,
    report: Callable[[str], None] = lambda text: None,
) -> StrategyComparison:
    """Simulate each strategy with each number of workers. `settings.workers` is ignored."""
    checkpoint_every = job.run.checkpoint_every or job.run.steps
    predictions = {}
    for count in workers:
        if count >= REPORTED_WORKERS:
            report(f"simulating {count:,} workers …")
        size = choose_step_size(job.run.tasks_per_step, job_costs.shards, count, scale)
        here = replace(settings, workers=count)
        predictions[count] = {
            name: predict(Scenario(name, here, costs.machine, job_costs, size), checkpoint_every)
            for name in strategies
        }
    first = replace(settings, workers=workers[0])
    return StrategyComparison(job, costs, job_costs, first, scale, predictions)


def find_costs(
    job: Job, path: Path, measure: bool, report: Callable[[str], None]
) -> tuple[MeasuredCosts, JobCosts]:
    """Return the costs of the machine and of the job.

    With `measure` both are measured and written to the file. Otherwise they are read from it. If the file lacks the
    job, its computations are measured in this process, which takes seconds and no Ray, and added to the file.
    """
    key = fingerprint_job(job)
    if measure:
        from distmeta.simulation.calibrate import calibrate

        costs, job_costs = calibrate(job, report)
        costs = costs.with_job(key, job_costs)
        save_costs(costs, path)
        return costs, job_costs
    costs = load_costs(path)
    if key not in costs.jobs:
        from distmeta.simulation.calibrate import measure_job, prepare_problem

        report(f"{path} has no costs of this job: measuring its computations in this process …")
        costs = costs.with_job(key, measure_job(prepare_problem(job, report)))
        save_costs(costs, path)
    return costs, costs.jobs[key]


def fingerprint_job(job: Job) -> str:
    """Return a hash of what a job's own computations depend on."""
    tree = job.to_dict()
    parts = [tree[name] for name in ("model", "tasks", "algorithm", "outer", "compute")]
    text = json.dumps([parts, job.run.tasks_per_step, job.run.shards], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
