"""Measure the costs of this machine and of a job, with the job's own parts and the runtime's own pool."""

from __future__ import annotations

import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from distmeta.compute.vectors import Layout
from distmeta.config.job import Job, remove_workers
from distmeta.runtime.parameter_server import ParameterServer, mean_metrics
from distmeta.runtime.pool import open_pool
from distmeta.runtime.problem import Problem
from distmeta.runtime.ray_cluster import connect, import_ray
from distmeta.runtime.shards import Pool, Shard, ShardResult
from distmeta.runtime.startup import resolve_job
from distmeta.runtime.worker import LocalPool, plan_shards
from distmeta.simulation.costs import JobCosts, MachineCosts, MeasuredCosts
from distmeta.simulation.transfers import TransferCosts, measure_transfers

ROUNDS = 9
"""Rounds of a measurement, after a first one that does not count."""
MIN_SECONDS = 1.0
"""A measurement takes further rounds until then."""
MAX_SECONDS = 3.0
"""After that a measurement ends with fewer rounds, but with at least three."""
MAX_WORKERS = 4
"""The slowdown is measured with at most so many workers at the same time."""
FEW_SHARDS = 2
MANY_SHARDS = 8


class StepOverheads(NamedTuple):
    """What a step takes besides its computations, in seconds."""

    per_step: float
    per_shard: float
    driver_per_shard: float
    """Processor time of the driver."""


def calibrate(job: Job, report: Callable[[str], None]) -> tuple[MeasuredCosts, JobCosts]:
    """Measure the costs of this machine, and of the job on it.

    Raises:
        InputError: the job's parts do not fit together, or Ray has no room for a worker.
    """
    problem = prepare_problem(job, report)
    report("measuring the job's computations in this process …")
    job_costs = measure_job(problem)
    run = problem.job.run
    ray = import_ray(run.address)
    leave = connect(ray, run.address, math.ceil(MAX_WORKERS * run.cpus_per_worker))
    try:
        report("measuring Ray's object store …")
        transfers = measure_transfers(ray)
        slowdown: list[float] = []
        overheads = StepOverheads(0.0, 0.0, 0.0)
        start = 0.0
        for workers in range(1, count_workers(ray, problem) + 1):
            report(f"measuring {workers} Ray worker{'s' * (workers > 1)} …")
            with start_pool(problem, workers) as (pool, seconds):
                slowdown.append(measure_slowdown(pool, problem))
                if workers == 1:
                    overheads = measure_overheads(pool, problem)
                    start = seconds
    finally:
        leave()
    machine = combine_costs(job_costs.bytes, transfers, overheads, slowdown, start)
    about = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{platform.node()}, {platform.machine()}, {count_cores()} cores",
        "job": job.name,
    }
    return MeasuredCosts(machine, about=about), job_costs


def combine_costs(
    size: float, transfers: TransferCosts, overheads: StepOverheads, slowdown: list[float], start: float
) -> MachineCosts:
    """Subtract from the overheads of a step what moving its vectors of `size` bytes takes."""
    call = max(overheads.per_shard - transfers.reply(size), 0.0)
    return MachineCosts(
        call=call,
        call_driver=min(overheads.driver_per_shard, call),
        step=max(overheads.per_step - transfers.put(size) - transfers.receive(size), 0.0),
        slowdown=tuple(slowdown),
        cores=count_cores(),
        start=start,
        **transfers._asdict(),
    )


def count_workers(ray: Any, problem: Problem) -> int:
    """Return how many workers to measure at the same time: as many as the machine has room for, at most four."""
    run = problem.job.run
    resources = ray.cluster_resources()
    needs = {"CPU": run.cpus_per_worker, "GPU": run.gpus_per_worker}
    room = min(int(resources.get(kind, 0) // needed) for kind, needed in needs.items() if needed)
    return max(min(count_cores(), room, MAX_WORKERS), 1)


def count_cores() -> int:
    """Return the number of cores that this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def prepare_problem(job: Job, report: Callable[[str], None] = lambda text: None) -> Problem:
    """Return the job's problem, resolved, to compute in this process."""
    tree = remove_workers(job.to_dict())
    run = tree["run"] | {"eval_every": 0, "patience": None}
    return resolve_job(Job.parse(tree | {"run": run}), report)


def measure_job(problem: Problem) -> JobCosts:
    """Measure what the job's computations take in this process."""
    probes = JobProbes(problem)
    return probes.to_costs({name: take_median(probe) for name, probe in probes.by_name.items()})


class JobProbes:
    """Measure a shard of the job's size, one of another size, and the outer step.

    The two shards give a line: the cost of a shard and of a task.
    """

    def __init__(self, problem: Problem):
        self._problem = problem
        theta = problem.init()
        self._layout = Layout.from_theta(theta)
        self._pool = LocalPool(problem, self._layout)
        self._flat = self._layout.flatten(theta)
        self.server = ParameterServer(theta, problem.job.outer)
        self._gradient = np.full(self._layout.size, 1e-8, np.float32)
        group = problem.algorithm.group_size
        job_size = count_shard_tasks(problem)
        half = job_size // 2 // group * group
        self._small = half or job_size
        self._large = job_size if half else 2 * job_size
        self.by_name: dict[str, Callable[[int], float]] = {
            "small": partial(self._compute_shard, self._small),
            "large": partial(self._compute_shard, self._large),
            "outer": self._step,
        }
        """Each computes what belongs to a step, given its number, and returns the seconds."""

    def _compute_shard(self, tasks: int, step: int) -> float:
        plan = plan_train_shards(self._problem, step, tasks, 1)
        return sum_busy_seconds(self._pool.map(self._flat, plan, check_nothing))

    def _step(self, step: int) -> float:
        started = time.perf_counter()
        mean = self._gradient / np.float32(self._large)
        np.isfinite(mean).all()
        self.server.step(mean)
        self.server.flat()
        return time.perf_counter() - started

    def to_costs(self, seconds: Mapping[str, float]) -> JobCosts:
        """Return the job's costs from the seconds of each probe."""
        task = max((seconds["large"] - seconds["small"]) / (self._large - self._small), 0.0)
        shards = self._problem.job.run.shards
        assert shards is not None, "resolved"
        shard = max(seconds["large"] - task * self._large, 0.0)
        return JobCosts(self._layout.parameters, shards, shard, task, seconds["outer"])


def take_median(measure: Callable[[int], float]) -> float:
    """Return the median seconds of several rounds. `measure` is given the number of the round."""
    measure(0)
    found: list[float] = []
    started = time.perf_counter()
    while True:
        found.append(measure(len(found) + 1))
        count = len(found)
        elapsed = time.perf_counter() - started
        if (count >= ROUNDS and elapsed > MIN_SECONDS) or (count >= 3 and elapsed > MAX_SECONDS):
            return median(found)


@contextmanager
def start_pool(problem: Problem, workers: int) -> Iterator[tuple[Pool, float]]:
    """Start a pool of the runtime. Yield it with the seconds until it was ready."""
    started = time.perf_counter()
    job = problem.job.replace(run={"workers": workers})
    layout = Layout.from_theta(problem.init())
    pool = open_pool(replace(problem, job=job), layout, lambda text: None)
    try:
        yield pool, time.perf_counter() - started
    finally:
        pool.close()


def measure_slowdown(pool: Pool, problem: Problem) -> float:
    """Return the seconds of a shard with all workers of the pool at work over its seconds in this process.

    Both take turns, since the machine may become busier.
    """
    tasks = count_shard_tasks(problem)
    theta = problem.init()
    layout = Layout.from_theta(theta)
    flat = layout.flatten(theta)
    local_pool = LocalPool(problem, layout)
    shards = 2 * pool.size
    here: list[float] = []

    def measure(step: int) -> float:
        one_shard = plan_train_shards(problem, step, tasks, 1)
        here.append(sum_busy_seconds(local_pool.map(flat, one_shard, check_nothing)))
        all_shards = plan_train_shards(problem, step, shards * tasks, shards)
        return sum_busy_seconds(pool.map(flat, all_shards, check_nothing)) / shards

    in_workers = take_median(measure)
    return in_workers / median(here[1:])


def measure_overheads(pool: Pool, problem: Problem) -> StepOverheads:
    """Measure what one worker's steps take besides computing, from steps with few and with many minimal shards."""
    group = problem.algorithm.group_size
    theta = problem.init()
    flat = Layout.from_theta(theta).flatten(theta)
    waiting: dict[int, list[float]] = {FEW_SHARDS: [], MANY_SHARDS: []}
    driver: dict[int, list[float]] = {FEW_SHARDS: [], MANY_SHARDS: []}
    for step in range(2 * ROUNDS):
        for shards in (FEW_SHARDS, MANY_SHARDS):
            started = time.perf_counter()
            driver_started = time.thread_time()
            plan = plan_train_shards(problem, step, shards * group, shards)
            results = pool.map(flat, plan, check_nothing)
            mean_metrics(results)
            elapsed = time.perf_counter() - started
            driver_elapsed = time.thread_time() - driver_started
            if step:
                waiting[shards].append(elapsed - sum_busy_seconds(results))
                driver[shards].append(driver_elapsed)
    more = MANY_SHARDS - FEW_SHARDS
    few_wait = median(waiting[FEW_SHARDS])
    per_shard = max((median(waiting[MANY_SHARDS]) - few_wait) / more, 0.0)
    driver_per_shard = max((median(driver[MANY_SHARDS]) - median(driver[FEW_SHARDS])) / more, 0.0)
    return StepOverheads(few_wait - FEW_SHARDS * per_shard, per_shard, driver_per_shard)


def plan_train_shards(problem: Problem, step: int, tasks: int, shards: int) -> list[Shard]:
    return plan_shards(problem, "train", step, tasks, shards, problem.algorithm.inner_steps)


def count_shard_tasks(problem: Problem) -> int:
    """Return the tasks of the job's largest shard."""
    run = problem.job.run
    group_size = problem.algorithm.group_size
    groups = run.tasks_per_step // group_size
    assert run.shards is not None, "resolved"
    return math.ceil(groups / run.shards) * group_size


def sum_busy_seconds(results: list[ShardResult]) -> float:
    return sum(result.seconds_draw + result.seconds_compute for result in results)


def check_nothing() -> None:
    """Nothing interrupts a measurement."""
