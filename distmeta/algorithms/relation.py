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
    class_means,
    feature_size,
    features_of_both,
    required_ways,
    without_absent,
)
from distmeta.protocols import PADDING, Batch, Episode, Metrics, Model, Score, Theta, Unroll, one_hot


class RelationNet:
    """The metric is learned as well: a network scores how a query relates to each class, from 0 to 1.

        r_c = σ( g_φ[ Σ_{i in c} f_θ(x_i), f_θ(x) ] ),   loss = mean over pairs of (r_c − 1[c = y])²    (§3.2)

    No inner loop. The outputs are the scores before the sigmoid σ, so that they serve as logits; `loss` among the
    metrics is the family's query loss of these, and what is minimised stands beside it as `mse`. Any number of ways.

    Deviations: the paper's g_φ is two blocks of convolution and batch norm over feature maps, then two linear layers.
    Features here are flat, so the blocks are linear layers of their width (64) with ReLU, without batch norm; they
    start as in He et al. 2015, arXiv 1502.01852. The mean over pairs is the authors' code's; the paper writes a sum.

    Args:
        hidden: units of g_φ's hidden layers: the blocks' 64 and 64, the linear layer's 8.
        combine: a class's feature is the `sum` of its rows' (the paper's), or their `mean`, which does not grow with
            the shots: for tasks whose shots differ.
        loss: `mse`, the paper's; or `cross-entropy` of the outputs.
        features: length of the model's features; null: what enters its linear head.

    Raises:
        InputError: tasks without classes; a model without a linear head, `features` not given.
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
        self.model, self.score = model, score
        self.sizes = [2 * feature_size(model, features), *hidden, 1]
        self.combine, self.loss = combine, loss

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
        ways = required_ways(self.score, "relation")
        features_SF, features_QF = features_of_both(self.model, theta, state, x)
        classes_WF, counts_W = class_means(features_SF, state.y, ways)
        if self.combine == "sum":
            classes_WF = classes_WF * counts_W[:, None]
        shape = (len(features_QF), ways, -1)
        pairs_QWF = torch.cat([classes_WF.expand(shape), features_QF[:, None].expand(shape)], -1)
        return without_absent(self._relation(theta, pairs_QWF), counts_W)

    def meta_loss(
        self, theta: Theta, episode: Episode, unroll: Unroll, score: Score
    ) -> tuple[Tensor, Metrics]:
        state = unroll(self, theta, episode.support)
        outputs_QW = self.predict(theta, state, episode.query.x)
        loss, metrics = score(outputs_QW, episode.query)
        if self.loss == "cross-entropy":
            return loss, {"loss": loss, **metrics}
        mse = _squared_error(outputs_QW, episode)
        return mse, {"loss": loss, "mse": mse, **metrics}

    def _relation(self, theta: Theta, pairs_QWF: Tensor) -> Tensor:
        """g_φ, [Q, W]."""
        h, last = pairs_QWF, len(self.sizes) - 2
        for layer in range(last + 1):
            h = h @ theta[f"relation.{layer}.weight"] + theta[f"relation.{layer}.bias"]
            h = h if layer == last else h.relu()
        return h[..., 0]


def _squared_error(outputs_QW: Tensor, episode: Episode) -> Tensor:
    """Mean of (σ(outputs) − one-hot labels)² over the pairs of a real query row and a class that the support has."""
    ways, dtype = outputs_QW.shape[1], outputs_QW.dtype
    present_W = one_hot(episode.support.y, ways, dtype).sum(0) > 0
    counts_QW = ((episode.query.y != PADDING)[:, None] & present_W).to(dtype)
    errors_QW = (outputs_QW.sigmoid() - one_hot(episode.query.y, ways, dtype)).square()
    return (errors_QW * counts_QW).sum() / counts_QW.sum()
