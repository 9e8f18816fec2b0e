"""Scores of a shard's tasks before adaptation and after every inner step.

Shapes: T tasks of a shard, K inner steps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils._pytree import tree_leaves, tree_map

from distmeta.compute.buckets import buckets
from distmeta.compute.gradient import Execution, chunks, columns_of, seeded_draws
from distmeta.compute.unroll import detached
from distmeta.protocols import (
    Algorithm,
    Episode,
    Episodes,
    Metrics,
    PerStep,
    Score,
    Theta,
    support_at,
    to_float32,
)


class Scores(NamedTuple):
    metrics: dict[str, np.ndarray]
    """float64 [T, K+1]: after 0 … K inner steps; [T, 1] where there is no inner loop."""
    outputs: Any
    """The model's outputs for the query set after the last step, stacked [T, ...], or a list, one a task, where tasks
    differ in shape; None unless asked for."""


def score_tasks(
    algorithm: Algorithm,
    score: Score,
    theta: Theta,
    episodes: Episodes,
    ids: np.ndarray,
    execution: Execution,
    steps: int | None = None,
    outputs: bool = False,
) -> Scores:
    """Adapts to each task and scores its query set after every inner step. No meta-gradient is taken."""
    length = algorithm.inner_steps if steps is None else steps

    def curve(episode: Episode) -> tuple[Metrics, Any]:
        state = algorithm.begin(theta, support_at(episode.support, 0))
        rows, predicted = [], None
        for k in range(length + 1):
            collected = isinstance(episode.support, PerStep) and k < len(episode.support.batches)
            target = support_at(episode.support, k) if collected else episode.query
            predicted = to_float32(algorithm.predict(theta, state, target.x))
            loss, metrics = score(predicted, target)
            rows.append({"loss": loss, **metrics})
            if k < length:
                state = detached(algorithm.step(theta, state, support_at(episode.support, k), k))
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}, predicted

    columns: list[Metrics] = []
    kept: list[Any] = []
    positions: list[int] = []
    with torch.no_grad():
        for chunk in chunks(buckets(episodes), 1, ids, execution):
            with seeded_draws(chunk.seed, theta):
                if chunk.vmapped:
                    one = tree_map(lambda leaf: leaf[:, 0], chunk.episodes)
                    metrics, predicted = torch.func.vmap(curve)(one)
                else:
                    metrics, predicted = curve(tree_map(lambda leaf: leaf[0, 0], chunk.episodes))
                    metrics, predicted = tree_map(lambda leaf: leaf[None], (metrics, predicted))
            columns.append(metrics)
            positions += chunk.positions
            kept.append(predicted if outputs else None)
    rows = columns_of(columns, positions)
    return Scores(rows, _outputs(kept, positions, isinstance(episodes, list)) if outputs else None)


def _outputs(parts: list[Any], positions: list[int], unequal: bool) -> Any:
    """The outputs of chunks, [n, ...] each, in the order of the tasks: stacked, or a list where tasks are unequal."""
    if not unequal:
        return tree_map(lambda *leaves: torch.cat(leaves), *parts)
    sizes = [len(tree_leaves(part)[0]) for part in parts]
    rows = [
        tree_map(lambda leaf, i=i: leaf[i], part)
        for part, n in zip(parts, sizes, strict=True)
        for i in range(n)
    ]
    return [row for _, row in sorted(zip(positions, rows, strict=True), key=lambda pair: pair[0])]
