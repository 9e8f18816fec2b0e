"""Choose how a shard's tasks are computed, from what one forward pass reveals about the user's model."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from distmeta.compute.execution import WHOLE_SHARD, Execution
from distmeta.compute.gradient import build_objective, group_loss, unroll
from distmeta.compute.inspection import ModelTraits
from distmeta.errors import InputError, first_line
from distmeta.protocols import Algorithm, Episode, FirstOrder, Score, Theta

CHUNKS = (8, 32)
"""Chunks that `measure` tries besides whole shards."""
LARGE_FEATURE_MAP = 1_200_000
"""Elements of one task's query feature map above which a CPU computes convolutions task by task: the feature maps of
several tasks at once no longer fit its cache (benchmarks/execution.py)."""
MANY_STEPS = 16
"""From this many inner steps on, auto keeps one step's graph of a convolutional network in memory, not all of them."""


# --- Execution ----------------------------------------------------------------------------------------------------

Trial = Callable[[Execution], object]
"""trial(execution) computes the gradient of some of the job's tasks in this way."""


def choose_execution(
    asked: Execution,
    traits: ModelTraits,
    uses_random_numbers: bool,
    on_gpu: bool,
    precision: str,
    try_tasks: Trial,
    try_shard: Trial,
    largest_shard: int,
) -> Execution:
    """Decide `compute.execution` (`asked.mode`) and, if it is measured, `compute.chunk`.

    - auto: `loop` for a model that draws random numbers or that `torch.func.vmap` cannot run; on a CPU also for
      convolutions with large feature maps, or in bfloat16 (a rule from measurements on processors with bfloat16
      instructions).
      Otherwise `vmap`.
    - measure: compute a whole shard by the loop, by vmap over all of it and by vmap over chunks; take the fastest.

    Args:
        uses_random_numbers: whether the first meta-gradient drew any.
        try_tasks: computes the gradient of two groups and evaluates two tasks. It shows whether vmap works at all.
        largest_shard: groups of tasks in the largest shard, which `try_shard` computes.

    Raises:
        InputError: vmap was asked for and is impossible.
    """
    loop = asked._replace(mode="loop", chunk=1)
    vmap = asked._replace(mode="vmap")
    if asked.mode == "loop":
        return loop
    if uses_random_numbers:
        if asked.mode == "vmap":
            raise InputError(
                "compute.execution: got vmap for a job that draws random numbers within a task (dropout, noise, "
                "minibatches), which are seeded per task: use compute.execution=loop"
            )
        return loop
    fits_cache = precision == "float32" and 0 < traits.largest_feature_map <= LARGE_FEATURE_MAP
    if asked.mode == "auto" and traits.has_convolutions and not fits_cache and not on_gpu:
        return loop
    try:
        try_tasks(vmap)
    except (InputError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise  # a machine's failure says nothing about the job
    except Exception as error:  # what works task by task may fail in any way under vmap
        if asked.mode == "vmap":
            raise InputError(
                f"compute.execution: got vmap, but this model or algorithm does not run under vmap "
                f"({first_line(error)}): use compute.execution=loop"
            ) from error
        return loop
    if asked.mode == "measure":
        smaller = [chunk for chunk in CHUNKS if chunk < largest_shard]
        chunks = [WHOLE_SHARD, *smaller] if asked.chunk == WHOLE_SHARD else [asked.chunk]
        return find_fastest([loop, *(vmap._replace(chunk=chunk) for chunk in chunks)], try_shard)
    return vmap


def find_fastest(executions: Sequence[Execution], trial: Trial) -> Execution:
    """Return the execution with the shortest of three trials, after one trial that does not count (compilation).

    Executions that run out of GPU memory are left out. The first one needs the least memory.
    """
    seconds: dict[Execution, float] = {}
    for execution in executions:
        with contextlib.suppress(torch.OutOfMemoryError):
            trial(execution)
            seconds[execution] = float("inf")
    for _ in range(3):
        for execution in seconds:
            started = time.perf_counter()
            trial(execution)
            seconds[execution] = min(seconds[execution], time.perf_counter() - started)
    return min(seconds, key=lambda execution: seconds[execution])


# --- Differentiation ----------------------------------------------------------------------------------------------


def choose_differentiation(asked: str, has_long_graphs: bool) -> str:
    """Decide `compute.differentiation`.

    auto is `constant-memory` if the meta-gradient goes back through many inner steps of a convolutional network
    (`has_long_graphs`). In other cases holding all graphs takes little memory and is faster (benchmarks/memory.py).
    """
    if asked != "auto":
        return asked
    return "constant-memory" if has_long_graphs else "reverse"


def holds_graphs(algorithm: Algorithm, score: Score, theta: Theta, group: Episode) -> bool:
    """Return whether the meta-gradient of a group, leaves [G, ...], goes back through its inner loops."""
    are_detached: list[bool] = []

    def watch(
        algorithm: Algorithm,
        theta: Theta,
        support: Any,
        steps: int | None = None,
        detach: bool = False,
        every: bool = False,
    ) -> Any:
        are_detached.append(detach)
        return unroll(algorithm, theta, support, steps, detach, every)

    with torch.no_grad():
        group_loss(build_objective(algorithm, score), theta, group, watch)
    is_first_order = isinstance(algorithm, FirstOrder) and algorithm.first_order
    return not all(are_detached) and not is_first_order
