"""A job on clusters of several sizes under several strategies: costs found or measured, everything simulated."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from distmeta.config.job import Job
from distmeta.simulation.cluster import Cluster
from distmeta.simulation.costs import Costs, JobCosts, load, save
from distmeta.simulation.model import SAME_STEPS, Outcome, recommended, simulate, work_of

MANY = 1000
"""Workers that take seconds to simulate."""


@dataclass(frozen=True)
class Study:
    """What was asked, what it cost, what came out."""

    job: Job
    costs: Costs
    own: JobCosts
    cluster: Cluster
    """Of the first size; the others differ in their workers alone."""
    scaled: bool
    outcomes: dict[int, dict[str, Outcome]]
    """By workers, by strategy."""

    @property
    def recommended(self) -> dict[int, str]:
        return {workers: recommended(found) for workers, found in self.outcomes.items()}

    @property
    def same_steps(self) -> dict[int, str | None]:
        """The same among those whose steps are the driver's; None: none was asked about."""
        kept = {
            workers: {name: found[name] for name in SAME_STEPS if name in found}
            for workers, found in self.outcomes.items()
        }
        return {workers: recommended(found) if found else None for workers, found in kept.items()}


def study(
    job: Job,
    costs: Costs,
    own: JobCosts,
    cluster: Cluster,
    workers: Sequence[int],
    strategies: Sequence[str],
    scale: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Study:
    """Simulates each strategy on each number of workers; the cluster's own number is not looked at."""
    outcomes = {}
    for count in workers:
        if count >= MANY:
            say(f"simulating {count:,} workers …")
        work = work_of(job.run.tasks_per_step, own.shards, count, scale)
        here = replace(cluster, workers=count)
        outcomes[count] = {
            name: simulate(name, here, costs.machine, own, work, job.run.checkpoint_every or job.run.steps)
            for name in strategies
        }
    return Study(job, costs, own, replace(cluster, workers=workers[0]), scale, outcomes)


def costs_of(job: Job, path: Path, measure: bool, say: Callable[[str], None]) -> tuple[Costs, JobCosts]:
    """The machine's costs and the job's: measured (`--calibrate`) and written, or read.

    A job that the file lacks is measured in this process, which takes seconds and no Ray; the file has it from then on.
    """
    key = key_of(job)
    if measure:
        from distmeta.simulation.calibrate import calibrate

        costs, own = calibrate(job, say)
        costs = costs.with_job(key, own)
        save(costs, path)
        return costs, own
    costs = load(path)
    if key not in costs.jobs:
        from distmeta.simulation.calibrate import job_costs, problem_of

        say(f"{path} has no costs of this job: measuring its computations in this process …")
        costs = costs.with_job(key, job_costs(problem_of(job, say)))
        save(costs, path)
    return costs, costs.jobs[key]


def key_of(job: Job) -> str:
    """What a job's own computations depend on."""
    tree = job.to_dict()
    parts = [tree[name] for name in ("model", "tasks", "algorithm", "outer", "compute")]
    text = json.dumps([parts, job.run.tasks_per_step, job.run.shards], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
