"""`distmeta check --run-one-task`: one task of a user's model, looked at closely."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator

from torch.utils._pytree import tree_leaves

from distmeta.compute.compiler import Compiler
from distmeta.compute.episodes import episodes_of
from distmeta.compute.gradient import shard_gradient
from distmeta.compute.vectors import Layout, norm
from distmeta.config.job import Job
from distmeta.errors import InputError
from distmeta.runtime.problem import build, device_of, numerics_of
from distmeta.runtime.resolve import resolve
from distmeta.seeding import task_ids

NEAR = 1e-4
"""Relative distance of two gradients of a task on a GPU whose kernels are free to add in any order."""


def run_one_task(job: Job) -> Iterator[str]:
    """Runs one group of training tasks twice; yields what it saw, a line each.

    Raises:
        InputError: the gradient differs between the two (something impure), is not finite, or is zero everywhere.
    """
    with numerics_of(job, device_of(job)):
        said: list[str] = []
        problem = resolve(build(job), said.append)
        yield from said
        algorithm, compute = problem.training_at(0), problem.job.compute
        theta = {name: value.to(problem.device) for name, value in problem.init().items()}
        compiler = Compiler(compute.precision) if compute.compile else None
        ids = task_ids(job.seed, "train", 0, algorithm.group_size)
        episodes = episodes_of(
            problem.family, algorithm, theta, "train", ids, algorithm.inner_steps, problem.device
        )
        leaves = tree_leaves(episodes)
        yield "episode: " + ", ".join(
            f"{list(leaf.shape)} {str(leaf.dtype).removeprefix('torch.')}" for leaf in leaves
        )
        layout = Layout.of(theta)
        yield (
            f"theta: {len(layout.names)} tensors, {layout.parameters:,} numbers, {layout.size * 4 / 1e6:.2f} MB; "
            + (f"{len(problem.model.constants)} constants" if problem.model.constants else "no constants")
        )
        flats, seconds = [], []
        for _ in range(2):
            started = time.perf_counter()
            result = shard_gradient(
                algorithm, problem.score("train"), theta, episodes, ids, problem.execution, compiler
            )
            seconds.append(time.perf_counter() - started)
            flats.append(layout.flatten({name: value.cpu() for name, value in result.gradient.items()}))
    # a GPU's kernels may add in another order each time, unless told not to
    exact = problem.device.type == "cpu" or compute.deterministic
    if norm(flats[0] - flats[1]) > (0.0 if exact else NEAR) * norm(flats[0]):
        raise InputError(
            "purity: the same task gave two different gradients: the model or algorithm keeps state or draws"
        )
    if result.dropped:
        raise InputError("numbers: the task's meta-gradient is not finite at the initialisation")
    zero = [name for name, value in result.gradient.items() if not bool(value.any())]
    if len(zero) == len(layout.names):
        raise InputError("gradient: zero everywhere: the query loss does not depend on theta")
    yield f"pure: two runs gave the same {'bits' if exact else 'gradient'}" + (
        f"; no gradient reaches {', '.join(zero)}" if zero else ""
    )
    first, second = (1e3 * s / algorithm.group_size for s in seconds)
    how = (
        f"{compute.execution}, {compute.differentiation}, {compute.precision}{', compiled' * compute.compile}"
    )
    yield f"execution {how}; {second:.1f} ms a task (first call {first:.0f} ms)"
    yield f"peak memory of this process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB"
    metrics = {name: float(value.mean()) for name, value in result.metrics.items()}
    yield "metrics: " + ", ".join(f"{name} {value:.4f}" for name, value in sorted(metrics.items()))
