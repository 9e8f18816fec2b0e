"""The gradient of one shard: the sum of its tasks' meta-gradients, computed one group of tasks after the other.

A group is what one loss needs together: one task, or two for pairwise losses. `compute.execution` holds the other ways
to compute the same sum: many groups at once, compiled, or with less memory.

Shapes: T tasks of a shard, G tasks of a group (`Algorithm.group_size`), K inner steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from distmeta.compute.buckets import Bucket, group_by_shape
from distmeta.errors import InputError
from distmeta.protocols import (
    Algorithm,
    Episode,
    Episodes,
    HasMetaLoss,
    Metrics,
    PerStep,
    Score,
    Theta,
    Unroll,
)
from distmeta.seeding import torch_seed
from distmeta.trees import tree_map

# --- One task -----------------------------------------------------------------------------------------------------


def unroll(
    algorithm: Algorithm,
    theta: Theta,
    support: Any,
    steps: int | None = None,
    detach: bool = False,
    every: bool = False,
) -> Any:
    """Run the inner loop.

    Args:
        steps: number of inner steps; None: `algorithm.inner_steps`.
        detach: return the states as constants. Otherwise the graph of every step is kept for the meta-gradient.
        every: return the list of the states after each step, [K], instead of the last one.
    """
    state = algorithm.begin(theta, support_at(support, 0))
    states = []
    for k in range(algorithm.inner_steps if steps is None else steps):
        state = algorithm.step(theta, state, support_at(support, k), k)
        if detach:
            state = detach_tree(state)
        if every:
            states.append(state)
    return states if every else state


def support_at(support: Any, k: int) -> Any:
    """Return the support data that inner step `k` sees. Steps after the last collected one see the last batch."""
    if isinstance(support, PerStep):
        return support.batches[min(k, len(support.batches) - 1)]
    return support


def detach_tree(tree: Any) -> Any:
    """Return the pytree with its tensors as constants."""
    return tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, tree)


def to_float32(outputs: Any) -> Any:
    """Return the outputs with bfloat16 tensors as float32. Losses and distances need more than eight bits."""
    if not isinstance(outputs, Tensor):
        return tree_map(lambda leaf: to_float32(leaf) if isinstance(leaf, Tensor) else leaf, outputs)
    return outputs.float() if outputs.dtype == torch.bfloat16 else outputs


def query_loss(
    algorithm: Algorithm, theta: Theta, episode: Episode, unroll: Unroll, score: Score
) -> tuple[Tensor, Metrics]:
    """Return the default meta-loss, L_query(φ_K), where φ_K is the state after the inner loop on the support set."""
    state = unroll(algorithm, theta, episode.support)
    outputs = to_float32(algorithm.predict(theta, state, episode.query.x))
    loss, metrics = score(outputs, episode.query)
    return loss, {"loss": loss, **metrics}


# --- One group ----------------------------------------------------------------------------------------------------


class Objective(NamedTuple):
    """What a shard differentiates, group by group."""

    algorithm: Algorithm
    score: Score
    meta_loss: Callable[[Theta, Episode, Unroll, Score], tuple[Tensor, Metrics]]
    scores_before: bool
    """Whether tasks are also scored before adaptation."""


def build_objective(algorithm: Algorithm, score: Score, scores_before: bool = True) -> Objective:
    """Look up the algorithm's meta-loss. Without inner steps there are no scores before adaptation."""
    has_own_loss = isinstance(algorithm, HasMetaLoss)
    meta_loss = algorithm.meta_loss if has_own_loss else partial(query_loss, algorithm)
    return Objective(algorithm, score, meta_loss, scores_before and algorithm.inner_steps > 0)


def group_loss(
    objective: Objective, theta: Theta, group: Episode, unroll: Unroll = unroll
) -> tuple[Tensor, Metrics]:
    """Return the meta-loss of a group (leaves [G, ...]) and its metrics `*_after`, [G] each."""
    is_single_task = objective.algorithm.group_size == 1
    episode = tree_map(lambda leaf: leaf[0], group) if is_single_task else group
    loss, metrics = objective.meta_loss(theta, episode, unroll, objective.score)
    if loss.dim():
        raise InputError(f"algorithm: its meta_loss has shape {list(loss.shape)}, expected one number, []")
    return loss, {f"{name}_after": value.detach().reshape(-1) for name, value in metrics.items()}


def score_before_adaptation(objective: Objective, theta: Theta, group: Episode) -> Metrics:
    """Return the metrics `*_before` of the predictions before any inner step, [G] each; {} if not asked for."""
    if not objective.scores_before:
        return {}
    algorithm = objective.algorithm
    rows = []
    for g in range(algorithm.group_size):
        episode = tree_map(lambda leaf, g=g: leaf[g], group)
        support = support_at(episode.support, 0)
        # data that a policy collected show how good that policy is: those of step 0 are the unadapted one's
        target = support if isinstance(episode.support, PerStep) else episode.query
        with torch.no_grad():
            state = algorithm.begin(theta, support)
            outputs = to_float32(algorithm.predict(theta, state, target.x))
            loss, metrics = objective.score(outputs, target)
        rows.append({"loss": loss, **metrics})
    return {f"{name}_before": torch.stack([row[name] for row in rows]) for name in rows[0]}


def differentiate(
    loss_function: Callable[[Theta], tuple[Tensor, Metrics]], theta: Theta
) -> tuple[Theta, Metrics]:
    """Return ∇_θ of a loss, and its metrics. On a CPU this costs less than `torch.func.grad`; vmap cannot run it."""
    with torch.enable_grad():
        leaves = {name: value.detach().requires_grad_() for name, value in theta.items()}
        loss, metrics = loss_function(leaves)
    if not loss.requires_grad:
        return {name: torch.zeros_like(value) for name, value in theta.items()}, metrics
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    gradient = {
        name: torch.zeros_like(value) if part is None else part
        for (name, value), part in zip(theta.items(), found, strict=True)
    }
    return gradient, metrics


class ChunkSum(NamedTuple):
    """The result for groups that are computed at once."""

    gradient: Theta
    """Sum over the finite groups, each counted once per task."""
    is_finite: Tensor
    """bool [groups]."""
    metrics: Metrics
    """One number per task, [groups · G] each."""


def compute_group(objective: Objective, theta: Theta, chunk: Episode) -> ChunkSum:
    """Compute the gradient of a chunk that is a single group, leaves [1, G, ...]."""
    group = tree_map(lambda leaf: leaf[0], chunk)
    gradient, metrics = differentiate(lambda theta: group_loss(objective, theta, group), theta)
    metrics |= score_before_adaptation(objective, theta, group)
    gradients = {name: value[None] for name, value in gradient.items()}
    return sum_groups(gradients, metrics, objective.algorithm.group_size)


def sum_groups(gradients: Theta, metrics: Metrics, group_size: int, is_traced: bool = False) -> ChunkSum:
    """Add the gradients of groups, leaves [groups, ...]; leave out those that are not finite.

    Args:
        is_traced: whether a compiler traces this. It cannot branch on values; a GPU would have to be waited for.
    """
    is_finite = find_finite_groups(gradients)
    if is_traced or is_finite.is_cuda or not bool(is_finite.all()):
        gradients = {
            name: torch.where(is_finite.view(-1, *[1] * (value.dim() - 1)), value, 0)
            for name, value in gradients.items()
        }
    total = {name: value.sum(0) if len(value) > 1 else value[0] for name, value in gradients.items()}
    if group_size > 1:
        total = {name: value * group_size for name, value in total.items()}
    return ChunkSum(total, is_finite, {name: value.reshape(-1) for name, value in metrics.items()})


def find_finite_groups(gradients: Theta) -> Tensor:
    """Return which groups have a finite gradient, bool [groups]."""
    found = []
    for value in gradients.values():
        if value.numel() == 0:
            continue
        rows = value.reshape(len(value), -1)
        # the minimum of numbers is NaN if any of them is (`aminmax` over one axis takes ten times as long)
        found.append(torch.isfinite(rows.amin(1)) & torch.isfinite(rows.amax(1)))
    return torch.stack(found).all(0)


# --- One shard ----------------------------------------------------------------------------------------------------


class ShardGradient(NamedTuple):
    """The result for a shard."""

    gradient: Theta
    """Sum over the shard's finite tasks."""
    tasks: int
    """Number of finite tasks."""
    dropped: tuple[int, ...]
    """Positions in the shard of the tasks that were not finite."""
    metrics: dict[str, np.ndarray]
    """One number per task, float64 [T]; NaN for dropped tasks."""


class Method(NamedTuple):
    """A way to compute the groups of a shard. `compute.execution.build_method` builds those that a job asks for."""

    compute_chunk: Callable[[Objective, Theta, Episode], ChunkSum] = compute_group
    groups_per_chunk: int = 1
    groups_per_unequal_chunk: int = 1
    """The same, if the tasks of the shard have unequal shapes."""
    is_seeded: bool = True
    """Whether torch's global generator starts from a seed for each chunk (for dropout)."""


def sum_gradients(
    objective: Objective,
    theta: Theta,
    episodes: Episodes,
    ids: np.ndarray,
    method: Method,
    into: Theta | None = None,
) -> ShardGradient:
    """Add ∇_θ meta_loss over the shard's finite tasks.

    A group whose gradient is not finite is left out. A group's loss counts once per task, so that sum / tasks is the
    mean over groups. Tasks of unequal shapes are added shape by shape, in the order in which the shapes first occur.

    Args:
        ids: of the tasks, uint64 [T].
        into: tensors of theta's shapes for the sum; None: new ones.
    """
    size = objective.algorithm.group_size
    total = {name: torch.empty_like(value) for name, value in theta.items()} if into is None else into
    gpus = list({value.device for value in theta.values() if value.is_cuda})
    results: list[ChunkSum] = []
    positions: list[int] = []
    with torch.random.fork_rng(devices=gpus, enabled=method.is_seeded):
        for chunk in cut_into_chunks(episodes, ids, size, method):
            if method.is_seeded:
                seed_generators(ids[chunk.positions[0]], gpus)
            result = method.compute_chunk(objective, theta, chunk.episodes)
            with torch.no_grad():  # in place: new memory costs a large theta more than the additions
                for name, value in total.items():
                    value.add_(result.gradient[name]) if results else value.copy_(result.gradient[name])
            results.append(result)
            positions += chunk.positions
    # values are read only here, where a GPU is waited for
    is_finite = np.repeat(torch.cat([result.is_finite for result in results]).cpu().numpy(), size)
    dropped = sorted(np.asarray(positions)[~is_finite].tolist())
    columns = join_metrics([result.metrics for result in results], positions)
    for column in columns.values():
        column[dropped] = np.nan
    return ShardGradient(total, len(ids) - len(dropped), tuple(dropped), columns)


def seed_generators(task_id: int | np.integer, gpus: Sequence[torch.device]) -> None:
    """Start torch's global generators from the task's seed. (`torch.manual_seed` is slow: it seeds every device.)"""
    seed = torch_seed(task_id)
    torch.default_generator.manual_seed(seed)
    for device in gpus:
        torch.cuda.default_generators[device.index].manual_seed(seed)


class Chunk(NamedTuple):
    """Groups that are computed at once."""

    episodes: Episode
    """Leaves [groups, G, ...]."""
    positions: Sequence[int]
    """Positions of its tasks in the shard."""


def cut_into_chunks(episodes: Episodes, ids: np.ndarray, group_size: int, method: Method) -> Iterator[Chunk]:
    """Cut the task axis, shape by shape, into the groups that are computed at once."""
    if isinstance(episodes, list):
        buckets = group_by_shape(episodes, group_size)
    else:
        buckets = [Bucket(episodes, range(len(ids)))]
    width = method.groups_per_chunk if len(buckets) == 1 else method.groups_per_unequal_chunk
    for stacked, positions in buckets:
        count = len(positions) // group_size
        for first in range(0, count, width):
            groups = min(width, count - first)
            rows = slice(first * group_size, (first + groups) * group_size)

            def cut(leaf: Tensor, rows: slice = rows, groups: int = groups) -> Tensor:
                return leaf[rows].reshape(groups, group_size, *leaf.shape[1:])

            yield Chunk(tree_map(cut, stacked), positions[rows])


def join_metrics(parts: list[Metrics], positions: Sequence[int]) -> dict[str, np.ndarray]:
    """Return the chunks' metrics as float64 columns, in the order of the tasks."""
    columns = {}
    for name in parts[0]:
        computed = torch.cat([part[name] for part in parts]).double().cpu().numpy()
        columns[name] = np.empty_like(computed)
        columns[name][np.asarray(positions)] = computed
    return columns
