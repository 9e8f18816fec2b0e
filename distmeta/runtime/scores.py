"""Score theta on the tasks of a split."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from distmeta.runtime.problem import Problem
from distmeta.runtime.shards import Pool, ShardResult
from distmeta.runtime.worker import plan_shards

EVAL_SHARD = 25
"""Tasks per shard of an evaluation."""


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
    """Score `count` tasks of a split, in fixed shards.

    Args:
        inner_steps: None: as the job says.
        outputs: whether to return predictions.

    Returns:
        Results whose metrics are `<name>_curve` [T, K+1], `<name>_after` [T] and, with an inner loop, `<name>_before`.
    """
    steps = problem.eval_steps if inner_steps is None else inner_steps
    pieces = math.ceil(count / EVAL_SHARD)
    shards = plan_shards(problem, split, 0, count, pieces, steps, outputs)
    adapts = problem.algorithm.inner_steps > 0
    return [
        replace(result, metrics=split_curves(result.metrics, adapts))
        for result in pool.map(flat, shards, check)
    ]


def split_curves(curves: Mapping[str, np.ndarray], adapts: bool) -> dict[str, np.ndarray]:
    """Return `<name>_curve` [T, K+1], `<name>_after` [T] and, if the algorithm adapts, `<name>_before` [T]."""
    metrics = {f"{name}_curve": curve for name, curve in curves.items()}
    metrics |= {f"{name}_after": curve[:, -1] for name, curve in curves.items()}
    if adapts:
        metrics |= {f"{name}_before": curve[:, 0] for name, curve in curves.items()}
    return metrics


def find_primary_metric(metrics: Mapping[str, Any], prefix: str = "") -> tuple[str, int]:
    """Return the metric that decides which theta is best, and whether more is better (1) or worse (-1)."""
    for name in ("accuracy", "return"):
        if f"{prefix}{name}_after" in metrics:
            return f"{prefix}{name}_after", 1
    return f"{prefix}loss_after", -1
