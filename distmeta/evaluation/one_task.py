"""`distmeta check --run-one-task`: run one task of a job and report what a user wants to know about it."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from distmeta.compute.compiler import Compiler
from distmeta.compute.episodes import draw_episodes, make_episodes
from distmeta.compute.execution import shard_gradient
from distmeta.compute.gradient import ShardGradient, build_objective
from distmeta.compute.inspection import inspect_gradient
from distmeta.compute.vectors import Layout
from distmeta.config.job import Job
from distmeta.errors import InputError, shorten_list
from distmeta.protocols import AdaptsParameters, CollectsData, Episodes, Theta, list_capabilities
from distmeta.runtime.parameter_server import vector_norm
from distmeta.runtime.problem import Problem, apply_job_numerics, build_problem, choose_device
from distmeta.runtime.resolve import resolve
from distmeta.seeding import task_ids
from distmeta.trees import name_leaves, tree_leaves

TOLERANCE = 1e-4
"""Relative distance of two gradients of a task on a GPU, whose kernels may add in any order."""


class GradientRun(NamedTuple):
    """One computation of the meta-gradient."""

    result: ShardGradient
    flat: np.ndarray  # the gradient as a vector, [parameters]
    seconds: float


def run_one_task(job: Job) -> Iterator[str]:
    """Run one group of training tasks twice and yield what was found, one line each.

    Raises:
        InputError: the two gradients differ (something is impure), or the gradient is not finite or zero everywhere.
    """
    with apply_job_numerics(job, choose_device(job)):
        notes: list[str] = []
        problem = resolve(build_problem(job), notes.append)
        yield from notes
        yield from describe_capabilities(problem)
        algorithm = problem.training_at(0)
        theta = {name: value.to(problem.device) for name, value in problem.init().items()}
        ids = task_ids(job.seed, "train", 0, algorithm.group_size)
        episodes = make_episodes(
            problem.family, algorithm, theta, "train", ids, algorithm.inner_steps, problem.device
        )
        yield _describe_episodes(episodes)
        _check_draw(problem, ids, episodes)
        yield _describe_random_numbers(problem, theta, episodes, ids)
        layout = Layout.from_theta(theta)
        yield _describe_theta(layout, problem)
        yield from _describe_adapted(problem)
        compute = problem.job.compute
        compiler = Compiler(compute.precision) if compute.compile else None
        runs = []
        for _ in range(2):
            started = time.perf_counter()
            result = shard_gradient(
                algorithm, problem.score("train"), theta, episodes, ids, problem.execution, compiler
            )
            seconds = time.perf_counter() - started
            flat = layout.flatten({name: value.cpu() for name, value in result.gradient.items()})
            runs.append(GradientRun(result, flat, seconds))
    yield _check_gradient(problem, *runs)
    yield _describe_execution(problem, *runs)
    peak_MiB = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    yield f"peak memory of this process {peak_MiB:.0f} MiB"
    metrics = {name: float(value.mean()) for name, value in runs[0].result.metrics.items()}
    yield "metrics: " + ", ".join(f"{name} {value:.4f}" for name, value in sorted(metrics.items()))


def describe_capabilities(problem: Problem) -> Iterator[str]:
    """Yield a line for the algorithm and one for the tasks, with the optional capabilities that they provide."""
    parts = {"algorithm": problem.algorithm, "tasks": problem.family}
    for section, part in parts.items():
        names = list_capabilities(section, part)
        yield f"optional capabilities of the {section}: {', '.join(names) or 'none'}"


def _describe_episodes(episodes: Episodes) -> str:
    """Return the name, shape and dtype of every tensor."""
    shapes = [
        f"{name} {list(leaf.shape)} {str(leaf.dtype).removeprefix('torch.')}"
        for name, leaf in name_leaves(episodes)
    ]
    return "episode: " + ", ".join(shapes)


def _check_draw(problem: Problem, ids: np.ndarray, episodes: Episodes) -> None:
    """Draw the same tasks again and compare."""
    if isinstance(problem.family, CollectsData):  # its data depend on a policy
        return
    again = draw_episodes(problem.family, "train", ids, problem.device)
    pairs = zip(tree_leaves(episodes), tree_leaves(again), strict=True)
    if not all(torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)) for a, b in pairs):
        raise InputError(
            "tasks.type: draw gave two different episodes for the same ids, so results would depend on the worker: "
            "derive every random number from the ids (distmeta.seeding.task_generator)"
        )


def _describe_random_numbers(problem: Problem, theta: Theta, episodes: Episodes, ids: np.ndarray) -> str:
    objective = build_objective(problem.training_at(0), problem.score("train"))
    if inspect_gradient(objective, theta, problem.model.module, episodes, ids):
        return "random numbers: drawn within a task, from a generator that is seeded for each task"
    return "random numbers: none are drawn within a task"


def _describe_theta(layout: Layout, problem: Problem) -> str:
    constants = len(problem.model.constants)
    return (
        f"theta: {len(layout.names)} tensors, {layout.parameters:,} numbers, {layout.size * 4 / 1e6:.2f} MB; "
        f"{constants or 'no'} constants"
    )


def _describe_adapted(problem: Problem) -> Iterator[str]:
    """Yield a line on what the inner loop changes, if the algorithm says so."""
    if not isinstance(problem.algorithm, AdaptsParameters):
        return
    names = problem.algorithm.names
    parameters = dict(problem.model.module.named_parameters())
    numbers = sum(parameters[name.removeprefix("model.")].numel() for name in names)
    listed = shorten_list([name.removeprefix("model.") for name in names])
    yield f"adapts {len(names)} of {len(problem.model.adaptable)} tensors, {numbers:,} numbers: {listed}"


def _check_gradient(problem: Problem, first: GradientRun, second: GradientRun) -> str:
    """Check that the gradient is pure, finite and not zero."""
    # without compute.deterministic the kernels of a GPU may add in another order each time
    is_exact = problem.device.type == "cpu" or problem.job.compute.deterministic
    tolerance = 0.0 if is_exact else TOLERANCE
    if vector_norm(first.flat - second.flat) > tolerance * vector_norm(first.flat):
        raise InputError(
            "purity: the same task gave two different gradients: the model or algorithm keeps state or draws unseeded "
            "random numbers, expected pure functions of their arguments"
        )
    if first.result.dropped:
        raise InputError(
            "gradient: the task's meta-gradient is not finite at step 0, expected finite numbers"
        )
    gradient = first.result.gradient
    zero = [name for name, value in gradient.items() if not bool(value.any())]
    if len(zero) == len(gradient):
        raise InputError(
            "gradient: zero everywhere, expected a query loss that depends on theta (is something detached?)"
        )
    unreached = f"; no gradient reaches {', '.join(zero)}" if zero else ""
    return f"pure: two runs gave the same {'bits' if is_exact else 'gradient'}{unreached}"


def _describe_execution(problem: Problem, first: GradientRun, second: GradientRun) -> str:
    compute = problem.job.compute
    settings = [compute.execution, compute.differentiation, compute.precision]
    if compute.compile:
        settings.append("compiled")
    first_ms = 1e3 * first.seconds / problem.algorithm.group_size
    second_ms = 1e3 * second.seconds / problem.algorithm.group_size
    return f"execution {', '.join(settings)}; {second_ms:.1f} ms per task (first call {first_ms:.0f} ms)"
