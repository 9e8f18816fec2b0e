"""What a job leaves open, settled once before step 0: the same for every worker, and on resume."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch.utils._pytree import tree_map

from distmeta.compute.buckets import buckets, drawn
from distmeta.compute.choose_execution import (
    LONG,
    Trial,
    choose_differentiation,
    choose_execution,
    has_dropout,
    traits,
)
from distmeta.compute.compiler import Compiler, missing
from distmeta.compute.episodes import episodes_of, to_device
from distmeta.compute.gradient import WHOLE_SHARD, Execution, holds_graphs, shard_gradient
from distmeta.compute.scoring import score_tasks
from distmeta.config.job import Job
from distmeta.errors import InputError
from distmeta.protocols import Theta
from distmeta.runtime.problem import Problem
from distmeta.seeding import task_ids


def resolve(problem: Problem, say: Callable[[str], None] = lambda text: None) -> Problem:
    """Settles what the job leaves open (shards, execution, schedule), by running the model on its first tasks.

    Raises:
        InputError: the parts of the job do not go together.
    """
    problem = replace(problem, job=_with_shards(problem))
    _check_compute(problem)
    here = not problem.job.run.max_workers  # else it is what workers have that counts
    if problem.job.compute.compile and here and (lacking := missing(problem.device.type)):
        say(f"compute.compile: there is {lacking}; the whole run goes without")
        problem = eager(problem)
    theta = {name: value.to(problem.device) for name, value in problem.init().items()}
    _check_evaluation(problem, theta)
    execution = _execution(problem, theta, say)
    schedule = problem.job.outer.schedule.model_dump()
    schedule["steps"] = schedule["steps"] or problem.job.run.steps * problem.outer_epochs
    compute = {
        "execution": execution.mode,
        "chunk": None if execution.mode == "loop" or execution.chunk == WHOLE_SHARD else execution.chunk,
        "differentiation": execution.differentiation,
    }
    settled = problem.job.replace(compute=compute, outer={"schedule": schedule})
    return replace(problem, job=settled, execution=execution)


def eager(problem: Problem) -> Problem:
    """The same without `compute.compile`."""
    return replace(problem, job=problem.job.replace(compute={"compile": False}))


def _with_shards(problem: Problem) -> Job:
    """The job with its number of shards."""
    run, groups = problem.job.run, problem.job.run.tasks_per_step // problem.algorithm.group_size
    shards = run.shards or min(8, groups)
    if shards > groups:
        raise InputError(
            f"run.shards: got {shards}, expected at most {groups}, the groups of tasks in a step"
        )
    return problem.job.replace(run={"shards": shards})


def _execution(problem: Problem, theta: Theta, say: Callable[[str], None]) -> Execution:
    """How shards are computed: what the job asks for, or what its rules find on the first tasks."""
    job, algorithm, asked = problem.job, problem.algorithm, problem.job.compute
    few = _drawn(problem, theta, 2)
    first = buckets(few[0], algorithm.group_size)[0].episodes
    found = traits(problem.model.module, first.query.x[0])
    if asked.compile and found.draws:
        raise InputError(
            "compute.compile: got true for a model that draws random numbers (dropout), which compiled code draws in "
            "another way: use compute.compile=false"
        )
    long = found.convolves and algorithm.inner_steps >= LONG
    long = long and asked.differentiation == "auto" and _holds_graphs(problem, theta, first)
    differentiation = choose_differentiation(asked.differentiation, found, long)
    largest = -(-job.run.tasks_per_step // algorithm.group_size // (job.run.shards or 1))
    compiler = Compiler(asked.precision) if asked.compile else None
    execution = choose_execution(
        Execution(asked.execution, asked.chunk or WHOLE_SHARD, differentiation),
        found,
        job.run.gpus_per_worker > 0,
        asked.precision,
        _trial(problem, theta, lambda: few, None),
        _trial(problem, theta, lambda: _drawn(problem, theta, largest), compiler),
        largest,
    )
    if asked.execution == "measure":
        chunks = f" in chunks of {execution.chunk}" if 1 < execution.chunk < WHOLE_SHARD else ""
        say(f"compute.execution: measured: {execution.mode}{chunks}")
    elif execution.mode == "loop" and asked.chunk is not None:
        raise InputError(
            f"compute.chunk: got {asked.chunk}, but compute.execution: auto is loop here, which takes one task "
            "after the other: leave it out, or use vmap"
        )
    if asked.compile:
        _trial(problem, theta, lambda: few, Compiler(asked.precision, trace_only=True))(execution)
    return execution


def _drawn(problem: Problem, theta: Theta, groups: int) -> tuple[Any, Any]:
    """Episodes of as many groups of tasks, and their ids."""
    algorithm = problem.algorithm
    ids = task_ids(problem.job.seed, "probe", 0, groups * algorithm.group_size)
    steps = algorithm.inner_steps
    return episodes_of(problem.family, algorithm, theta, "train", ids, steps, problem.device), ids


def _holds_graphs(problem: Problem, theta: Theta, episodes: Any) -> bool:
    """Whether training's meta-loss goes back through its inner loops (that of the last steps, where it changes)."""
    group = tree_map(lambda leaf: leaf[: problem.algorithm.group_size], episodes)
    return holds_graphs(problem.algorithm, problem.score("train"), theta, group)


def _trial(
    problem: Problem, theta: Theta, drawn: Callable[[], tuple[Any, Any]], compiler: Compiler | None
) -> Trial:
    """The gradient of some tasks, drawn when it is first asked for."""
    kept: list[tuple[Any, Any]] = []

    def trial(execution: Execution) -> object:
        if not kept:
            kept.append(drawn())
        score = problem.score("train")
        return shard_gradient(problem.training_at(0), score, theta, *kept[0], execution, compiler)

    return trial


def _check_compute(problem: Problem) -> None:
    """Settings that no shard could be computed with."""
    job, on_gpu = problem.job, problem.job.run.gpus_per_worker > 0
    if hasattr(problem.family, "collect") and has_dropout(problem.model.module):
        raise InputError(
            f"model.type: {job.model.type} has dropout, and the tasks are collected by all policies at once: "
            "use a model without"
        )
    if job.compute.execution == "measure" and on_gpu and problem.device.type == "cpu":
        raise InputError(
            "compute.execution: got measure with GPU workers, and it measures on the driver: "
            "expected auto, loop or vmap, or run.workers=0"
        )


def _check_evaluation(problem: Problem, theta: Theta) -> None:
    """Scores one validation task, unadapted: classes that are not there, or more ways than the head has, are found out
    now and not at the first evaluation.
    """
    if problem.job.run.eval_every == 0 or not hasattr(problem.family, "scorer"):
        return
    ids = task_ids(problem.job.seed, "probe", 0, 1)
    episodes = to_device(drawn(problem.family, "val", ids), problem.device)
    score_tasks(
        problem.adapting("val"), problem.score("val"), theta, episodes, ids, Execution("loop", 1), steps=0
    )
