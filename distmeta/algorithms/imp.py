"""Infinite mixture prototypes: Allen, Shelhamer, Shin & Tenenbaum 2019, arXiv 1902.04552.

Shapes: S support rows, Q query rows, F features, W ways; C = W + S, the largest possible number of clusters.
"""

from __future__ import annotations

import math
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from distmeta.algorithms.class_features import (
    average_by_class,
    embed_together,
    mask_absent_classes,
    mask_logits,
    require_ways,
    squared_distances,
)
from distmeta.protocols import PADDING, Batch, Model, Score, Theta

LOG_SIGMA = "cluster.log_sigma"
SMALLEST_CLUSTER = 1e-3
"""A cluster with no more than this share of a row is dropped, as in the authors' code."""


class IMP:
    """Represent a class by as many prototypes as its support needs: one if it is compact, up to one per row if not.

        1. Each class starts with one cluster, at its mean.
        2. Row by row: a row that is farther than λ (squared distance) from every cluster of its class opens a new
           cluster at itself.   λ = −2σ log α + F σ log(1 + ρ/σ),   ρ the variance between the classes' means
        3. Rows are shared among the clusters of their class, z ∝ exp(−‖h − μ‖²/2σ), and each cluster moves to the
           weighted mean of its rows.
        4. logits_c = max over clusters k of class c of −‖h − μ_k‖²/2σ                              (Algorithm 1)

    Any number of ways works. The clusters depend on the order of the support rows. As in the authors' code
    (github.com/k-r-allen/imp), steps 2 and 3 are taken once, λ and the shares z are constants, and a cluster that is
    empty after step 3 is dropped. The gradient goes through the features in the means of step 3 and through step 4,
    from which σ is learned. With one cluster per class and σ = ½ this is the prototypical network.

    Deviation: only the supervised setting, in which every support row has a label.

    Args:
        concentration: α > 0 of the Chinese restaurant process. A larger α opens more clusters. The default is the
            authors' for Omniglot.
        sigma: σ > 0, the initial variance of a cluster. The default is the authors' for Omniglot.
        learn_sigma: learn σ (key `cluster.log_sigma`).
        clusters: the most clusters per class, ≥ 1; null: as many as the class has rows.

    Raises:
        InputError: the tasks have no classes.
    """

    group_size = 1
    inner_steps = 0

    def __init__(
        self,
        model: Model,
        score: Score,
        concentration: Annotated[float, Field(gt=0)] = 0.1,
        sigma: Annotated[float, Field(gt=0)] = 5.0,
        learn_sigma: bool = True,
        clusters: Annotated[int, Field(ge=1)] | None = None,
    ):
        self.model = model
        self.score = score
        self.concentration = concentration
        self.sigma = sigma
        self.learn_sigma = learn_sigma
        self.clusters = clusters

    def init(self, generator: torch.Generator) -> Theta:
        theta = self.model.init_body()
        if self.learn_sigma:
            theta[LOG_SIGMA] = torch.tensor([math.log(self.sigma)])
        return theta

    def begin(self, theta: Theta, support: Batch) -> Batch:
        return support

    def step(self, theta: Theta, state: Batch, support: Batch, k: int) -> Batch:
        return state

    def predict(self, theta: Theta, state: Batch, x: Tensor) -> Tensor:
        ways = require_ways(self.score, "imp")
        features_SF, features_QF = embed_together(self.model, theta, state, x)
        sigma = theta[LOG_SIGMA].exp() if self.learn_sigma else features_SF.new_tensor([self.sigma])
        clusters = infer_clusters(
            features_SF, state.y, ways, sigma.detach(), self.concentration, self.clusters
        )
        logits_QC = -squared_distances(features_QF, clusters.centres) / (2 * sigma)
        classes_W = torch.arange(ways, device=features_QF.device)
        belongs_WC = (clusters.labels == classes_W[:, None]) & clusters.exists
        logits_QW = mask_logits(logits_QC[:, None, :], belongs_WC).amax(-1)
        return mask_absent_classes(logits_QW, belongs_WC.sum(1))


class Clusters(NamedTuple):
    """All possible clusters of a support set: one per class, then one per row."""

    centres: Tensor
    """[C, F]."""
    labels: Tensor
    """The class of each cluster, [C]."""
    exists: Tensor
    """bool [C]."""


def infer_clusters(
    features_SF: Tensor, y: Tensor, ways: int, sigma: Tensor, concentration: float, max_clusters: int | None
) -> Clusters:
    """Take steps 1 to 3. The centres are differentiable in the features; the rows' shares are constants."""
    means_WF, counts_W = average_by_class(features_SF, y, ways)
    constant_SF = features_SF.detach()
    starts_CF = torch.cat([means_WF.detach(), constant_SF])
    labels_C = torch.cat([torch.arange(ways, device=y.device), y])
    same_class_SC = (y[:, None] == labels_C) & (y != PADDING)[:, None]
    distance_SC = squared_distances(constant_SF, starts_CF)
    limit = compute_distance_limit(means_WF.detach(), counts_W, sigma, concentration)
    exists_C = open_clusters(distance_SC, same_class_SC, counts_W > 0, limit, max_clusters)
    may_join_SC = same_class_SC & exists_C
    share_SC = mask_logits(-distance_SC / (2 * sigma), may_join_SC).softmax(-1) * may_join_SC
    total_C = share_SC.sum(0)
    centres_CF = share_SC.T @ features_SF / total_C.clamp(min=SMALLEST_CLUSTER)[:, None]
    return Clusters(centres_CF, labels_C, exists_C & (total_C > SMALLEST_CLUSTER))


def compute_distance_limit(means_WF: Tensor, counts_W: Tensor, sigma: Tensor, concentration: float) -> Tensor:
    """Return λ, [1]. ρ is the variance of the means of the classes that have rows, averaged over features."""
    present_W1 = (counts_W > 0).to(means_WF.dtype)[:, None]
    centre_F = (means_WF * present_W1).sum(0) / present_W1.sum()
    variance_F = ((means_WF - centre_F).square() * present_W1).sum(0) / (present_W1.sum() - 1).clamp(min=1)
    rho = variance_F.mean()
    return sigma * (-2 * math.log(concentration) + means_WF.shape[1] * torch.log1p(rho / sigma))


def open_clusters(
    distance_SC: Tensor, same_class_SC: Tensor, present_W: Tensor, limit: Tensor, max_clusters: int | None
) -> Tensor:
    """Return which clusters exist after step 2, bool [C]."""
    rows, total = distance_SC.shape
    index_C = torch.arange(total, device=distance_SC.device)
    exists_C = torch.cat([present_W, torch.zeros_like(same_class_SC[:, 0])])
    for s in range(rows):
        own_C = same_class_SC[s] & exists_C
        nearest = torch.where(own_C, distance_SC[s], torch.inf).amin()
        opens = same_class_SC[s].any() & (nearest > limit)
        if max_clusters is not None:
            opens = opens & (own_C.sum() < max_clusters)
        exists_C = exists_C | (opens & (index_C == total - rows + s))
    return exists_C
