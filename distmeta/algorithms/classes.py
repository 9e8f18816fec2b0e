"""What methods that compare examples share: the classes of a support set, features of both sets in one pass.

Shapes: S support rows, Q query rows, F features, W ways.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distmeta.core import Batch, InputError, Model, Score, Theta, one_hot, ways_of


def required_ways(score: Score, method: str) -> int:
    """Classes of the task at hand.

    Raises:
        InputError: the tasks have no classes.
    """
    ways = ways_of(score)
    if ways is None:
        raise InputError(
            f"algorithm.type: got {method} for tasks without classes, expected tasks whose score has `ways` "
            "(arrow, digits)"
        )
    return ways


def features_of_both(model: Model, theta: Theta, support: Batch, x: Tensor) -> tuple[Tensor, Tensor]:
    """Features of the support's rows [S, F] and of x [Q, F], computed as one batch.

    Together, because a batch norm then sees one set of statistics for what is compared (as the reference code of
    prototypical networks does), also for a single query row.
    """
    features = model.features(theta, torch.cat([support.x, x]))
    return features[: len(support.x)], features[len(support.x) :]


def class_means(features_SF: Tensor, y: Tensor, ways: int) -> tuple[Tensor, Tensor]:
    """Mean features of each class [W, F], zero where it has no row, and its number of rows [W]."""
    classes_SW = one_hot(y, ways, features_SF.dtype)
    counts_W = classes_SW.sum(0)
    return classes_SW.T @ features_SF / counts_W.clamp(min=1)[:, None], counts_W


def without_absent(logits_QW: Tensor, counts_W: Tensor) -> Tensor:
    """The logits, those of classes without a support row as good as −∞."""
    return logits_QW.masked_fill(counts_W == 0, torch.finfo(logits_QW.dtype).min / 2)
