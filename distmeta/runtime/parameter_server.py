"""The parameter server: averages what the shards return, and owns theta and the outer optimizer.

    theta ← theta − optimizer(g · min(1, clip_norm / ‖g‖)),   g the mean meta-gradient over the step's finite tasks

Sums do not depend on the order of arrival, so the bits of theta do not depend on the cluster.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from distmeta.compute.memory import keep_freed_memory
from distmeta.compute.vectors import BLOCK, Layout
from distmeta.config.sections import OuterSection
from distmeta.protocols import Theta
from distmeta.runtime.outer_optimizer import ElementwiseOptimizer, OuterOptimizer, check_theta, read_clock
from distmeta.runtime.outer_rates import OuterRates
from distmeta.runtime.own_optimizer import OwnOptimizer
from distmeta.runtime.shards import ShardResult

# --- Averages -----------------------------------------------------------------------------------------------------


def tree_sum(vectors: list[np.ndarray]) -> np.ndarray:
    """Return the sum by a fixed binary tree over the list's index: ((0+1)+(2+3))+…; an odd one out moves up.

    It is computed block by block, so that partial sums stay in the processor's cache: each vector is read once and the
    sum is written once.
    """
    if len(vectors) == 1:
        return vectors[0]
    size = len(vectors[0])
    total = np.empty(size, np.float32)
    scratch = np.empty((len(vectors) // 2, min(size, BLOCK)), np.float32)
    for start in range(0, size, BLOCK):
        parts = [vector[start : start + BLOCK] for vector in vectors]
        while len(parts) > 2:
            pairs = [
                np.add(parts[i], parts[i + 1], out=scratch[i // 2, : len(parts[i])])
                for i in range(0, len(parts) - 1, 2)
            ]
            parts = pairs + parts[len(pairs) * 2 :]
        np.add(parts[0], parts[1], out=total[start : start + BLOCK])
    return total


def mean_vector(vectors: list[np.ndarray], tasks: int) -> np.ndarray:
    """Return the vectors' sum by the tree, divided by the number of tasks."""
    total = tree_sum(vectors)
    return np.divide(total, np.float32(tasks), out=None if len(vectors) == 1 else total)


def is_finite(vector: np.ndarray) -> bool:
    """Return whether all numbers are finite. (The minimum of numbers with a NaN among them is NaN.)"""
    return bool(np.isfinite(vector.min()) and np.isfinite(vector.max()))


def vector_norm(vector: np.ndarray) -> float:
    """Return ‖vector‖₂ as the `fsum` of float64 partial sums over fixed blocks, so that slices agree on it."""
    return math.sqrt(math.fsum(squared_block_sums(vector)))


def squared_block_sums(vector: np.ndarray) -> list[float]:
    """Return the sum of squares of every block of 65,536 elements, in float64."""
    return [
        float(np.square(vector[start : start + BLOCK].astype(np.float64)).sum())
        for start in range(0, len(vector), BLOCK)
    ]


def mean_metrics(results: list[ShardResult], over_all: bool = False) -> dict[str, float | None]:
    """Return the means of metrics with one number per task, by `fsum` in the order of the tasks.

    Args:
        over_all: None if a task is not finite (evaluation). Otherwise the mean is over the finite tasks (training).
    """
    means: dict[str, float | None] = {"loss_before": None, "loss_after": None}
    for name in results[0].metrics:
        values = np.concatenate([result.metrics[name] for result in results])
        if values.ndim > 1:
            continue
        finite = [float(value) for value in values if math.isfinite(value)]
        is_known = len(finite) == len(values) if over_all else len(finite) > 0
        means[name] = math.fsum(finite) / len(finite) if is_known else None
    return means


# --- The outer step -----------------------------------------------------------------------------------------------


class ParameterServer:
    """theta as one flat vector, and the optimizer in the job's `outer` section that updates it."""

    def __init__(self, theta: Theta, outer: OuterSection):
        keep_freed_memory()
        self.layout = Layout.from_theta(theta)
        self._flat = torch.from_numpy(self.layout.flatten(theta))
        self._vector = self._flat.numpy()
        self._vector.flags.writeable = False
        self._rates = OuterRates(self.layout.names, outer)
        self._optimizer = self._build_optimizer(outer)

    @property
    def outer(self) -> OuterSection:
        return self._rates.outer

    def _build_optimizer(self, outer: OuterSection) -> OuterOptimizer:
        build = OwnOptimizer if ":" in outer.optimizer else ElementwiseOptimizer
        return build(self._flat, self.layout, outer, self._rates.groups)

    def flat(self) -> np.ndarray:
        """Return a copy of theta as a float32 vector."""
        return self._vector.copy()

    def vector(self) -> np.ndarray:
        """Return theta itself as a read-only float32 vector. It is always the same one; the next step changes it."""
        return self._vector

    def theta(self) -> Theta:
        """Return a copy of theta by name."""
        return {name: view.clone() for name, view in self.layout.views(self._flat).items()}

    def step(self, gradient: np.ndarray, factor: float = 1.0) -> float:
        """Take one outer step on the mean meta-gradient, at `factor` times the rate.

        Returns:
            The gradient's norm before clipping.
        """
        norm = vector_norm(gradient)
        limit = self.outer.clip_norm
        if limit is not None and norm > limit:
            gradient = gradient * np.float32(limit / norm)
        tensor = torch.from_numpy(np.ascontiguousarray(gradient))
        self._optimizer.step(tensor, [rate * factor for rate in self._rates.of_groups()])
        self._rates.advance()
        return norm

    def skip(self) -> float:
        """Take a step without a finite task: only the schedule's clock moves. Return NaN as the norm."""
        self._rates.advance()
        return math.nan

    def retune(self, outer: OuterSection) -> None:
        """Continue with other settings. theta, the optimizer's state and the schedule's clock stay."""
        tensors, plain = self._optimizer.state()
        self._rates.retune(outer)
        self._optimizer = self._build_optimizer(outer)
        self._optimizer.load(tensors, plain)

    def rate(self) -> float:
        """Return the outer rate of the first parameter group."""
        return self._rates.of_groups()[0]

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Return the optimizer's tensors as `<parameter>/<quantity>`, and the schedule's clock as plain data.

        The plain data of an optimizer of a user's own stands beside the clock.
        """
        tensors, plain = self._optimizer.state()
        return tensors, {"clock": self._rates.steps, **plain}

    def check_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Raise `InputError` if the tensors cannot be the optimizer's state."""
        self._optimizer.check_state(tensors, self.layout.views(self._flat))

    def load(self, theta: Theta, tensors: dict[str, torch.Tensor], plain: dict[str, Any]) -> None:
        """Restore theta and what `state` returned.

        Raises:
            InputError: theta or the optimizer's state has other names or shapes than this job's.
        """
        own_theta = self.layout.views(self._flat)
        check_theta(theta, own_theta)
        self.check_state(tensors)
        clock = read_clock(plain)
        for name, view in own_theta.items():
            view.copy_(theta[name])
        self._optimizer.load(tensors, plain)
        self._rates.steps = clock
