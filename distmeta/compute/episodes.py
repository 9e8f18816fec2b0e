"""Episodes of a shard's tasks: drawn, or collected with the policy as it adapts and then replayed as constants."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_map

from distmeta.compute.buckets import drawn
from distmeta.compute.unroll import detached
from distmeta.protocols import Algorithm, Episode, Episodes, PerStep, TaskFamily, Theta, to_float32


def episodes_of(
    family: TaskFamily,
    algorithm: Algorithm,
    theta: Theta,
    split: str,
    ids: np.ndarray,
    steps: int,
    device: torch.device | str = "cpu",
) -> Episodes:
    """Complete data before any gradient: the environment is touched here and nowhere else.

    A family with `collect(split, ids, k, policy)` is asked for the batch of every inner step k = 0 … steps, and for
    the query set, each collected by the policy after k steps on the batches before; `policy(x)` gives the outputs of
    all tasks for inputs stacked over tasks. It is called in the order of time: an algorithm with `act` remembers what
    it was called with in this batch. Families without `collect` are asked for `draw(split, ids)`.
    """
    collect = getattr(family, "collect", None)
    kind = torch.device(device).type
    reduced = torch.is_autocast_enabled(kind)
    exact = torch.autocast(kind, enabled=False) if reduced else nullcontext()
    if collect is None:
        with exact:  # data are the same in any precision
            episodes = drawn(family, split, ids)  # on the CPU
            return episodes if kind == "cpu" else to_device(episodes, device)
    theta = detached(theta)
    over_tasks = torch.func.vmap
    batches, state = [], None
    for k in range(steps + 1):
        acting = _acting(algorithm, theta, state)

        def policy(x: Any, acting: Callable[[Any], Any] = acting) -> Any:
            with torch.no_grad(), torch.autocast(kind, torch.bfloat16, enabled=reduced, cache_enabled=False):
                return to_device(to_float32(acting(to_device(x, device))), "cpu")  # environments are there

        with exact:
            batch = to_device(collect(split, ids, k, policy), device)
        batches.append(batch)
        if k == steps:
            break
        if state is None:
            state = detached(over_tasks(lambda b: algorithm.begin(theta, b))(batch))
        state = detached(over_tasks(lambda s, b, k=k: algorithm.step(theta, s, b, k))(state, batch))
    return Episode(PerStep(tuple(batches[:-1])) if steps else batches[-1], batches[-1])


def _acting(algorithm: Algorithm, theta: Theta, state: Any) -> Callable[[Any], Any]:
    """x [T, ...] -> outputs of the policies that stand at `state`, stacked over tasks; None: before any data, what the
    algorithm predicts from theta alone. With `act` each call goes on from the memory of the one before.
    """
    over_tasks = torch.func.vmap
    act = getattr(algorithm, "act", None)
    if act is None and state is None:
        return over_tasks(lambda x: algorithm.predict(theta, algorithm.begin(theta, None), x))
    if act is None:
        return lambda x: over_tasks(lambda s, x: algorithm.predict(theta, s, x))(state, x)
    memory = [state]

    def remembering(x: Any) -> Any:
        if memory[0] is None:
            outputs, memory[0] = over_tasks(lambda x: act(theta, algorithm.begin(theta, None), x))(x)
        else:
            outputs, memory[0] = over_tasks(lambda s, x: act(theta, s, x))(memory[0], x)
        return outputs

    return remembering


def to_device(tree: Any, device: torch.device | str) -> Any:
    # one tensor is what a policy sends, once a time step: walking a tree takes as long as a layer
    if isinstance(tree, torch.Tensor):
        return tree.to(device)
    return tree_map(lambda leaf: leaf.to(device), tree)
