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
from distmeta.config.sections import OuterSection, ScheduleSection
from distmeta.protocols import Theta
from distmeta.runtime.outer_optimizer import (
    STEP_COUNT,
    build_segments,
    check_state,
    check_theta,
    join_quantity,
    read_clock,
)
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
        self._clock = 0
        """Completed steps, for the schedule."""
        self._start(outer)

    def _start(self, outer: OuterSection) -> None:
        self.outer = outer
        self._optimizer, self._segments = build_segments(self._flat, self.layout, outer)
        self._base_rates = [group["lr"] for group in self._optimizer.param_groups]
        self._set_clock(self._clock)

    def _set_clock(self, steps: int) -> None:
        """Set every rate as the schedule has it after so many steps."""
        self._clock = steps
        factor = schedule_factor(self.outer.schedule, steps)
        for group, rate in zip(self._optimizer.param_groups, self._base_rates, strict=True):
            group["lr"] = rate * factor

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
        for segment in self._segments:
            segment.parameter.grad = tensor[segment.start : segment.stop]
        for group in self._optimizer.param_groups:
            group["lr"] *= factor  # until the schedule sets the next step's
        self._optimizer.step()
        for segment in self._segments:
            segment.parameter.grad = None
        self._set_clock(self._clock + 1)
        return norm

    def skip(self) -> float:
        """Take a step without a finite task: only the schedule's clock moves. Return NaN as the norm."""
        self._set_clock(self._clock + 1)
        return math.nan

    def retune(self, outer: OuterSection) -> None:
        """Continue with other settings. theta, the optimizer's state and the schedule's clock stay."""
        tensors, _ = self.state()
        self._start(outer)
        self._load_optimizer(tensors)

    def rate(self) -> float:
        """Return the outer rate of the first parameter group."""
        return float(self._optimizer.param_groups[0]["lr"])

    def rates(self) -> list[float]:
        """Return the outer rate of each tensor of theta, in its order."""
        rates = {id(p): group["lr"] for group in self._optimizer.param_groups for p in group["params"]}
        return [
            float(rates[id(segment.parameter)]) for segment in self._segments for _ in segment.layout.names
        ]

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Return the optimizer's tensors as `<parameter>/<quantity>`, and the schedule's clock as plain data."""
        tensors = {}
        for segment in self._segments:
            quantities: Theta = self._optimizer.state.get(segment.parameter, {})
            for key, value in quantities.items():
                views = segment.layout.views(value) if key != STEP_COUNT else {}
                for name in segment.layout.names:
                    tensors[f"{name}/{key}"] = views.get(name, value).detach().clone()
        return tensors, {"clock": self._clock}

    def load(self, theta: Theta, tensors: dict[str, torch.Tensor], plain: dict[str, Any]) -> None:
        """Restore theta and what `state` returned.

        Raises:
            InputError: theta or the optimizer's state has other names or shapes than this job's.
        """
        own_theta = self.layout.views(self._flat)
        check_theta(theta, own_theta)
        check_state(tensors, own_theta)
        clock = read_clock(plain)
        for name, view in own_theta.items():
            view.copy_(theta[name])
        self._load_optimizer(tensors)
        self._set_clock(clock)

    def _load_optimizer(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for segment in self._segments:
            self._optimizer.state.pop(segment.parameter, None)
            first = segment.layout.names[0]
            quantities = [key.rpartition("/")[2] for key in tensors if key.rpartition("/")[0] == first]
            state = {key: join_quantity(segment.layout, key, tensors) for key in quantities}
            if state:
                self._optimizer.state[segment.parameter] = state


def schedule_factor(schedule: ScheduleSection, step: int) -> float:
    """Return the factor on every rate after `step` steps, a function of t = min(step / length, 1)."""
    if step < schedule.warmup:
        return (step + 1) / schedule.warmup
    t = min((step - schedule.warmup) / max((schedule.steps or 1) - schedule.warmup, 1), 1.0)
    if schedule.type == "linear":
        return 1 - (1 - schedule.final) * t
    if schedule.type == "cosine":
        return schedule.final + (1 - schedule.final) * (1 + math.cos(math.pi * t)) / 2
    return schedule.final**t if schedule.type == "exponential" else 1.0
