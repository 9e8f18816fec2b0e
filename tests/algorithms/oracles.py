"""Helpers of the tests of gradient-based methods: small problems in float64 and their meta-gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from conftest import tree
from torch import Tensor, nn

from distmeta.compute.execution import Execution, shard_gradient
from distmeta.compute.gradient import unroll
from distmeta.config.job import Job
from distmeta.protocols import Episode, Theta
from distmeta.runtime.problem import Problem, build_problem
from distmeta.seeding import task_ids
from distmeta.trees import tree_map

LOOP = Execution("loop", 1)
VMAP = Execution("vmap", 2**31)
TASKS = 4
KINDS: dict[str, dict[str, Any]] = {
    "mlp": {
        "model": {"type": "mlp", "hidden": [16, 16], "activation": "tanh"},
        "tasks": {"type": "sinusoid", "shots": 5, "queries": 5},
    },
    "conv4": {
        "model": {"type": "conv4", "width": 8, "pool": "stride"},
        "tasks": {"type": "digits", "ways": 3, "shots": 1, "queries": 3},
    },
}


class Setting(NamedTuple):
    problem: Problem
    theta: Theta
    episodes: Episode
    ids: np.ndarray


def build_setting(
    algorithm: dict[str, Any], kind: str = "mlp", dtype: torch.dtype = torch.float64, **model: Any
) -> Setting:
    """Build a small problem with this algorithm, its theta at step 0 and four tasks. `model` are model options."""
    job = KINDS[kind] | {"model": KINDS[kind]["model"] | model}
    problem = build_problem(Job.parse(tree(algorithm, **job)))
    theta = {name: value.to(dtype) for name, value in problem.init().items()}
    problem.model.to(dtype=dtype)
    ids = task_ids(0, "train", 0, TASKS)
    episodes = tree_map(
        lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, problem.family.draw("train", ids)
    )
    return Setting(problem, theta, episodes, ids)


def add_noise(theta: Theta, scale: float = 0.1, prefix: str = "") -> Theta:
    """Add normal noise to the entries that start with `prefix`, to leave identities and ties."""
    generator = torch.Generator().manual_seed(5)
    return {
        name: value
        + scale * name.startswith(prefix) * torch.randn(value.shape, generator=generator, dtype=value.dtype)
        for name, value in theta.items()
    }


def gradient(s: Setting, algorithm: Any = None, execution: Execution = LOOP) -> Theta:
    """Return the meta-gradient, summed over tasks."""
    algorithm = algorithm or s.problem.algorithm
    return shard_gradient(algorithm, s.problem.score("train"), s.theta, s.episodes, s.ids, execution).gradient


def maml_gradient(kind: str = "mlp", dtype: torch.dtype = torch.float64, **options: Any) -> Theta:
    """Return MAML's meta-gradient on the same tasks from the same theta."""
    return gradient(build_setting({"type": "maml", **options}, kind, dtype))


def distance(a: Theta, b: Theta) -> float:
    """Return ‖a − b‖ / ‖b‖ over the entries of b."""
    flat_a = torch.cat([a[name].flatten() for name in b])
    flat_b = torch.cat([b[name].flatten() for name in b])
    return float((flat_a - flat_b).norm() / flat_b.norm())


def iterate_tasks(episodes: Episode) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Yield x and y of the support set, x and y of the query set, one task at a time."""
    yield from zip(*episodes.support, *episodes.query, strict=True)


def loss(outputs: Tensor, y: Tensor) -> Tensor:
    if y.is_floating_point():
        return nn.functional.mse_loss(outputs, y)
    return nn.functional.cross_entropy(outputs, y)


def compute_slopes(s: Setting, algorithm: Any = None, h: float = 1e-6) -> tuple[float, float]:
    """Return the slope of the summed meta-loss along a random direction, by central differences and by the gradient."""
    algorithm = algorithm or s.problem.algorithm
    generator = torch.Generator().manual_seed(0)
    direction = {k: torch.randn(v.shape, generator=generator, dtype=v.dtype) for k, v in s.theta.items()}

    def total(step: float) -> float:
        theta = {name: value + step * direction[name] for name, value in s.theta.items()}
        return sum(group_losses(s, theta, algorithm))

    exact = gradient(s, algorithm)
    slope = (total(h) - total(-h)) / (2 * h)
    return slope, sum(float((exact[k] * direction[k]).sum()) for k in exact)


def group_losses(s: Setting, theta: Theta, algorithm: Any) -> Iterator[float]:
    """Yield the meta-loss of each group of tasks, times its number of tasks."""
    size = algorithm.group_size
    for first in range(0, TASKS, size):
        rows = first if size == 1 else slice(first, first + size)
        episode = tree_map(lambda leaf, rows=rows: leaf[rows], s.episodes)
        loss, _ = algorithm.meta_loss(theta, episode, unroll, s.problem.score("train"))
        yield size * float(loss.detach())
