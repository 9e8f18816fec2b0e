"""Episodes of a shard's tasks: drawn, or collected with the policy as it adapts and then replayed as constants."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_map

from distmeta.compute.unroll import detached
from distmeta.core import Algorithm, Episode, PerStep, TaskFamily, Theta, widened


def episodes_of(
    family: TaskFamily,
    algorithm: Algorithm,
    theta: Theta,
    split: str,
    ids: np.ndarray,
    steps: int,
    device: torch.device | str = "cpu",
) -> Episode:
    """Complete data before any gradient: the environment is touched here and nowhere else.

    A family with `collect(split, ids, k, policy)` is asked for the batch of every inner step k = 0 … steps, and for
    the query set, each collected by the policy after k steps on the batches before; `policy(x)` gives the outputs of
    all tasks for inputs stacked over tasks. The others are asked for `draw(split, ids)`.
    """
    collect = getattr(family, "collect", None)
    kind = torch.device(device).type
    reduced, exact = torch.is_autocast_enabled(kind), torch.autocast(kind, enabled=False)
    if collect is None:
        with exact:  # data are the same in any precision
            return to_device(family.draw(split, ids), device)
    theta = detached(theta)
    over_tasks = torch.func.vmap
    batches, state = [], None
    for k in range(steps + 1):

        def policy(x: Any, state: Any = state) -> Any:
            with torch.no_grad(), torch.autocast(kind, torch.bfloat16, enabled=reduced, cache_enabled=False):
                if state is None:  # before any data: what the algorithm predicts from theta alone
                    first = over_tasks(lambda x: algorithm.predict(theta, algorithm.begin(theta, None), x))
                    return widened(first(x))
                return widened(over_tasks(lambda s, x: algorithm.predict(theta, s, x))(state, x))

        with exact:
            batch = to_device(collect(split, ids, k, policy), device)
        batches.append(batch)
        if k == steps:
            break
        if state is None:
            state = detached(over_tasks(lambda b: algorithm.begin(theta, b))(batch))
        state = detached(over_tasks(lambda s, b, k=k: algorithm.step(theta, s, b, k))(state, batch))
    return Episode(PerStep(tuple(batches[:-1])) if steps else batches[-1], batches[-1])


def to_device(tree: Any, device: torch.device | str) -> Any:
    return tree_map(lambda leaf: leaf.to(device), tree)
