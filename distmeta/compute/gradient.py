"""One shard: the sum of its tasks' meta-gradients.

Shapes: T tasks of a shard, G tasks a group (`group_size`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from distmeta.compute.buckets import Bucket, buckets, in_order
from distmeta.compute.compiler import Compiler
from distmeta.compute.constant_memory import Vjp, constant_memory, reverse_vjp
from distmeta.compute.episodes import to_device
from distmeta.compute.schedules import scheduled_of, structure_of, with_scheduled
from distmeta.compute.unroll import unroll
from distmeta.errors import InputError
from distmeta.protocols import (
    Algorithm,
    Episode,
    Episodes,
    Metrics,
    PerStep,
    Score,
    Theta,
    Unroll,
    query_loss,
    support_at,
    to_float32,
)
from distmeta.seeding import torch_seed

WHOLE_SHARD = 2**31
"""A chunk that no shard exceeds."""


class Execution(NamedTuple):
    """How the tasks of a shard are run. Resolved once before step 0; the bits depend on it."""

    mode: str
    """`loop`: one group after the other, torch's global generator seeded for each; `vmap`: `chunk` groups at once."""
    chunk: int
    differentiation: str = "reverse"
    """`reverse`: through the whole graph of the inner loop; `constant-memory`: step by step (compute.adjoint)."""


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
    algorithm: Algorithm,
    score: Score,
    theta: Theta,
    episodes: Episodes,
    ids: np.ndarray,
    execution: Execution,
    compiler: Compiler | None = None,
    into: Theta | None = None,
    before: bool = True,
) -> ShardSum:
    """Σ over the shard's finite tasks of ∇_θ meta_loss, and their metrics.

    A group whose gradient is not finite is left out. A group's loss counts once for each of its tasks, so that
    sum / tasks is the mean over groups. Tasks of unequal shapes are added shape by shape, in the order in which these
    are first met. With a `compiler`, a chunk's sum is one compiled program; groups of unequal tasks are then chunks of
    their own, so that there is one program a shape.

    Args:
        into: tensors of theta's shapes that the sum is written to, and returned as; None: new ones.
        before: whether tasks are also scored before adaptation, where there is an inner loop.
    """
    size = algorithm.group_size
    before = before and algorithm.inner_steps > 0
    sum_of = partial(
        _chunk_sum if compiler is None else partial(_compiled_sum, compiler), score, execution, before
    )
    total = {name: torch.empty_like(value) for name, value in theta.items()} if into is None else into
    metrics: list[Metrics] = []
    positions: list[int] = []
    finite: list[Tensor] = []
    found = buckets(episodes, size)
    cut = execution._replace(chunk=1) if compiler is not None and len(found) > 1 else execution
    for chunk in chunks(found, size, ids, cut):
        with seeded_draws(chunk.seed, theta):
            parts, good, rows = sum_of(algorithm, theta, chunk.episodes)
        with torch.no_grad():  # in place: memory of its own costs a large theta more than the adding
            for name, value in total.items():
                value.add_(parts[name]) if metrics else value.copy_(parts[name])
        metrics.append(rows)
        positions += chunk.positions
        finite.append(good)
    kept = np.repeat(torch.cat(finite).cpu().numpy(), size)  # looked at once: a GPU is waited for here alone
    columns, dropped = columns_of(metrics, positions), sorted(np.asarray(positions)[~kept].tolist())
    for column in columns.values():
        column[dropped] = np.nan
    return ShardSum(total, len(ids) - len(dropped), tuple(dropped), columns)


class Chunk(NamedTuple):
    episodes: Episode
    """Leaves [groups, G, ...]; one group in the loop."""
    positions: Sequence[int]
    """Of its tasks in the shard."""
    seed: int | None
    """Of draws from torch's global generator; None: of a vectorised chunk, which has none."""

    @property
    def vmapped(self) -> bool:
        return self.seed is None


def chunks(found: list[Bucket], size: int, ids: np.ndarray, execution: Execution) -> Iterator[Chunk]:
    """Cuts the task axis of each bucket into what is computed at once: a group, or a chunk of groups."""
    width = execution.chunk if execution.mode == "vmap" else 1
    for episodes, positions in found:
        count = len(positions) // size
        for first in range(0, count, width):
            groups = min(width, count - first)
            rows = slice(first * size, (first + groups) * size)
            part = tree_map(
                lambda leaf, rows=rows, n=groups: leaf[rows].reshape(n, size, *leaf.shape[1:]), episodes
            )
            seed = None if execution.mode == "vmap" else torch_seed(ids[positions[rows.start]])
            yield Chunk(part, positions[rows], seed)


def columns_of(parts: list[Metrics], positions: Sequence[int]) -> dict[str, np.ndarray]:
    """The chunks' metrics as float64 columns, in the order of the tasks."""
    joined = {name: torch.cat([part[name] for part in parts]).double().cpu().numpy() for name in parts[0]}
    return {name: in_order(column, positions) for name, column in joined.items()}


def _compiled_sum(
    compiler: Compiler,
    score: Score,
    execution: Execution,
    before: bool,
    algorithm: Algorithm,
    theta: Theta,
    episodes: Episode,
) -> tuple[Theta, Tensor, Metrics]:
    """`_chunk_sum` by one program for all outer steps that differ in the algorithm's scheduled numbers alone."""

    def sum_of(theta: Theta, episodes: Episode, numbers: Any) -> tuple[Theta, Tensor, Metrics]:
        now = with_scheduled(algorithm, numbers)
        return _chunk_sum(score, execution, before, now, theta, episodes, traced=True)

    numbers = to_device(scheduled_of(algorithm), next(iter(theta.values())).device)
    return compiler((structure_of(algorithm), execution, before), sum_of, theta, episodes, numbers)


def _chunk_sum(
    score: Score,
    execution: Execution,
    before: bool,
    algorithm: Algorithm,
    theta: Theta,
    episodes: Episode,
    traced: bool = False,
) -> tuple[Theta, Tensor, Metrics]:
    """Σ over finite groups, each counted once a task; which are finite, bool [groups]; the metrics of tasks.

    `traced`: compiled code cannot look at values, and chooses number by number; on a GPU a look would wait for it.
    Under vmap it is the gradient that is vectorised, not the loss: the second derivatives of batch and layer norm
    are wrong in the gradient of a vectorised loss (torch 2.13), and right in vectorised gradients.
    """
    vmapped = execution.mode == "vmap"
    gradient_of = partial(_group_gradient, algorithm, score, execution.differentiation, not vmapped, before)
    if vmapped:
        parts, metrics = torch.func.vmap(gradient_of, (None, 0))(theta, episodes)
    else:
        parts, metrics = gradient_of(theta, tree_map(lambda leaf: leaf[0], episodes))
        parts = {name: value[None] for name, value in parts.items()}
    finite = _finite_groups(parts)
    if traced or finite.is_cuda or not bool(finite.all()):
        parts = {name: torch.where(_column(finite, value), value, 0) for name, value in parts.items()}
    total = {name: value.sum(0) if len(value) > 1 else value[0] for name, value in parts.items()}
    if algorithm.group_size > 1:
        total = {name: value * algorithm.group_size for name, value in total.items()}
    return total, finite, {name: value.reshape(-1) for name, value in metrics.items()}


def _group_gradient(
    algorithm: Algorithm,
    score: Score,
    differentiation: str,
    plain: bool,
    before: bool,
    theta: Theta,
    group: Episode,
) -> tuple[Theta, Metrics]:
    """The gradient of one group's meta-loss, leaves [G, ...], and the metrics of its tasks, [G] each.

    `plain`: by plain autograd, which costs less on a CPU than torch.func, but does not run under vmap.
    """
    vjp: Vjp = reverse_vjp if plain else torch.func.vjp
    if differentiation == "constant-memory":
        gradient, metrics = constant_memory(
            lambda theta, unroll: _group_loss(algorithm, score, theta, group, unroll), theta, vjp
        )
    else:
        value, pull, metrics = vjp(
            lambda theta: _group_loss(algorithm, score, theta, group, unroll), theta, has_aux=True
        )
        (gradient,) = pull(torch.ones_like(value))
    if not before:
        return gradient, metrics
    with torch.no_grad():
        return gradient, metrics | _group_before(algorithm, score, theta, group)


def _group_loss(
    algorithm: Algorithm, score: Score, theta: Theta, group: Episode, unroll: Unroll
) -> tuple[Tensor, Metrics]:
    """The meta-loss of one group, leaves [G, ...], and its metrics `*_after`, [G] each."""
    episode = tree_map(lambda leaf: leaf[0], group) if algorithm.group_size == 1 else group
    meta_loss = getattr(algorithm, "meta_loss", None) or partial(query_loss, algorithm)
    loss, after = meta_loss(theta, episode, unroll, score)
    if loss.dim():
        raise InputError(f"algorithm: its meta_loss has shape {list(loss.shape)}, expected one number, []")
    return loss, {f"{name}_after": value.detach().reshape(-1) for name, value in after.items()}


def holds_graphs(algorithm: Algorithm, score: Score, theta: Theta, episodes: Episode) -> bool:
    """Whether the meta-loss of a group of tasks, leaves [G, ...], goes back through its inner loops."""
    asked: list[bool] = []

    def watched(
        algorithm: Algorithm,
        theta: Theta,
        support: Any,
        steps: int | None = None,
        detach: bool = False,
        every: bool = False,
    ) -> Any:
        asked.append(detach)
        return unroll(algorithm, theta, support, steps, detach, every)

    with torch.no_grad():
        _group_loss(algorithm, score, theta, episodes, watched)
    return not all(asked) and not getattr(algorithm, "first_order", False)


def _group_before(algorithm: Algorithm, score: Score, theta: Theta, group: Episode) -> Metrics:
    """The metrics `*_before` of the prediction before any inner step, [G] each."""
    rows = []
    for g in range(algorithm.group_size):
        episode = tree_map(lambda leaf, g=g: leaf[g], group)
        support = support_at(episode.support, 0)
        target = support if isinstance(episode.support, PerStep) else episode.query
        state = algorithm.begin(theta, support)
        loss, metrics = score(to_float32(algorithm.predict(theta, state, target.x)), target)
        rows.append({"loss": loss, **metrics})
    return {f"{name}_before": torch.stack([row[name] for row in rows]) for name in rows[0]}


def _finite_groups(parts: Theta) -> Tensor:
    """Which groups have a finite gradient, bool [groups]."""
    found = []
    for value in parts.values():
        if value.numel() == 0:
            continue
        rows = value.reshape(len(value), -1)
        # the extremes of numbers with a NaN among them are NaN (`aminmax` over one axis takes ten times as long)
        found.append(torch.isfinite(rows.amin(1)) & torch.isfinite(rows.amax(1)))
    return torch.stack(found).all(0)


def _column(mask: Tensor, value: Tensor) -> Tensor:
    """A mask over the first axis, ready to broadcast against a value."""
    return mask.view(-1, *[1] * (value.dim() - 1))


class seeded_draws:  # noqa: N801 - a context manager reads as a verb
    """Dropout and other draws from torch's global generator start from `seed`; the generator is put back after."""

    def __init__(self, seed: int | None, theta: Theta):
        self.seed = seed
        # a job on the CPU leaves CUDA alone
        self.gpus = list({value.device for value in theta.values() if value.is_cuda})
        self.fork = torch.random.fork_rng(devices=self.gpus, enabled=seed is not None)

    def __enter__(self) -> None:
        self.fork.__enter__()
        if self.seed is not None:
            # torch.manual_seed takes a third of a millisecond: it seeds whatever else there is, too
            torch.default_generator.manual_seed(self.seed)
            for device in self.gpus:
                torch.cuda.default_generators[device.index].manual_seed(self.seed)

    def __exit__(self, *exc: Any) -> None:
        self.fork.__exit__(*exc)
