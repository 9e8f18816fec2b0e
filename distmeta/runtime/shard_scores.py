"""Score one shard of an evaluation, on the worker."""

from __future__ import annotations

import numpy as np

from distmeta.compute.predictions import Predictions, predict_labels
from distmeta.compute.scoring import evaluation_mode, score_tasks
from distmeta.protocols import Episodes, HasEvaluationWays, Theta
from distmeta.runtime.problem import Problem
from distmeta.runtime.shards import Shard


def score_shard(
    problem: Problem, theta: Theta, shard: Shard, ids: np.ndarray, episodes: Episodes
) -> tuple[dict[str, np.ndarray], list[Predictions] | None]:
    """Return the shard's metrics [T, K+1], after 0 … K inner steps, and its predictions if it asks for them."""
    with evaluation_mode(problem.model.module):
        scores = score_tasks(
            problem.adapting(shard.split),
            problem.score(shard.split),
            theta,
            episodes,
            ids,
            problem.execution,
            shard.inner_steps,
            shard.outputs,
        )
    if not shard.outputs:
        return scores.metrics, None
    ways = problem.family.eval_ways if isinstance(problem.family, HasEvaluationWays) else None
    return scores.metrics, predict_labels(problem.family, episodes, scores.outputs, ways)
