"""What methods that compare examples share: the classes of a support set, features of both sets in one pass.

Shapes: S support rows, Q query rows, F features, W ways.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distmeta.errors import InputError
from distmeta.protocols import Batch, Model, Score, Theta, one_hot, to_float32, ways_of


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


def only(mask: Tensor, values: Tensor) -> Tensor:
    """The values, as good as −∞ where the mask does not hold."""
    return torch.where(mask, values, torch.finfo(values.dtype).min / 2)


def feature_size(model: Model, given: int | None = None) -> int:
    """Length of the model's features: `given`, or what enters its linear head.

    Raises:
        InputError: not given, and the model has no linear head.
    """
    if given is not None:
        return given
    if not model.head:
        raise InputError(
            f"algorithm.features: missing, expected the length of what {type(model.module).__name__} puts out "
            "(it has no linear head to tell)"
        )
    return head_shape(model, "")[1]


def head_shape(model: Model, method: str) -> tuple[int, int]:
    """(outputs, features) of the model's last linear layer.

    Raises:
        InputError: it has none.
    """
    if not model.head:
        raise InputError(
            f"model.type: got {type(model.module).__name__}, which has no last linear layer, expected one: it tells "
            f"{method} the outputs and the features"
        )
    outputs, features = model.module.get_parameter(model.head[0].removeprefix("model.")).shape
    return outputs, features


def check_ways(score: Score, outputs: int, method: str) -> None:
    """Refuses tasks of more classes than a method with fixed outputs was trained with."""
    ways = ways_of(score) or 0
    if ways > outputs:
        raise InputError(
            f"ways: got {ways}, expected at most {outputs} (the outputs that {method} was trained with): train with "
            "tasks.ways of at least the ways asked"
        )


def squared_distances(a_NF: Tensor, b_MF: Tensor) -> Tensor:
    """‖a − b‖² of every pair of rows, [N, M].

    From the differences: ‖a‖² − 2a·b + ‖b‖² cancels where rows are near each other and far from zero.
    """
    return (a_NF[:, None] - b_MF).square().sum(-1)


def cosines(a_NF: Tensor, b_MF: Tensor) -> Tensor:
    """Cosine of the angle between every pair of rows, [N, M]; 0 for a row of zeros."""
    return to_float32(_unit(a_NF) @ _unit(b_MF).T)


def _unit(rows_NF: Tensor) -> Tensor:
    """Rows of length 1. The small term keeps the gradient of a row of zeros finite."""
    return rows_NF * (rows_NF.square().sum(-1, keepdim=True) + 1e-12).rsqrt()
