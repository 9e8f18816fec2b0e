"""The ways to compute a shard's gradient: one group after the other, many groups at once, compiled, with less memory.

All compute the same sum (`compute.gradient`), to rounding. A job's way is chosen once before step 0, because the bits
depend on it (`compute.choose_execution`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from distmeta.compute.compiler import Compiler
from distmeta.compute.constant_memory import differentiate_in_constant_memory, reverse_vjp
from distmeta.compute.episodes import to_device
from distmeta.compute.gradient import (
    ChunkSum,
    Method,
    Objective,
    ShardGradient,
    build_objective,
    compute_group,
    group_loss,
    score_before_adaptation,
    sum_gradients,
    sum_groups,
)
from distmeta.compute.schedules import describe_structure, get_scheduled_values, replace_scheduled_values
from distmeta.protocols import Algorithm, Episode, Episodes, Metrics, Score, Theta
from distmeta.trees import tree_map

WHOLE_SHARD = 2**31
"""More groups than any shard has: one chunk per shard."""


class Execution(NamedTuple):
    """How the tasks of a shard are computed."""

    mode: str
    """`loop`: one group after the other, with torch's generator seeded for each. `vmap`: `chunk` groups at once."""
    chunk: int
    differentiation: str = "reverse"
    """`reverse`: through the whole graph of the inner loop. `constant-memory`: step by step."""


def shard_gradient(
    algorithm: Algorithm,
    score: Score,
    theta: Theta,
    episodes: Episodes,
    ids: np.ndarray,
    execution: Execution,
    compiler: Compiler | None = None,
    before: bool = True,
) -> ShardGradient:
    """Return the sum of the tasks' meta-gradients, and their metrics.

    Args:
        before: whether to score the tasks before adaptation too, if there is an inner loop.
    """
    objective = build_objective(algorithm, score, before)
    return sum_gradients(objective, theta, episodes, ids, build_method(execution, compiler))


def build_method(execution: Execution, compiler: Compiler | None = None) -> Method:
    """Return the functions that compute a shard in this way.

    With a compiler, the sum over a chunk is one program. Groups of unequal tasks are then computed one by one, so that
    there is one program per shape.
    """
    is_loop = execution.mode == "loop"
    if compiler is not None:
        compute_chunk = partial(compute_compiled, compiler, execution)
    elif is_loop and execution.differentiation == "reverse":
        compute_chunk = compute_group
    else:
        compute_chunk = partial(compute_groups, execution)
    groups = 1 if is_loop else execution.chunk
    return Method(compute_chunk, groups, groups if compiler is None else 1, is_loop)


def compute_groups(
    execution: Execution, objective: Objective, theta: Theta, chunk: Episode, is_traced: bool = False
) -> ChunkSum:
    """Compute a chunk, leaves [groups, G, ...], in any way without a compiler.

    Under vmap the gradient is vectorised, not the loss: the second derivatives of batch and layer norm are wrong in the
    gradient of a vectorised loss (torch 2.13), and right in vectorised gradients.
    """
    if execution.mode == "vmap":
        compute_one = partial(_compute_gradient, execution.differentiation, torch.func.vjp, None, objective)
        gradients, metrics = torch.func.vmap(compute_one, (None, 0))(theta, chunk)
    else:
        group = tree_map(lambda leaf: leaf[0], chunk)
        gpus = None if is_traced else list({value.device for value in theta.values() if value.is_cuda})
        gradient, metrics = _compute_gradient(
            execution.differentiation, reverse_vjp, gpus, objective, theta, group
        )
        gradients = {name: value[None] for name, value in gradient.items()}
    return sum_groups(gradients, metrics, objective.algorithm.group_size, is_traced)


def _compute_gradient(
    differentiation: str,
    vjp: Any,
    gpus: Sequence[torch.device] | None,
    objective: Objective,
    theta: Theta,
    group: Episode,
) -> tuple[Theta, Metrics]:
    """Return the gradient of one group's meta-loss, leaves [G, ...], and the metrics of its tasks, [G] each.

    Args:
        gpus: GPUs that may draw random numbers, besides the CPU; None: none are drawn.
    """
    if differentiation == "constant-memory":
        gradient, metrics = differentiate_in_constant_memory(
            lambda theta, unroll: group_loss(objective, theta, group, unroll), theta, vjp, gpus
        )
    else:
        loss, pull_back, metrics = vjp(lambda theta: group_loss(objective, theta, group), theta, has_aux=True)
        (gradient,) = pull_back(torch.ones_like(loss))
    return gradient, metrics | score_before_adaptation(objective, theta, group)


def compute_compiled(
    compiler: Compiler, execution: Execution, objective: Objective, theta: Theta, chunk: Episode
) -> ChunkSum:
    """Compute a chunk by one program for all outer steps whose algorithms differ only in scheduled values."""
    algorithm = objective.algorithm

    def compute(theta: Theta, chunk: Episode, values: Any) -> tuple[Any, ...]:
        current = build_objective(
            replace_scheduled_values(algorithm, values), objective.score, objective.scores_before
        )
        return tuple(compute_groups(execution, current, theta, chunk, is_traced=True))

    device = next(iter(theta.values())).device
    values = to_device(get_scheduled_values(algorithm), device)
    name = (describe_structure(algorithm), execution, objective.scores_before)
    return ChunkSum(*compiler(name, compute, theta, chunk, values))
