"""Score theta on the tasks of a split."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from distmeta.runtime.problem import Problem
from distmeta.runtime.shards import Pool, ShardResult
from distmeta.runtime.worker import plan_shards

EVAL_SHARD = 25
"""Tasks per shard of an evaluation."""
FEWEST_TASKS = 10
"""With fewer tasks, nothing is said about what adaptation does."""


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


def join_metrics(results: Sequence[ShardResult]) -> dict[str, np.ndarray]:
    """Return each metric of all tasks, [T, ...]."""
    return {name: np.concatenate([result.metrics[name] for result in results]) for name in results[0].metrics}


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


def describe_harm(columns: Mapping[str, np.ndarray], tasks: str) -> str | None:
    """Return a line for the user if adaptation makes the primary metric worse, else None.

    Worse means: by more than the 95 % interval of the mean change over tasks, 1.96·s/√T.

    Args:
        columns: `<name>_before` and `<name>_after`, [T] each. Without an inner loop there is no `_before`.
        tasks: what the tasks are called in the line.
    """
    after_name, sign = find_primary_metric(columns)
    metric = after_name.removesuffix("_after")
    before = columns.get(f"{metric}_before")
    after = columns[after_name]
    if before is None or len(after) < FEWEST_TASKS or not np.isfinite([*before, *after]).all():
        return None
    harm = sign * (before - after)
    if harm.mean() <= 1.96 * harm.std(ddof=1) / math.sqrt(len(harm)):
        return None
    return (
        f"adapting makes the {metric} of {tasks} worse: {before.mean():.4g} -> {after.mean():.4g} (mean of "
        f"{len(after)}); try a smaller algorithm.inner_lr, more shots, or adapting fewer parameters "
        "(algorithm.adapt=head)"
    )
