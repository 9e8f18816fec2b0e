"""What a job leaves open, settled once before step 0: the same for every worker, and on resume."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch.utils._pytree import tree_map

from distmeta.compute.compiler import Compiler, missing
from distmeta.compute.episodes import episodes_of, to_device
from distmeta.compute.probe import LONG, Trial, choose_differentiation, choose_execution, has_dropout, traits
from distmeta.compute.shard import WHOLE_SHARD, Execution, holds_graphs, score_tasks, shard_gradient
from distmeta.core import InputError, Theta
from distmeta.runtime.problem import Problem
from distmeta.seeding import task_ids


def resolve(problem: Problem, say: Callable[[str], None] = lambda text: None) -> Problem:
    """Settles what the job leaves open (shards, execution, schedule), by running the model on its first tasks.

    Raises:
        InputError: the parts of the job do not go together.
    """
    job, algorithm = problem.job, problem.algorithm
    groups = job.run.tasks_per_step // algorithm.group_size
    shards = job.run.shards or min(8, groups)
    if shards > groups:
        raise InputError(
            f"run.shards: got {shards}, expected at most {groups}, the groups of tasks in a step"
        )
    _check_compute(problem)
    if hasattr(problem.family, "collect") and has_dropout(problem.model.module):
        raise InputError(
            f"model.type: {job.model.type} has dropout, and the tasks are collected by all policies at once: "
            "use a model without"
        )
    compute: dict[str, Any] = {}
    if job.compute.compile and (lacking := missing()):
        say(f"compute.compile: there is {lacking}; the whole run goes without")
        compute["compile"] = False
        job = job.replace(compute=compute)
    theta = {name: value.to(problem.device) for name, value in problem.init().items()}
    few = _drawn(problem, theta, 2)
    _check_evaluation(problem, theta)
    found = traits(problem.model.module, few[0].query.x[0])
    if job.compute.compile and found.draws:
        raise InputError(
            "compute.compile: got true for a model that draws random numbers (dropout), which compiled code draws in "
            "another way: use compute.compile=false"
        )
    long = found.convolves and algorithm.inner_steps >= LONG
    long = long and job.compute.differentiation == "auto" and _holds_graphs(problem, theta, few[0])
    differentiation = choose_differentiation(job.compute.differentiation, found, long)
    asked = Execution(job.compute.execution, job.compute.chunk or WHOLE_SHARD, differentiation)
    largest = -(-groups // shards)
    execution = choose_execution(
        asked,
        found,
        job.run.gpus_per_worker > 0,
        _trial(problem, theta, lambda: few, None),
        _trial(
            problem,
            theta,
            lambda: _drawn(problem, theta, largest),
            Compiler(job.compute.precision) if job.compute.compile else None,
        ),
        largest,
    )
    if job.compute.compile:
        _trial(problem, theta, lambda: few, Compiler(job.compute.precision, trace_only=True))(execution)
    schedule = job.outer.schedule.model_dump()
    schedule["steps"] = schedule["steps"] or job.run.steps
    chunk = None if execution.chunk == WHOLE_SHARD or execution.mode == "loop" else execution.chunk
    if asked.mode == "measure":
        say(f"compute.execution: measured: {execution.mode}" + (f" in chunks of {chunk}" if chunk else ""))
    elif execution.mode == "loop" and job.compute.chunk is not None:
        raise InputError(
            f"compute.chunk: got {job.compute.chunk}, but compute.execution: auto is loop here, which takes one task "
            "after the other: leave it out, or use vmap"
        )
    compute |= {"execution": execution.mode, "chunk": chunk, "differentiation": differentiation}
    resolved = job.replace(run={"shards": shards}, compute=compute, outer={"schedule": schedule})
    return replace(problem, job=resolved, execution=execution)


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
    if job.compute.compile and hasattr(problem.algorithm, "at"):
        raise InputError(
            f"compute.compile: got true for {job.algorithm.type}, whose loss is another in every outer step: "
            "expected false"
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
    episodes = to_device(problem.family.draw("val", ids), problem.device)
    score_tasks(
        problem.adapting("val"), problem.score("val"), theta, episodes, ids, Execution("loop", 1), steps=0
    )
