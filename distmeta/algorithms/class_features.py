"""Helpers of the methods that compare features: both sets in one pass, class means, distances, logits.

Shapes: S support rows, Q query rows, F features, W ways.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distmeta.compute.gradient import to_float32
from distmeta.errors import InputError
from distmeta.protocols import Model, Score, Theta, find_ways, one_hot
from distmeta.trees import tree_leaves, tree_map


def require_ways(score: Score, method: str) -> int:
    """Return the number of classes of the scored task.

    Raises:
        InputError: the tasks have no classes.
    """
    ways = find_ways(score)
    if ways is None:
        raise InputError(
            f"algorithm.type: got {method} for tasks without classes, expected tasks whose score has `ways` "
            "(arrow, digits)"
        )
    return ways


def check_ways(score: Score, outputs: int, method: str) -> None:
    """Refuse tasks with more classes than a method with a fixed number of outputs was trained with."""
    ways = find_ways(score) or 0
    if ways > outputs:
        raise InputError(
            f"ways: got {ways}, expected at most {outputs} (the outputs that {method} was trained with): train with "
            "tasks.ways of at least that many"
        )


def require_rows(y: Any, method: str) -> Tensor:
    """Return the targets [N, D] of a regression.

    Raises:
        InputError: they are several tensors, or have another shape.
    """
    if not isinstance(y, Tensor) or y.dim() != 2:
        raise InputError(
            f"algorithm.type: got {method} with {describe_targets(y)}, expected one tensor [N, D], because "
            f"{method} reads the targets: use maml, reptile, meta-sgd or another method that only needs the loss"
        )
    return y


def describe_targets(y: Any) -> str:
    """Return what a message says of targets that a method cannot read."""
    return f"targets of shape {list(y.shape)}" if isinstance(y, Tensor) else f"{type(y).__name__} as targets"


def embed_together(model: Model, theta: Theta, support: Any, x: Any) -> tuple[Tensor, Tensor]:
    """Return the features of the support rows [S, F] and of x [Q, F], computed as one batch.

    A batch norm then uses the same statistics for everything that is compared, even for a single query, as in the
    reference code of prototypical networks.
    """
    features = model.features(theta, tree_map(lambda *rows: torch.cat(rows), support.x, x))
    count = len(tree_leaves(support.x)[0])
    return features[:count], features[count:]


def average_by_class(features_SF: Tensor, y: Tensor, ways: int) -> tuple[Tensor, Tensor]:
    """Return each class's mean features [W, F], zero for a class without rows, and its number of rows [W]."""
    classes_SW = one_hot(y, ways, features_SF.dtype)
    counts_W = classes_SW.sum(0)
    return classes_SW.T @ features_SF / counts_W.clamp(min=1)[:, None], counts_W


def mask_absent_classes(logits_QW: Tensor, counts_W: Tensor) -> Tensor:
    """Return the logits with the lowest useful value for classes without a support row."""
    return logits_QW.masked_fill(counts_W == 0, lowest_logit(logits_QW.dtype))


def mask_logits(logits: Tensor, keep: Tensor) -> Tensor:
    """Return the logits with the lowest useful value where `keep` is false."""
    return torch.where(keep, logits, lowest_logit(logits.dtype))


def lowest_logit(dtype: torch.dtype) -> float:
    """Return a logit whose probability is 0. Unlike −∞, it gives no NaN if all logits are this low."""
    return torch.finfo(dtype).min / 2


def find_feature_size(model: Model, given: int | None = None) -> int:
    """Return the number of the model's features: `given`, or the inputs of its linear head.

    Raises:
        InputError: nothing is given, and the model has no linear head.
    """
    if given is not None:
        return given
    if not model.head:
        raise InputError(
            f"algorithm.features: missing, expected the number of outputs of {type(model.module).__name__}, which has "
            "no linear head"
        )
    return find_head_shape(model, "")[1]


def find_head_shape(model: Model, method: str) -> tuple[int, int]:
    """Return (outputs, features) of the model's last linear layer.

    Raises:
        InputError: the model has no such layer.
    """
    if not model.head:
        raise InputError(
            f"model.type: got {type(model.module).__name__}, which has no last linear layer, expected a model that has "
            f"one: {method} takes the number of outputs and features from it"
        )
    outputs, features = model.module.get_parameter(model.linear_head[0].removeprefix("model.")).shape
    return outputs, features


def squared_distances(a_NF: Tensor, b_MF: Tensor) -> Tensor:
    """Return ‖a − b‖² of every pair of rows, [N, M].

    Unlike ‖a‖² − 2a·b + ‖b‖², the sum of squared differences does not cancel for rows that are close to each other and
    far from zero.
    """
    return (a_NF[:, None] - b_MF).square().sum(-1)


def cosines(a_NF: Tensor, b_MF: Tensor) -> Tensor:
    """Return the cosine of the angle between every pair of rows, [N, M]; 0 for a row of zeros."""
    return to_float32(normalize(a_NF) @ normalize(b_MF).T)


def normalize(rows_NF: Tensor) -> Tensor:
    """Return rows of length 1. The small constant keeps the gradient of a row of zeros finite."""
    return rows_NF * (rows_NF.square().sum(-1, keepdim=True) + 1e-12).rsqrt()
