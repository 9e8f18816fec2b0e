"""Prototypical networks: Snell, Swersky & Zemel 2017, arXiv 1703.05175.

Shapes: S support rows, Q query rows, F features, W ways.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from distmeta.algorithms.class_features import (
    average_by_class,
    cosines,
    embed_together,
    mask_absent_classes,
    require_ways,
    squared_distances,
)
from distmeta.protocols import Batch, Model, Score, Theta

LOG_SCALE = "metric.log_scale"


class ProtoNet:
    """Assign a query to the class with the nearest prototype, the mean of the class's support features.

        p_c = mean of f_θ(x) over the support of class c,   logits_c = −s · d(f_θ(x), p_c)      (equations 1 and 2)

    There is no inner loop, and any number of ways works. Support and query are embedded as one batch, which matters
    only to batch norms. The paper trains with more ways than it tests with (§2.6): `tasks.ways: 60`,
    `tasks.eval_ways: 5`.

    Args:
        distance: `euclidean`: d = ‖f − p‖², the paper's choice (§2.7); or `cosine`: d = 1 − cos(f, p).
        scale: the inverse temperature s > 0. The paper has none, which is 1.
        learn_scale: learn s, starting at `scale` (key `metric.log_scale`): Oreshkin, Rodríguez López & Lacoste 2018,
            arXiv 1805.10123, §3.1.

    Raises:
        InputError: the tasks have no classes.
    """

    group_size = 1
    inner_steps = 0

    def __init__(
        self,
        model: Model,
        score: Score,
        distance: Literal["euclidean", "cosine"] = "euclidean",
        scale: Annotated[float, Field(gt=0)] = 1.0,
        learn_scale: bool = False,
    ):
        self.model = model
        self.score = score
        self.distance = distance
        self.scale = scale
        self.learn_scale = learn_scale

    def init(self, generator: torch.Generator) -> Theta:
        return self.model.init_body() | init_scale(self.scale, self.learn_scale)

    def begin(self, theta: Theta, support: Batch) -> Batch:
        return support

    def step(self, theta: Theta, state: Batch, support: Batch, k: int) -> Batch:
        return state

    def predict(self, theta: Theta, state: Batch, x: Tensor) -> Tensor:
        ways = require_ways(self.score, "protonet")
        features_SF, features_QF = embed_together(self.model, theta, state, x)
        prototypes_WF, counts_W = average_by_class(features_SF, state.y, ways)
        if self.distance == "euclidean":
            similarity_QW = -squared_distances(features_QF, prototypes_WF)
        else:
            similarity_QW = cosines(features_QF, prototypes_WF) - 1
        return mask_absent_classes(read_scale(theta, self.scale) * similarity_QW, counts_W)


def init_scale(scale: float, learn: bool) -> Theta:
    """Return the entry of theta for a learned scale, as its logarithm so that it stays positive; {} if it is fixed."""
    return {LOG_SCALE: torch.tensor([math.log(scale)])} if learn else {}


def read_scale(theta: Theta, fixed: float) -> Tensor | float:
    """Return the learned scale, or `fixed` if theta has none."""
    return theta[LOG_SCALE].exp() if LOG_SCALE in theta else fixed
