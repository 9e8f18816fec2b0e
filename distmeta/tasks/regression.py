"""Regression of functions of one variable: sinusoids (Finn et al. 2017, §5.1) and lines.

All splits have the same distribution. They are disjoint because their task ids come from different streams of
`distmeta.seeding`, and a task's function and inputs depend only on its id.

Shapes: T tasks, N examples, S in the support set, Q in the query set.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, final

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from distmeta.errors import InputError
from distmeta.protocols import Batch, Episode, Metrics
from distmeta.seeding import draw_uniforms
from distmeta.tasks.options import Positive

Interval = Annotated[list[float], Field(min_length=2, max_length=2)]

AMPLITUDE = [0.1, 5.0]
PHASE = [0.0, math.pi]
SLOPE = [-3.0, 3.0]
OFFSET = [-3.0, 3.0]
X_RANGE = [-5.0, 5.0]


def score_regression(outputs: Tensor, batch: Batch) -> tuple[Tensor, Metrics]:
    """Return the mean squared error of one task's outputs [N, 1], and no metrics."""
    return F.mse_loss(outputs, batch.y), {}


@final
class Sinusoid:
    """y = A sin(x − b), with A, b and x uniform on their intervals; loss: mean squared error.

    The phase is subtracted, as in MAML's code. `eval_shots` and `eval_queries` (default: `shots`, `queries`) are those
    of val and test. Reference: Finn, Abbeel & Levine 2017, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep
    Networks", §5.1.
    """

    in_shape = (1,)
    out_features = 1

    def __init__(
        self,
        shots: Positive = 10,
        queries: Positive = 10,
        amplitude: Interval = AMPLITUDE,
        phase: Interval = PHASE,
        x_range: Interval = X_RANGE,
        eval_shots: Positive | None = None,
        eval_queries: Positive | None = None,
    ) -> None:
        self._sizes = _choose_sizes(shots, queries, eval_shots, eval_queries)
        self._amplitude = _check_interval("tasks.amplitude", amplitude)
        self._phase = _check_interval("tasks.phase", phase)
        self._x_range = _check_interval("tasks.x_range", x_range)

    def draw(self, split: str, ids: Any) -> Episode:
        """Draw the episodes of the tasks `ids` (uint64 [T]): x and y float32, [T, S, 1] and [T, Q, 1]."""
        shots, queries = self._sizes[split]
        unit_TN = draw_uniforms(ids, 2 + shots + queries)
        amplitude_T1 = _scale(unit_TN[:, :1], self._amplitude)
        phase_T1 = _scale(unit_TN[:, 1:2], self._phase)
        x_TN = _scale(unit_TN[:, 2:], self._x_range)
        return _build_episode(x_TN, amplitude_T1 * np.sin(x_TN - phase_T1), shots)

    score = staticmethod(score_regression)


@final
class Linear:
    """y = a x + c, with slope a, offset c and x uniform on their intervals; loss: mean squared error."""

    in_shape = (1,)
    out_features = 1

    def __init__(
        self,
        shots: Positive = 10,
        queries: Positive = 10,
        slope: Interval = SLOPE,
        offset: Interval = OFFSET,
        x_range: Interval = X_RANGE,
        eval_shots: Positive | None = None,
        eval_queries: Positive | None = None,
    ) -> None:
        self._sizes = _choose_sizes(shots, queries, eval_shots, eval_queries)
        self._slope = _check_interval("tasks.slope", slope)
        self._offset = _check_interval("tasks.offset", offset)
        self._x_range = _check_interval("tasks.x_range", x_range)

    def draw(self, split: str, ids: Any) -> Episode:
        """Draw the episodes of the tasks `ids` (uint64 [T]): x and y float32, [T, S, 1] and [T, Q, 1]."""
        shots, queries = self._sizes[split]
        unit_TN = draw_uniforms(ids, 2 + shots + queries)
        slope_T1 = _scale(unit_TN[:, :1], self._slope)
        offset_T1 = _scale(unit_TN[:, 1:2], self._offset)
        x_TN = _scale(unit_TN[:, 2:], self._x_range)
        return _build_episode(x_TN, slope_T1 * x_TN + offset_T1, shots)

    score = staticmethod(score_regression)


def _choose_sizes(
    shots: int, queries: int, eval_shots: int | None, eval_queries: int | None
) -> dict[str, tuple[int, int]]:
    """Return (shots, queries) of each split."""
    sizes = {"shots": shots, "queries": queries, "eval_shots": eval_shots, "eval_queries": eval_queries}
    for name, value in sizes.items():
        if value is not None and value < 1:
            raise InputError(f"tasks.{name}: got {value}, expected at least 1")
    evaluation = (eval_shots or shots, eval_queries or queries)
    return {"train": (shots, queries), "val": evaluation, "test": evaluation}


def _check_interval(field: str, interval: list[float]) -> tuple[float, float]:
    """Return the two ends of an interval."""
    if len(interval) != 2 or not all(map(math.isfinite, interval)) or interval[0] > interval[1]:
        raise InputError(f"{field}: got {interval}, expected [low, high], finite, low <= high")
    return float(interval[0]), float(interval[1])


def _scale(unit: np.ndarray, interval: tuple[float, float]) -> np.ndarray:
    """Map numbers of [0, 1) to [low, high)."""
    low, high = interval
    return low + (high - low) * unit


def _build_episode(x_TN: np.ndarray, y_TN: np.ndarray, shots: int) -> Episode:
    """Return an episode whose support set is the first `shots` examples; the others are the query set."""
    support = Batch(_to_tensor(x_TN[:, :shots]), _to_tensor(y_TN[:, :shots]))
    query = Batch(_to_tensor(x_TN[:, shots:]), _to_tensor(y_TN[:, shots:]))
    return Episode(support, query)


def _to_tensor(values_TN: np.ndarray) -> Tensor:
    """Return the values as float32 [T, N, 1]."""
    return torch.from_numpy(np.ascontiguousarray(values_TN[..., None], dtype=np.float32))
