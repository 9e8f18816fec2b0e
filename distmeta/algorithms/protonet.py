"""Prototypical networks: Snell, Swersky & Zemel 2017, arXiv 1703.05175; and the distances that its kin share.

Shapes: S support rows, Q query rows, F features, W ways.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from distmeta.algorithms.class_features import (
    class_means,
    cosines,
    features_of_both,
    required_ways,
    squared_distances,
    without_absent,
)
from distmeta.protocols import Batch, Model, Score, Theta

LOG_SCALE = "metric.log_scale"


class ProtoNet:
    """A query belongs to the class whose prototype, the mean of its support features, is nearest.

        p_c = mean of f_θ(x) over the support of class c,   logits_c = −s · d(f_θ(x), p_c)      (equations 1 and 2)

    No inner loop. Support and query are embedded as one batch, which matters to a batch norm alone. Any number of
    ways; the paper trains on more than it tests on (§2.6): `tasks.ways: 60`, `tasks.eval_ways: 5`.

    Args:
        distance: `euclidean`, squared: d = ‖f − p‖², the paper's choice (§2.7); or `cosine`: d = 1 − cos(f, p).
        scale: s, the inverse temperature. The paper has none: 1.
        learn_scale: s is in theta, as `metric.log_scale`, and `scale` is where it starts (Oreshkin, Rodríguez López &
            Lacoste 2018, arXiv 1805.10123, §3.1); else it is fixed.

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
        self.model, self.score = model, score
        self.distance, self.scale, self.learn_scale = distance, scale, learn_scale

    def init(self, generator: torch.Generator) -> Theta:
        return self.model.init_body() | initial_scale(self.scale, self.learn_scale)

    def begin(self, theta: Theta, support: Batch) -> Batch:
        return support

    def step(self, theta: Theta, state: Batch, support: Batch, k: int) -> Batch:
        return state

    def predict(self, theta: Theta, state: Batch, x: Tensor) -> Tensor:
        ways = required_ways(self.score, "protonet")
        features_SF, features_QF = features_of_both(self.model, theta, state, x)
        prototypes_WF, counts_W = class_means(features_SF, state.y, ways)
        if self.distance == "euclidean":
            nearness_QW = -squared_distances(features_QF, prototypes_WF)
        else:
            nearness_QW = cosines(features_QF, prototypes_WF) - 1
        return without_absent(scale_in(theta, self.scale) * nearness_QW, counts_W)


def initial_scale(scale: float, learned: bool) -> Theta:
    """What theta holds of the scale of a similarity: its logarithm, so that it stays positive; nothing if fixed."""
    return {LOG_SCALE: torch.tensor([math.log(scale)])} if learned else {}


def scale_in(theta: Theta, fixed: float) -> Tensor | float:
    """The scale: theta's where it is learned."""
    return theta[LOG_SCALE].exp() if LOG_SCALE in theta else fixed
