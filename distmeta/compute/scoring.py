"""The scores of a shard's tasks before adaptation and after every inner step.

Shapes: T tasks of a shard, K inner steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch

from distmeta.compute.execution import Execution, build_method
from distmeta.compute.gradient import (
    cut_into_chunks,
    detach_tree,
    join_metrics,
    seed_generators,
    support_at,
    to_float32,
)
from distmeta.protocols import Algorithm, Episode, Episodes, Metrics, PerStep, Score, Theta
from distmeta.trees import tree_leaves, tree_map


class Scores(NamedTuple):
    """What `score_tasks` returns."""

    metrics: dict[str, np.ndarray]
    """float64 [T, K+1]: after 0 … K inner steps; [T, 1] without an inner loop."""
    outputs: Any
    """The model's outputs for the query sets after the last step, stacked [T, ...]; a list with one per task if tasks
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
    """Adapt to each task and score its query set after every inner step. No meta-gradient is taken.

    Args:
        steps: number of inner steps; None: `algorithm.inner_steps`.
        outputs: whether to return the model's outputs.
    """
    count = algorithm.inner_steps if steps is None else steps

    def score_task(episode: Episode) -> tuple[Metrics, Any]:
        """Return metrics [K+1], and the last outputs."""
        state = algorithm.begin(theta, support_at(episode.support, 0))
        rows = []
        predicted = None
        for k in range(count + 1):
            is_collected = isinstance(episode.support, PerStep) and k < len(episode.support.batches)
            target = support_at(episode.support, k) if is_collected else episode.query
            predicted = to_float32(algorithm.predict(theta, state, target.x))
            loss, metrics = score(predicted, target)
            rows.append({"loss": loss, **metrics})
            if k < count:
                state = detach_tree(algorithm.step(theta, state, support_at(episode.support, k), k))
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}, predicted

    method = build_method(execution)
    gpus = list({value.device for value in theta.values() if value.is_cuda})
    metrics_of_chunks: list[Metrics] = []
    outputs_of_chunks: list[Any] = []
    positions: list[int] = []
    with torch.no_grad(), torch.random.fork_rng(devices=gpus, enabled=method.is_seeded):
        for chunk in cut_into_chunks(episodes, ids, 1, method):
            if method.is_seeded:
                seed_generators(ids[chunk.positions[0]], gpus)
                metrics, predicted = score_task(tree_map(lambda leaf: leaf[0, 0], chunk.episodes))
                metrics, predicted = tree_map(lambda leaf: leaf[None], (metrics, predicted))
            else:
                tasks = tree_map(lambda leaf: leaf[:, 0], chunk.episodes)
                metrics, predicted = torch.func.vmap(score_task)(tasks)
            metrics_of_chunks.append(metrics)
            positions += chunk.positions
            if outputs:
                outputs_of_chunks.append(predicted)
    columns = join_metrics(metrics_of_chunks, positions)
    if not outputs:
        return Scores(columns, None)
    return Scores(columns, _join_outputs(outputs_of_chunks, positions, isinstance(episodes, list)))


def _join_outputs(chunks: list[Any], positions: list[int], are_unequal: bool) -> Any:
    """Return the outputs of chunks, [n, ...] each, in the order of the tasks: stacked, or a list of unequal ones."""
    if not are_unequal:
        return tree_map(lambda *leaves: torch.cat(leaves), *chunks)
    rows = []
    for chunk in chunks:
        for i in range(len(tree_leaves(chunk)[0])):
            rows.append(tree_map(lambda leaf, i=i: leaf[i], chunk))
    return [row for _, row in sorted(zip(positions, rows, strict=True), key=lambda pair: pair[0])]


@contextmanager
def evaluation_mode(module: torch.nn.Module) -> Iterator[None]:
    """Switch dropout off in the block, then restore each submodule's own mode."""
    modes = {submodule: submodule.training for submodule in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for submodule, is_training in modes.items():
            submodule.training = is_training
