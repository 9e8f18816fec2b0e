"""Scoring theta on tasks of a split, and the figures that come of it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from distmeta.runtime.pool import Pool
from distmeta.runtime.problem import Problem
from distmeta.runtime.worker import ShardResult, shards_of

EVAL_SHARD = 25
"""Tasks of one evaluation shard."""
SPIKE_WINDOW, SPIKE_LEAST, SPIKE_FACTOR = 50, 20, 10.0
"""A loss is held against so many before it, against no fewer than the second number; by how much a spike stands out."""


def evaluate_tasks(
    problem: Problem,
    pool: Pool,
    flat: np.ndarray,
    split: str,
    count: int,
    check: Callable[[], None],
    inner_steps: int | None = None,
    outputs: bool = False,
) -> list[ShardResult]:
    """Scores `count` tasks of a split in fixed shards; metrics [T, K+1] become `*_before` and `*_after` and `curve`."""
    steps = problem.eval_steps if inner_steps is None else inner_steps
    plan = shards_of(problem, split, 0, count, math.ceil(count / EVAL_SHARD), steps, outputs)
    results = pool.map(flat, plan, check)
    return [replace(r, metrics=_before_after(r.metrics, problem.algorithm.inner_steps > 0)) for r in results]


def _before_after(curves: Mapping[str, np.ndarray], adapts: bool) -> dict[str, np.ndarray]:
    columns = {f"{name}_curve": curve for name, curve in curves.items()}
    columns |= {f"{name}_after": curve[:, -1] for name, curve in curves.items()}
    if adapts:
        columns |= {f"{name}_before": curve[:, 0] for name, curve in curves.items()}
    return columns


def mean_metrics(results: list[ShardResult], every: bool = False) -> dict[str, float | None]:
    """Means by fsum in task order: over the finite tasks in training, over `every` task in evaluation.

    Null where there is none: `loss_before` without an unadapted prediction, an evaluation in which a task diverged.
    """
    record: dict[str, float | None] = {"loss_before": None, "loss_after": None}
    for name in results[0].metrics:
        values = np.concatenate([result.metrics[name] for result in results])
        if values.ndim == 1:
            finite = [float(value) for value in values if math.isfinite(value)]
            whole = finite and not (every and len(finite) < len(values))
            record[name] = math.fsum(finite) / len(finite) if whole else None
    return record


def spikes(loss: float, recent: Sequence[float]) -> bool:
    """Whether a loss is far above the last ones: past their median by ten times their median absolute deviation, and by
    the median's own size."""
    if len(recent) < SPIKE_LEAST:
        return False
    usual = statistics.median(recent)
    spread = statistics.median(abs(one - usual) for one in recent)
    return loss - usual > max(SPIKE_FACTOR * spread, abs(usual))


def primary(metrics: Mapping[str, Any], prefix: str = "") -> tuple[str, int]:
    """The figure that `best` and the interval are about, and whether more of it is better (1) or worse (−1)."""
    for name in ("accuracy", "return"):
        if f"{prefix}{name}_after" in metrics:
            return f"{prefix}{name}_after", 1
    return f"{prefix}loss_after", -1
