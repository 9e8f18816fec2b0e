"""What the gradient-based methods are tested with: small problems in float64, their meta-gradient, peers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from conftest import tree
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from distmeta.compute.execution import Execution, shard_gradient
from distmeta.compute.gradient import unroll
from distmeta.config.job import Job
from distmeta.protocols import Episode, Theta
from distmeta.runtime.problem import Problem, build_problem
from distmeta.seeding import task_ids

LOOP, VMAP = Execution("loop", 1), Execution("vmap", 2**31)
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


def setting(
    algorithm: dict[str, Any], kind: str = "mlp", dtype: torch.dtype = torch.float64, **model: Any
) -> Setting:
    """A small problem with the algorithm, its first theta and four tasks; `model` are options of its model."""
    job = KINDS[kind] | {"model": KINDS[kind]["model"] | model}
    problem = build_problem(Job.parse(tree(algorithm, **job)))
    theta = {name: value.to(dtype) for name, value in problem.init().items()}
    problem.model.to(dtype=dtype)
    ids = task_ids(0, "train", 0, TASKS)
    episodes = tree_map(
        lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, problem.family.draw("train", ids)
    )
    return Setting(problem, theta, episodes, ids)


def noisy(theta: Theta, scale: float = 0.1, prefix: str = "") -> Theta:
    """theta with normal noise on the entries that start with `prefix`: away from identities and ties."""
    generator = torch.Generator().manual_seed(5)
    return {
        name: value
        + scale * name.startswith(prefix) * torch.randn(value.shape, generator=generator, dtype=value.dtype)
        for name, value in theta.items()
    }


def gradient(s: Setting, algorithm: Any = None, execution: Execution = LOOP) -> Theta:
    """The sum over tasks of the meta-gradient."""
    algorithm = algorithm or s.problem.algorithm
    return shard_gradient(algorithm, s.problem.score("train"), s.theta, s.episodes, s.ids, execution).gradient


def maml(kind: str = "mlp", dtype: torch.dtype = torch.float64, **options: Any) -> Theta:
    """MAML's meta-gradient on the same tasks from the same initialisation."""
    return gradient(setting({"type": "maml", **options}, kind, dtype))


def distance(a: Theta, b: Theta) -> float:
    """‖a − b‖ / ‖b‖ over the entries of b."""
    flat = [torch.cat([t[name].flatten() for name in b]) for t in (a, b)]
    return float((flat[0] - flat[1]).norm() / flat[1].norm())


def tasks(episodes: Episode) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """x and y of the support, x and y of the query, task after task."""
    yield from zip(*episodes.support, *episodes.query, strict=True)


def loss(outputs: Tensor, y: Tensor) -> Tensor:
    return (
        nn.functional.mse_loss(outputs, y)
        if y.is_floating_point()
        else nn.functional.cross_entropy(outputs, y)
    )


def slope_and_gradient(s: Setting, algorithm: Any = None, h: float = 1e-6) -> tuple[float, float]:
    """Along a random direction in theta: the central difference of the summed meta-loss, and ⟨gradient, direction⟩."""
    algorithm = algorithm or s.problem.algorithm
    generator = torch.Generator().manual_seed(0)
    direction = {k: torch.randn(v.shape, generator=generator, dtype=v.dtype) for k, v in s.theta.items()}

    def total(step: float) -> float:
        theta = {name: value + step * direction[name] for name, value in s.theta.items()}
        return sum(group_losses(s, theta, algorithm))

    exact = gradient(s, algorithm)
    return (total(h) - total(-h)) / (2 * h), sum(float((exact[k] * direction[k]).sum()) for k in exact)


def group_losses(s: Setting, theta: Theta, algorithm: Any) -> Iterator[float]:
    """The meta-loss of each group of tasks, once for each of its tasks."""
    size = algorithm.group_size
    for first in range(0, TASKS, size):
        rows: Callable[[Tensor], Tensor] = lambda leaf, i=first: leaf[i] if size == 1 else leaf[i : i + size]  # noqa: E731
        episode = tree_map(rows, s.episodes)
        yield size * float(algorithm.meta_loss(theta, episode, unroll, s.problem.score("train"))[0])
