"""The episodes of a shard's tasks. They are complete before any gradient is taken.

Most families draw them from the ids. A family that collects data (`CollectsData`) needs the policies as they adapt.
What it collects is then replayed as constants.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from distmeta.compute.buckets import stack_if_equal
from distmeta.compute.conversion import convert_data, convert_episodes
from distmeta.compute.gradient import detach_tree, to_float32
from distmeta.protocols import (
    ActsWithMemory,
    Algorithm,
    CollectsData,
    Episode,
    Episodes,
    PerStep,
    State,
    TaskFamily,
    Theta,
)
from distmeta.trees import tree_map


def make_episodes(
    family: TaskFamily,
    algorithm: Algorithm,
    theta: Theta,
    split: str,
    ids: np.ndarray,
    steps: int,
    device: torch.device | str = "cpu",
) -> Episodes:
    """Draw or collect the episodes of the tasks `ids` (uint64 [T]), and move them to a device.

    Args:
        theta: only used by families that collect data.
        steps: inner steps for which data are collected.
    """
    if isinstance(family, CollectsData):
        return collect_episodes(family, algorithm, theta, split, ids, steps, device)
    return draw_episodes(family, split, ids, device)


def draw_episodes(
    family: TaskFamily, split: str, ids: np.ndarray, device: torch.device | str = "cpu"
) -> Episodes:
    """Draw the episodes of the tasks `ids` (uint64 [T]), and move them to a device.

    Raises:
        InputError: the family did not return one episode per task.
    """
    episodes = convert_episodes(family.draw(split, ids), family.score)
    if isinstance(episodes, list):
        episodes = stack_if_equal(episodes, len(ids))
    return episodes if torch.device(device).type == "cpu" else to_device(episodes, device)


def collect_episodes(
    family: CollectsData,
    algorithm: Algorithm,
    theta: Theta,
    split: str,
    ids: np.ndarray,
    steps: int,
    device: torch.device | str = "cpu",
) -> Episode:
    """Collect the data of every inner step k = 0 … steps - 1, and of the query set.

    Each batch is collected with the policies after k steps on the batches before. `policy(x)` returns the outputs of
    all tasks for inputs that are stacked over tasks. The family calls it in the order of time.
    """
    theta = detach_tree(theta)
    vmap = torch.func.vmap
    batches = []
    state = None
    for k in range(steps + 1):
        act = _build_policy(algorithm, theta, state)

        def policy(x: Any, act: Callable[[Any], Any] = act) -> Any:
            with torch.no_grad():
                outputs = to_float32(
                    act(to_device(convert_data(x, "the x that collect gives a policy"), device))
                )
            return to_device(outputs, "cpu")  # the environments are on the CPU

        batch = convert_data(family.collect(split, ids, k, policy), "collect returned a batch")
        batch = to_device(batch, device)
        batches.append(batch)
        if k == steps:
            break
        if state is None:
            state = detach_tree(vmap(lambda batch: algorithm.begin(theta, batch))(batch))

        def step(state: State, batch: Any, k: int = k) -> State:
            return algorithm.step(theta, state, batch, k)

        state = detach_tree(vmap(step)(state, batch))
    support = PerStep(tuple(batches[:-1])) if steps else batches[-1]
    return Episode(support, batches[-1])


def _build_policy(algorithm: Algorithm, theta: Theta, state: State | None) -> Callable[[Any], Any]:
    """Return a function from inputs x [T, ...] to the outputs of the tasks' policies.

    Args:
        state: the policies' states, stacked over tasks; None: before any data, the policy that theta predicts.
    """
    vmap = torch.func.vmap
    if isinstance(algorithm, ActsWithMemory):
        return _build_policy_with_memory(algorithm, theta, state)
    if state is None:
        return vmap(lambda x: algorithm.predict(theta, algorithm.begin(theta, None), x))
    return lambda x: vmap(lambda state, x: algorithm.predict(theta, state, x))(state, x)


def _build_policy_with_memory(algorithm: Any, theta: Theta, state: State | None) -> Callable[[Any], Any]:
    """Return a policy whose every call continues from the memory of the call before."""
    vmap = torch.func.vmap
    memory = state

    def act(x: Any) -> Any:
        nonlocal memory
        if memory is None:
            outputs, memory = vmap(lambda x: algorithm.act(theta, algorithm.begin(theta, None), x))(x)
        else:
            outputs, memory = vmap(lambda memory, x: algorithm.act(theta, memory, x))(memory, x)
        return outputs

    return act


def to_device(tree: Any, device: torch.device | str) -> Any:
    """Move the tensors of a pytree to a device."""
    if isinstance(tree, torch.Tensor):  # the common case in a policy's time step; walking a tree is slow
        return tree.to(device)
    return tree_map(lambda leaf: leaf.to(device), tree)
