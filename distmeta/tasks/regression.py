"""Regression of functions of one variable: sinusoids (Finn et al. 2017, §5.1) and lines.

The three splits are the same distribution; they are disjoint because the task ids of each come from another
stream of `distmeta.seeding`, and a task's function and inputs are functions of its id alone.

Shapes: T tasks, N examples (S of the support, Q of the query).
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
from distmeta.protocols import SPLITS, Batch, Episode, Metrics
from distmeta.seeding import uniforms

Count = Annotated[int, Field(ge=1)]
Interval = Annotated[list[float], Field(min_length=2, max_length=2)]

AMPLITUDE = [0.1, 5.0]
PHASE = [0.0, math.pi]
SLOPE = [-3.0, 3.0]
OFFSET = [-3.0, 3.0]
X_RANGE = [-5.0, 5.0]


@final
class Sinusoid:
    """y = A sin(x − b), with A, b and x uniform on their intervals; loss: mean squared error.

    The phase is subtracted, as in MAML's code. `eval_shots` and `eval_queries` (default: `shots`, `queries`)
    are those of val and test. Reference: Finn, Abbeel & Levine 2017, "Model-Agnostic Meta-Learning for Fast
    Adaptation of Deep Networks", §5.1.
    """

    in_shape = (1,)
    out_features = 1

    def __init__(
        self,
        shots: Count = 10,
        queries: Count = 10,
        amplitude: Interval = AMPLITUDE,
        phase: Interval = PHASE,
        x_range: Interval = X_RANGE,
        eval_shots: Count | None = None,
        eval_queries: Count | None = None,
    ) -> None:
        self._sizes = _sizes(shots, queries, eval_shots, eval_queries)
        self._amplitude = _interval("tasks.amplitude", amplitude)
        self._phase = _interval("tasks.phase", phase)
        self._x_range = _interval("tasks.x_range", x_range)

    def draw(self, split: str, ids: Any) -> Episode:
        """Episodes of the tasks `ids` (uint64 [T]): x and y float32, [T, S, 1] and [T, Q, 1]."""
        shots, queries = self._sizes[split]
        first_T1, second_T1, x_TN = _uniforms(ids, shots + queries, self._x_range)
        amplitude_T1, phase_T1 = _scaled(first_T1, self._amplitude), _scaled(second_T1, self._phase)
        return _episode(x_TN, amplitude_T1 * np.sin(x_TN - phase_T1), shots)

    def score(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Metrics]:
        """Mean squared error of one task's outputs [N, 1]; no metrics besides."""
        return F.mse_loss(outputs, batch.y), {}


@final
class Linear:
    """y = a x + c, with slope a, offset c and x uniform on their intervals; loss: mean squared error."""

    in_shape = (1,)
    out_features = 1

    def __init__(
        self,
        shots: Count = 10,
        queries: Count = 10,
        slope: Interval = SLOPE,
        offset: Interval = OFFSET,
        x_range: Interval = X_RANGE,
        eval_shots: Count | None = None,
        eval_queries: Count | None = None,
    ) -> None:
        self._sizes = _sizes(shots, queries, eval_shots, eval_queries)
        self._slope = _interval("tasks.slope", slope)
        self._offset = _interval("tasks.offset", offset)
        self._x_range = _interval("tasks.x_range", x_range)

    def draw(self, split: str, ids: Any) -> Episode:
        """Episodes of the tasks `ids` (uint64 [T]): x and y float32, [T, S, 1] and [T, Q, 1]."""
        shots, queries = self._sizes[split]
        first_T1, second_T1, x_TN = _uniforms(ids, shots + queries, self._x_range)
        return _episode(x_TN, _scaled(first_T1, self._slope) * x_TN + _scaled(second_T1, self._offset), shots)

    def score(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Metrics]:
        """Mean squared error of one task's outputs [N, 1]; no metrics besides."""
        return F.mse_loss(outputs, batch.y), {}


def _sizes(
    shots: int, queries: int, eval_shots: int | None, eval_queries: int | None
) -> dict[str, tuple[int, int]]:
    """(shots, queries) of each split."""
    given = {"shots": shots, "queries": queries, "eval_shots": eval_shots, "eval_queries": eval_queries}
    for name, value in given.items():
        if value is not None and value < 1:
            raise InputError(f"tasks.{name}: got {value}, expected at least 1")
    evaluation = (
        shots if eval_shots is None else eval_shots,
        queries if eval_queries is None else eval_queries,
    )
    return {split: (shots, queries) if split == "train" else evaluation for split in SPLITS}


def _interval(field: str, given: list[float]) -> tuple[float, float]:
    """The two ends, checked."""
    if len(given) != 2 or not all(math.isfinite(end) for end in given) or given[0] > given[1]:
        raise InputError(f"{field}: got {given}, expected [low, high], finite, low <= high")
    return float(given[0]), float(given[1])


def _scaled(uniforms: np.ndarray, interval: tuple[float, float]) -> np.ndarray:
    """Numbers of [0, 1) moved to [low, high)."""
    low, high = interval
    return low + (high - low) * uniforms


def _uniforms(
    ids: Any, examples: int, x_range: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each task's two uniform numbers, [T, 1] each, and its inputs x [T, N]."""
    drawn = uniforms(ids, 2 + examples)
    return drawn[:, :1], drawn[:, 1:2], _scaled(drawn[:, 2:], x_range)


def _episode(x_TN: np.ndarray, y_TN: np.ndarray, shots: int) -> Episode:
    """The first `shots` examples are the support, the others the query."""

    def batch(columns: slice) -> Batch:
        x, y = (np.ascontiguousarray(a[:, columns, None], dtype=np.float32) for a in (x_TN, y_TN))
        return Batch(torch.from_numpy(x), torch.from_numpy(y))

    return Episode(batch(slice(0, shots)), batch(slice(shots, None)))
