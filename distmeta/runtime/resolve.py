"""Decide what a job leaves open, once before step 0. Every worker and every resume uses the resolved job."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from distmeta.compute.buckets import group_by_shape
from distmeta.compute.choose_execution import (
    MANY_STEPS,
    Trial,
    choose_differentiation,
    choose_execution,
    holds_graphs,
)
from distmeta.compute.compiler import Compiler, find_missing_tool
from distmeta.compute.conversion import check_episodes, describe_missing_numbers
from distmeta.compute.episodes import make_episodes
from distmeta.compute.execution import WHOLE_SHARD, Execution, shard_gradient
from distmeta.compute.gradient import build_objective
from distmeta.compute.inspection import ModelTraits, inspect_gradient, inspect_model, watch
from distmeta.compute.scoring import evaluation_mode, score_tasks
from distmeta.config.job import Job
from distmeta.errors import InputError
from distmeta.models.module import has_dropout
from distmeta.protocols import CollectsData, Episode, Episodes, Theta
from distmeta.runtime.outer_rates import OuterRates
from distmeta.runtime.problem import Problem
from distmeta.seeding import task_ids
from distmeta.trees import tree_map


def resolve(problem: Problem, report: Callable[[str], None] = lambda text: None) -> Problem:
    """Decide what the job leaves open (shards, execution, schedule), by computing on its first tasks.

    Raises:
        InputError: the parts of the job do not fit together.
    """
    for note in problem.model.notes:
        report(note)
    problem = replace(problem, job=_set_shards(problem))
    _check_compute(problem)
    problem = _check_compiler(problem, report)
    theta = {name: value.to(problem.device) for name, value in problem.init().items()}
    execution = _choose_execution(problem, theta, report)
    job = problem.job
    outer_steps = job.run.steps * problem.outer_epochs
    _check_outer_rates(job, tuple(theta), outer_steps)
    schedule = job.outer.schedule.model_dump()
    schedule["steps"] = schedule["steps"] or outer_steps
    is_whole = execution.mode == "loop" or execution.chunk == WHOLE_SHARD
    compute = {
        "execution": execution.mode,
        "chunk": None if is_whole else execution.chunk,
        "differentiation": execution.differentiation,
    }
    resolved = job.replace(compute=compute, outer={"schedule": schedule})
    return replace(problem, job=resolved, execution=execution)


def without_compiler(problem: Problem) -> Problem:
    """Return the problem without `compute.compile`."""
    return replace(problem, job=problem.job.replace(compute={"compile": False}))


def _set_shards(problem: Problem) -> Job:
    """Return the job with its number of shards."""
    run = problem.job.run
    groups = run.tasks_per_step // problem.algorithm.group_size
    shards = run.shards or min(8, groups)
    if shards > groups:
        raise InputError(
            f"run.shards: got {shards}, expected at most {groups}, the groups of tasks in a step"
        )
    return problem.job.replace(run={"shards": shards})


# --- Execution ----------------------------------------------------------------------------------------------------


def _choose_execution(problem: Problem, theta: Theta, report: Callable[[str], None]) -> Execution:
    """Decide how shards are computed: as the job asks, or by rules on the first tasks."""
    job = problem.job
    asked = job.compute
    group_size = problem.algorithm.group_size
    episodes, ids = _make_probe_tasks(problem, theta, 2)
    note = describe_missing_numbers(episodes)
    if note is not None:
        report(note)
    first = group_by_shape(episodes, group_size)[0].episodes if isinstance(episodes, list) else episodes
    traits = inspect_model(problem.model.module, tree_map(lambda leaf: leaf[0], first.query.x))
    uses_random_numbers = _inspect_first_gradient(problem, theta, episodes, ids)
    if asked.compile and uses_random_numbers:
        raise InputError(
            "compute.compile: got true for a job that draws random numbers within a task (dropout, noise, "
            "minibatches), which compiled code draws in another way: use compute.compile=false"
        )
    try_evaluation = _build_evaluation_trial(problem, theta)
    try_evaluation(Execution("loop", 1))
    has_long_graphs = _has_long_graphs(problem, traits, theta, first)
    differentiation = choose_differentiation(asked.differentiation, has_long_graphs)
    groups = job.run.tasks_per_step // group_size
    largest_shard = math.ceil(groups / (job.run.shards or 1))
    compiler = Compiler(asked.precision) if asked.compile else None
    try_gradient = _build_trial(problem, theta, lambda: (episodes, ids), None)

    def try_tasks(execution: Execution) -> None:
        with warnings.catch_warnings():
            # torch computes an operation without a batching rule row by row; the loop is faster then
            warnings.filterwarnings("error", "There is a performance drop")
            try_gradient(execution)
            try_evaluation(execution)

    execution = choose_execution(
        Execution(asked.execution, asked.chunk or WHOLE_SHARD, differentiation),
        traits,
        uses_random_numbers,
        job.run.gpus_per_worker > 0,
        asked.precision,
        try_tasks,
        _build_trial(problem, theta, lambda: _make_probe_tasks(problem, theta, largest_shard), compiler),
        largest_shard,
    )
    if asked.execution == "measure":
        chunks = f" in chunks of {execution.chunk}" if 1 < execution.chunk < WHOLE_SHARD else ""
        report(f"compute.execution: measured: {execution.mode}{chunks}")
    elif execution.mode == "loop" and asked.chunk is not None:
        raise InputError(
            f"compute.chunk: got {asked.chunk}, but compute.execution: auto is loop here, which computes one task "
            "after the other: leave it out, or use vmap"
        )
    if asked.compile:
        only_trace = Compiler(asked.precision, trace_only=True)
        _build_trial(problem, theta, lambda: (episodes, ids), only_trace)(execution)
    return execution


def _inspect_first_gradient(problem: Problem, theta: Theta, episodes: Episodes, ids: np.ndarray) -> bool:
    """Compute one group's meta-gradient by plain autograd. Return whether it draws random numbers.

    Raises:
        InputError: that is impossible, or the gradient is not a pure function of theta and the data.
    """
    objective = build_objective(problem.training_at(0), problem.score("train"))
    return inspect_gradient(objective, theta, problem.model.module, episodes, ids)


def _build_evaluation_trial(problem: Problem, theta: Theta) -> Trial:
    """Return a function that evaluates theta on two validation tasks, as the run will.

    Missing classes, more ways than the head has, or an operation that works only in training are then found now and
    not at the first evaluation.
    """
    if problem.job.run.eval_every == 0:
        return lambda execution: None
    algorithm = problem.adapting("val")
    ids = task_ids(problem.job.seed, "probe", 0, 2)
    steps = problem.eval_steps
    with evaluation_mode(problem.model.module):
        episodes = make_episodes(problem.family, algorithm, theta, "val", ids, steps, problem.device)
    if not isinstance(problem.family, CollectsData):
        check_episodes(episodes, len(ids), problem.score("val"), "draw of split val")

    def trial(execution: Execution) -> object:
        def compute() -> object:
            return score_tasks(algorithm, problem.score("val"), theta, episodes, ids, execution, steps)

        with evaluation_mode(problem.model.module):
            if execution.mode == "loop":
                return watch(compute, problem.model.module, theta, "the first evaluation")
            return compute()

    return trial


def _make_probe_tasks(problem: Problem, theta: Theta, groups: int) -> tuple[Any, Any]:
    """Return the episodes of some groups of tasks, and their ids."""
    algorithm = problem.algorithm
    ids = task_ids(problem.job.seed, "probe", 0, groups * algorithm.group_size)
    steps = algorithm.inner_steps
    episodes = make_episodes(problem.family, algorithm, theta, "train", ids, steps, problem.device)
    if not isinstance(problem.family, CollectsData):
        check_episodes(episodes, len(ids), problem.family.score)
    return episodes, ids


def _has_long_graphs(problem: Problem, traits: ModelTraits, theta: Theta, episodes: Episode) -> bool:
    """Return whether the meta-gradient goes back through many inner steps of a convolutional network.

    If the meta-loss changes during training, that of the last steps counts.
    """
    algorithm = problem.algorithm
    is_long = traits.has_convolutions and algorithm.inner_steps >= MANY_STEPS
    if not is_long or problem.job.compute.differentiation != "auto":
        return False
    group = tree_map(lambda leaf: leaf[: algorithm.group_size], episodes)
    return holds_graphs(algorithm, problem.score("train"), theta, group)


def _build_trial(
    problem: Problem, theta: Theta, make_tasks: Callable[[], tuple[Any, Any]], compiler: Compiler | None
) -> Trial:
    """Return a function that computes the gradient of some tasks, which are made when it is first called."""
    made: list[tuple[Any, Any]] = []

    def trial(execution: Execution) -> object:
        if not made:
            made.append(make_tasks())
        episodes, ids = made[0]
        algorithm = problem.training_at(0)
        return shard_gradient(algorithm, problem.score("train"), theta, episodes, ids, execution, compiler)

    return trial


# --- Checks -------------------------------------------------------------------------------------------------------


def _check_compute(problem: Problem) -> None:
    """Refuse settings with which no shard could be computed."""
    job = problem.job
    if isinstance(problem.family, CollectsData) and has_dropout(problem.model.module):
        raise InputError(
            f"model.type: {job.model.type} has dropout, but data are collected with the policies of all tasks at "
            "once: use a model without dropout"
        )
    needs_driver_gpu = job.compute.execution == "measure" and job.run.gpus_per_worker > 0
    if needs_driver_gpu and problem.device.type == "cpu":
        raise InputError(
            "compute.execution: got measure with GPU workers, but it measures on the driver: "
            "expected auto, loop or vmap, or run.workers=0"
        )


def _check_outer_rates(job: Job, names: tuple[str, ...], outer_steps: int) -> None:
    """Refuse parameter groups that match nothing, and schedules that do not last for all steps."""
    OuterRates(names, job.outer, outer_steps).of_groups()


def _check_compiler(problem: Problem, report: Callable[[str], None]) -> Problem:
    """Compute without a compiler if this process computes and has none. With workers, theirs count."""
    computes_here = not problem.job.run.max_workers
    if not (problem.job.compute.compile and computes_here):
        return problem
    missing_tool = find_missing_tool(problem.device.type)
    if missing_tool is None:
        return problem
    report(f"compute.compile: there is {missing_tool}; the whole run is computed without compilation")
    return without_compiler(problem)
