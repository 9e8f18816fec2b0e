"""One shard: the sum of its tasks' meta-gradients, or their scores.

Shapes: T tasks of a shard, G tasks a group (`group_size`), K inner steps, Q query rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from distmeta.compute.unroll import detached, unroll
from distmeta.core import Algorithm, Episode, Metrics, PerStep, Score, Theta, query_loss, support_at


class Execution(NamedTuple):
    """How the tasks of a shard are run. Resolved once before step 0; the bits depend on it."""

    mode: str
    """`loop`: one group after the other, torch's global generator seeded for each; `vmap`: `chunk` groups at once."""
    chunk: int


class ShardSum(NamedTuple):
    gradient: Theta
    """Sum over the shard's finite tasks."""
    tasks: int
    """How many were finite."""
    dropped: tuple[int, ...]
    """Positions in the shard of those that were not."""
    metrics: dict[str, np.ndarray]
    """One number a task, float64 [T]; NaN for dropped tasks."""


def shard_gradient(
    algorithm: Algorithm, score: Score, theta: Theta, episodes: Episode, ids: np.ndarray, execution: Execution
) -> ShardSum:
    """Σ over the shard's tasks of ∇_θ meta_loss, and their metrics.

    Where a sum is not finite, the shard is computed again group by group, and groups with a non-finite gradient
    are left out. A group's loss counts once for each of its tasks, so that sum/tasks is the mean over groups.
    """
    total = partial(_group_total, algorithm, score)
    groups = list(_groups(algorithm.group_size, episodes, ids, execution))
    gradient: Theta | None = None
    metrics: list[Metrics] = []
    for chunk in groups:
        part, rows = _differentiate(total, theta, chunk)
        gradient = part if gradient is None else {n: gradient[n] + part[n] for n in part}
        metrics.append(rows)
    assert gradient is not None, "a shard has at least one group"
    if _finite(gradient):
        return ShardSum(gradient, len(ids), (), _columns(metrics))
    return _group_by_group(total, theta, episodes, ids, algorithm.group_size, execution)


def _group_by_group(
    total: Callable, theta: Theta, episodes: Episode, ids: np.ndarray, size: int, execution: Execution
) -> ShardSum:
    gradient = {name: torch.zeros_like(value) for name, value in theta.items()}
    metrics, dropped = [], []
    for g, chunk in enumerate(_groups(size, episodes, ids, execution._replace(chunk=1))):
        part, rows = _differentiate(total, theta, chunk)
        if _finite(part):
            gradient = {n: gradient[n] + part[n] for n in part}
        else:
            dropped += range(g * size, (g + 1) * size)
            rows = {name: torch.full_like(value, torch.nan) for name, value in rows.items()}
        metrics.append(rows)
    return ShardSum(gradient, len(ids) - len(dropped), tuple(dropped), _columns(metrics))


class _Chunk(NamedTuple):
    episodes: Episode
    """Leaves [groups, G, ...] under vmap, [G, ...] in the loop."""
    vmapped: bool
    seed: int


def _groups(size: int, episodes: Episode, ids: np.ndarray, execution: Execution) -> Iterator[_Chunk]:
    """Cuts the task axis into what is differentiated at once: a group, or a chunk of groups."""
    count = len(ids) // size
    width = execution.chunk if execution.mode == "vmap" else 1
    for first in range(0, count, width):
        groups = min(width, count - first)
        rows = slice(first * size, (first + groups) * size)
        part = tree_map(lambda leaf, rows=rows: leaf[rows], episodes)
        seed = int(ids[first * size]) & (2**63 - 1)
        if execution.mode == "vmap":
            part = tree_map(lambda leaf, n=groups: leaf.reshape(n, size, *leaf.shape[1:]), part)
        yield _Chunk(part, execution.mode == "vmap", seed)


def _differentiate(total: Callable, theta: Theta, chunk: _Chunk) -> tuple[Theta, Metrics]:
    """Gradient of one chunk's summed losses; metrics [groups, G]."""

    def summed(theta: Theta) -> tuple[Tensor, Metrics]:
        if not chunk.vmapped:
            return total(theta, chunk.episodes)
        losses, metrics = torch.func.vmap(total, in_dims=(None, 0))(theta, chunk.episodes)
        return losses.sum(), metrics

    with seeded_draws(None if chunk.vmapped else chunk.seed):
        gradient, metrics = torch.func.grad(summed, has_aux=True)(theta)
    return gradient, {name: value.detach().reshape(-1) for name, value in metrics.items()}


def _group_total(algorithm: Algorithm, score: Score, theta: Theta, group: Episode) -> tuple[Tensor, Metrics]:
    """G times the meta-loss of one group, and its metrics, [G] each: `*_after`, and `*_before` where there is one."""
    single = algorithm.group_size == 1
    episode = tree_map(lambda leaf: leaf[0], group) if single else group
    meta_loss = getattr(algorithm, "meta_loss", None) or partial(query_loss, algorithm)
    loss, after = meta_loss(theta, episode, unroll, score)
    metrics = {f"{name}_after": value.detach().reshape(-1) for name, value in after.items()}
    if algorithm.inner_steps > 0:
        before = [
            _unadapted(algorithm, score, theta, tree_map(lambda leaf, g=g: leaf[g], group))
            for g in range(algorithm.group_size)
        ]
        for name in before[0]:
            metrics[f"{name}_before"] = torch.stack([m[name] for m in before]).reshape(-1)
    return loss * algorithm.group_size, metrics


def _unadapted(algorithm: Algorithm, score: Score, theta: Theta, episode: Episode) -> Metrics:
    """The metrics of the prediction before any inner step."""
    theta = detached(theta)
    target = support_at(episode.support, 0) if isinstance(episode.support, PerStep) else episode.query
    state = algorithm.begin(theta, support_at(episode.support, 0))
    loss, metrics = score(algorithm.predict(theta, state, target.x), target)
    return detached({"loss": loss, **metrics})


class Scores(NamedTuple):
    metrics: dict[str, np.ndarray]
    """float64 [T, K+1]: after 0 … K inner steps; [T, 1] where there is no inner loop."""
    outputs: Any
    """The model's outputs for the query set after the last step, stacked [T, ...]; None unless asked for."""


def score_tasks(
    algorithm: Algorithm,
    score: Score,
    theta: Theta,
    episodes: Episode,
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
            predicted = algorithm.predict(theta, state, target.x)
            loss, metrics = score(predicted, target)
            rows.append({"loss": loss, **metrics})
            if k < length:
                state = detached(algorithm.step(theta, state, support_at(episode.support, k), k))
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}, predicted

    columns: list[Metrics] = []
    kept = []
    with torch.no_grad():
        for chunk in _groups(1, episodes, ids, execution):
            with seeded_draws(None if chunk.vmapped else chunk.seed):
                if chunk.vmapped:
                    one = tree_map(lambda leaf: leaf[:, 0], chunk.episodes)
                    metrics, predicted = torch.func.vmap(curve)(one)
                else:
                    metrics, predicted = curve(tree_map(lambda leaf: leaf[0], chunk.episodes))
                    metrics, predicted = tree_map(lambda leaf: leaf[None], (metrics, predicted))
            columns.append(metrics)
            kept.append(predicted if outputs else None)
    stacked = tree_map(lambda *leaves: torch.cat(leaves), *kept) if outputs else None
    return Scores(_columns(columns), stacked)


def _columns(parts: list[Metrics]) -> dict[str, np.ndarray]:
    return {name: torch.cat([part[name] for part in parts]).double().cpu().numpy() for name in parts[0]}


def _finite(gradient: Theta) -> bool:
    return all(bool(torch.isfinite(value).all()) for value in gradient.values())


class seeded_draws:  # noqa: N801 - a context manager reads as a verb
    """Dropout and other draws from torch's global generator start from `seed`; the generator is put back after."""

    def __init__(self, seed: int | None):
        self.seed = seed
        self.fork = torch.random.fork_rng(devices=range(torch.cuda.device_count()), enabled=seed is not None)

    def __enter__(self) -> None:
        self.fork.__enter__()
        if self.seed is not None:
            torch.manual_seed(self.seed)

    def __exit__(self, *exc: Any) -> None:
        self.fork.__exit__(*exc)
