"""Relation networks: Sung, Yang, Zhang, Xiang, Torr & Hospedales 2018, arXiv 1711.06025.

Shapes: S support rows, Q query rows, F features, W ways.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from distmeta.algorithms.class_features import (
    average_by_class,
    embed_together,
    find_feature_size,
    mask_absent_classes,
    require_ways,
)
from distmeta.protocols import PADDING, Batch, Episode, Metrics, Model, Score, Theta, Unroll, one_hot


class RelationNet:
    """Learn the metric as well: a network scores how strongly a query relates to each class, from 0 to 1.

        r_c = σ( g_φ[ Σ_{i in c} f_θ(x_i), f_θ(x) ] ),   loss = mean over pairs of (r_c − 1[c = y])²    (§3.2)

    There is no inner loop, and any number of ways works. The outputs are the scores before the sigmoid σ, so they
    serve as logits. The metric `loss` is the task family's query loss of these; `mse` is what training minimises.

    Deviations: the paper's g_φ has two blocks of convolution and batch norm on feature maps, then two linear layers.
    Here features are flat, so the blocks are linear layers of the same width (64) with ReLU and without batch norm.
    They start as in He et al. 2015, arXiv 1502.01852. The mean over pairs is that of the authors' code; the paper
    writes a sum.

    Args:
        hidden: units of g_φ's hidden layers: 64 and 64 for the blocks, 8 for the linear layer.
        combine: a class's feature is the `sum` over its support rows (the paper's) or the `mean`, which does not depend
            on the number of shots.
        loss: `mse`, the paper's; or `cross-entropy` of the outputs.
        features: number of the model's features; null: the inputs of its linear head.

    Raises:
        InputError: the tasks have no classes; or the model has no linear head and `features` is not given.
    """

    group_size = 1
    inner_steps = 0

    def __init__(
        self,
        model: Model,
        score: Score,
        hidden: list[Annotated[int, Field(ge=1)]] = [64, 64, 8],  # noqa: B006
        combine: Literal["sum", "mean"] = "sum",
        loss: Literal["mse", "cross-entropy"] = "mse",
        features: Annotated[int, Field(ge=1)] | None = None,
    ):
        self.model = model
        self.score = score
        self.sizes = [2 * find_feature_size(model, features), *hidden, 1]
        self.combine = combine
        self.loss = loss

    def init(self, generator: torch.Generator) -> Theta:
        theta = self.model.init_body()
        for layer, (fan_in, fan_out) in enumerate(pairwise(self.sizes)):
            normal = torch.randn(fan_in, fan_out, generator=generator)
            theta[f"relation.{layer}.weight"] = normal * (2 / fan_in) ** 0.5
            theta[f"relation.{layer}.bias"] = torch.zeros(fan_out)
        return theta

    def begin(self, theta: Theta, support: Batch) -> Batch:
        return support

    def step(self, theta: Theta, state: Batch, support: Batch, k: int) -> Batch:
        return state

    def predict(self, theta: Theta, state: Batch, x: Tensor) -> Tensor:
        ways = require_ways(self.score, "relation")
        features_SF, features_QF = embed_together(self.model, theta, state, x)
        classes_WF, counts_W = average_by_class(features_SF, state.y, ways)
        if self.combine == "sum":
            classes_WF = classes_WF * counts_W[:, None]
        shape = (len(features_QF), ways, -1)
        pairs_QWF = torch.cat([classes_WF.expand(shape), features_QF[:, None].expand(shape)], -1)
        return mask_absent_classes(self._score_pairs(theta, pairs_QWF), counts_W)

    def meta_loss(
        self, theta: Theta, episode: Episode, unroll: Unroll, score: Score
    ) -> tuple[Tensor, Metrics]:
        state = unroll(self, theta, episode.support)
        outputs_QW = self.predict(theta, state, episode.query.x)
        loss, metrics = score(outputs_QW, episode.query)
        if self.loss == "cross-entropy":
            return loss, {"loss": loss, **metrics}
        mse = squared_error(outputs_QW, episode)
        return mse, {"loss": loss, "mse": mse, **metrics}

    def _score_pairs(self, theta: Theta, pairs_QWF: Tensor) -> Tensor:
        """Return g_φ of every pair of a query and a class, [Q, W]."""
        h = pairs_QWF
        last = len(self.sizes) - 2
        for layer in range(last + 1):
            h = h @ theta[f"relation.{layer}.weight"] + theta[f"relation.{layer}.bias"]
            if layer < last:
                h = h.relu()
        return h[..., 0]


def squared_error(outputs_QW: Tensor, episode: Episode) -> Tensor:
    """Return the mean of (σ(outputs) − one-hot labels)² over pairs of a query row and a class of the support set."""
    ways = outputs_QW.shape[1]
    dtype = outputs_QW.dtype
    present_W = one_hot(episode.support.y, ways, dtype).sum(0) > 0
    real_Q1 = (episode.query.y != PADDING)[:, None]
    counts_QW = (real_Q1 & present_W).to(dtype)
    errors_QW = (outputs_QW.sigmoid() - one_hot(episode.query.y, ways, dtype)).square()
    return (errors_QW * counts_QW).sum() / counts_QW.sum()
