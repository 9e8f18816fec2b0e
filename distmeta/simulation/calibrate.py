"""Measures `costs` on this machine, with the job's own parts and the runtime's own pool."""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from statistics import median

import numpy as np

from distmeta.compute.vectors import Layout
from distmeta.config.job import Job, run_in_process
from distmeta.runtime.parameter_server import ParameterServer
from distmeta.runtime.pool import LocalPool, Pool, open_pool
from distmeta.runtime.problem import Problem
from distmeta.runtime.ray_cluster import connect, import_ray
from distmeta.runtime.scores import mean_metrics
from distmeta.runtime.startup import settled
from distmeta.runtime.worker import Shard, ShardResult, shards_of
from distmeta.simulation import transfers
from distmeta.simulation.costs import Costs, JobCosts, Machine

ROUNDS = 9
"""Times that something is measured, after a first that does not count."""
SECONDS = (1.0, 3.0)
"""Of one measurement: at least, by more rounds; and at most, where a round is long, by fewer, but three."""
TOGETHER = 4
"""Workers at once, at most, that their slowing each other down is measured with."""


def calibrate(job: Job, say: Callable[[str], None]) -> tuple[Costs, JobCosts]:
    """Costs of this machine, and of the job on it.

    Raises:
        InputError: the job's parts do not go together, or Ray has no room for a worker.
    """
    problem = problem_of(job, say)
    say("measuring the job's computations in this process …")
    own = job_costs(problem)
    run = problem.job.run
    ray = import_ray(run.address)
    leave = connect(ray, run.address, math.ceil(TOGETHER * run.cpus_per_worker))
    try:
        say("measuring Ray's object store …")
        moved = transfers.measure(ray)
        cores = processors()
        slowdown: list[float] = []
        overheads, start = (0.0, 0.0, 0.0), 0.0
        there = ray.cluster_resources()
        needs = {"CPU": run.cpus_per_worker, "GPU": run.gpus_per_worker}
        room = min(int(there.get(kind, 0) // wanted) for kind, wanted in needs.items() if wanted)
        for workers in range(1, max(min(cores, room, TOGETHER), 1) + 1):
            say(f"measuring {workers} Ray worker{'s' * (workers > 1)} …")
            with _pool(problem, workers) as (pool, seconds):
                slowdown.append(_slowdown(pool, problem))
                if workers == 1:
                    overheads, start = _overheads(pool, problem), seconds
    finally:
        leave()
    bytes_, (step, call, driving) = own.bytes, overheads
    sent = moved.reply(bytes_)
    machine = Machine(
        call=max(call - sent, 0.0),
        call_driver=min(driving, max(call - sent, 0.0)),
        message=moved.message,
        message_driver=moved.message_driver,
        step=max(step - moved.put(bytes_) - moved.receive(bytes_), 0.0),
        put=moved.put,
        receive=moved.receive,
        reply=moved.reply,
        reply_shared=moved.reply_shared,
        add=moved.add,
        ring=moved.ring,
        slowdown=tuple(slowdown),
        cores=cores,
        start=start,
    )
    about = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{platform.node()}, {platform.machine()}, {cores} cores",
        "job": job.name,
    }
    return Costs(machine, about=about), own


def processors() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def problem_of(job: Job, say: Callable[[str], None] = lambda text: None) -> Problem:
    """The job's problem, settled, computing in this process."""
    tree = run_in_process(job.to_dict())
    run = tree["run"] | {"eval_every": 0, "patience": None}
    return settled(Job.parse(tree | {"run": run}), say)


def job_costs(problem: Problem) -> JobCosts:
    """What the job's computations take in this process."""
    probes = Probes(problem)
    return probes.costs({name: usual(probe) for name, probe in probes.each.items()})


class Probes:
    """A shard of the job's size and one of another size, which give a line, and the outer step: `each` computes what
    belongs to step `k` and gives the seconds."""

    def __init__(self, problem: Problem):
        self._problem = problem
        theta = problem.init()
        self._layout = layout = Layout.of(theta)
        pool, flat, group = LocalPool(problem, layout), layout.flatten(theta), problem.algorithm.group_size
        large = _shard_tasks(problem)
        small = large // 2 // group * group
        self._sizes = (small, large) if small else (large, 2 * large)
        server = ParameterServer(theta, problem.job.outer)
        gradient = np.full(layout.size, 1e-8, np.float32)

        def shard(tasks: int, step: int) -> float:
            return _busy(pool.map(flat, _plan(problem, step, tasks, 1), _go))

        def outer(step: int) -> float:
            started = time.perf_counter()
            mean = gradient / np.float32(large)
            np.isfinite(mean).all()
            server.step(mean)
            server.flat()
            return time.perf_counter() - started

        small, large = self._sizes
        self.each: dict[str, Callable[[int], float]] = {
            "small": partial(shard, small),
            "large": partial(shard, large),
            "outer": outer,
        }

    def costs(self, seconds: Mapping[str, float]) -> JobCosts:
        """From the seconds of each."""
        small, large = self._sizes
        task = max((seconds["large"] - seconds["small"]) / (large - small), 0.0)
        shards = self._problem.job.run.shards
        assert shards is not None, "resolved"
        base = max(seconds["large"] - task * large, 0.0)
        return JobCosts(self._layout.parameters, shards, base, task, seconds["outer"])


def usual(measured: Callable[[int], float]) -> float:
    """Seconds, the median of several rounds, each given its number."""
    measured(0)
    found: list[float] = []
    began = time.perf_counter()
    while True:
        found.append(measured(len(found) + 1))
        count, took = len(found), time.perf_counter() - began
        if (count >= ROUNDS and took > SECONDS[0]) or (count >= 3 and took > SECONDS[1]):
            return median(found)


@contextmanager
def _pool(problem: Problem, workers: int) -> Iterator[tuple[Pool, float]]:
    """A pool of the runtime's own, and the seconds until it was ready."""
    began = time.perf_counter()
    job = problem.job.replace(run={"workers": workers})
    pool = open_pool(replace(problem, job=job), Layout.of(problem.init()), lambda text: None)
    try:
        yield pool, time.perf_counter() - began
    finally:
        pool.close()


def _slowdown(pool: Pool, problem: Problem) -> float:
    """Seconds of the job's shards in the pool's workers, all at work, over the seconds of one in this process: in turn,
    for the machine may become busier."""
    tasks, flat = _shard_tasks(problem), _flat(problem)
    count, alone = 2 * pool.size, LocalPool(problem, Layout.of(problem.init()))
    here: list[float] = []

    def together(step: int) -> float:
        here.append(_busy(alone.map(flat, _plan(problem, step, tasks, 1), _go)))
        return _busy(pool.map(flat, _plan(problem, step, count * tasks, count), _go)) / count

    there = usual(together)
    return there / median(here[1:])


def _overheads(pool: Pool, problem: Problem) -> tuple[float, float, float]:
    """Seconds of one worker's step that it does not compute: what there is once a step, and with each shard; and the
    driver's processor's seconds with each shard. From steps of 2 and of 8 shards of the fewest tasks.
    """
    group, flat = problem.algorithm.group_size, _flat(problem)
    few, many = 2, 8
    found: dict[int, list[tuple[float, float]]] = {few: [], many: []}
    for step in range(2 * ROUNDS):
        for shards in (few, many):
            began, processor = time.perf_counter(), time.thread_time()
            results = pool.map(flat, _plan(problem, step, shards * group, shards), _go)
            mean_metrics(results)
            took, worked = time.perf_counter() - began, time.thread_time() - processor
            if step:
                found[shards].append((took - _busy(results), worked))
    waits = {k: median(row[0] for row in rows) for k, rows in found.items()}
    works = {k: median(row[1] for row in rows) for k, rows in found.items()}
    call = max((waits[many] - waits[few]) / (many - few), 0.0)
    driving = max((works[many] - works[few]) / (many - few), 0.0)
    return waits[few] - few * call, call, driving


def _plan(problem: Problem, step: int, tasks: int, shards: int) -> list[Shard]:
    return shards_of(problem, "train", step, tasks, shards, problem.algorithm.inner_steps)


def _shard_tasks(problem: Problem) -> int:
    """Tasks of the job's largest shard."""
    run, group = problem.job.run, problem.algorithm.group_size
    assert run.shards is not None, "resolved"
    return -(-run.tasks_per_step // group // run.shards) * group


def _flat(problem: Problem) -> np.ndarray:
    theta = problem.init()
    return Layout.of(theta).flatten(theta)


def _busy(results: list[ShardResult]) -> float:
    return sum(result.seconds_draw + result.seconds_compute for result in results)


def _go() -> None:
    """Nothing interrupts a measurement."""
