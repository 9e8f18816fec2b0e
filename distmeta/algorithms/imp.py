"""Infinite mixture prototypes: Allen, Shelhamer, Shin & Tenenbaum 2019, arXiv 1902.04552.

Shapes: S support rows, Q query rows, F features, W ways; C = W + S, the most clusters that there can be.
"""

from __future__ import annotations

import math
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from distmeta.algorithms.class_features import (
    class_means,
    features_of_both,
    only,
    required_ways,
    squared_distances,
    without_absent,
)
from distmeta.protocols import PADDING, Batch, Model, Score, Theta

LOG_SIGMA = "cluster.log_sigma"
EMPTY = 1e-3
"""A cluster that holds no more than this part of a row is dropped (the authors' code)."""


class IMP:
    """A class is as many prototypes as its support asks for: one when it is compact, one a row when it is scattered.

        1. Each class starts with one cluster, at its mean.
        2. Row after row: one that is farther than λ (squared distance) from every cluster of its class opens
           another, at itself.   λ = −2σ log α + F σ log(1 + ρ/σ),   ρ the variance between the classes' means
        3. Rows are shared among the clusters of their class, z ∝ exp(−‖h − μ‖²/2σ), and each cluster moves to the
           mean of what it holds.
        4. logits_c = max over clusters k of class c of −‖h − μ_k‖²/2σ                              (Algorithm 1)

    The clusters opened depend on the order of the support rows. As in the authors' code (github.com/k-r-allen/imp)
    steps 2 and 3 are taken once, and λ and the shares z are constants to the gradient: it goes through the features
    that the means of 3 are taken of, and through 4, by which σ is learned. A cluster that 3 leaves empty is dropped.
    The setting is the supervised one: every support row has a label. With one cluster a class and σ = ½ it is the
    prototypical network. Any number of ways.

    Args:
        concentration: α of the Chinese restaurant process; larger opens more clusters. Default: the authors' code's
            for Omniglot.
        sigma: σ, a cluster's variance, to start with. Default: likewise.
        learn_sigma: σ is in theta, as `cluster.log_sigma`; else it is fixed.
        clusters: the most clusters that a class may have; null: no limit but its rows.

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
        self.model, self.score = model, score
        self.concentration, self.clusters = concentration, clusters
        self.sigma, self.learn_sigma = sigma, learn_sigma

    def init(self, generator: torch.Generator) -> Theta:
        theta = self.model.init_body()
        return theta | {LOG_SIGMA: torch.tensor([math.log(self.sigma)])} if self.learn_sigma else theta

    def begin(self, theta: Theta, support: Batch) -> Batch:
        return support

    def step(self, theta: Theta, state: Batch, support: Batch, k: int) -> Batch:
        return state

    def predict(self, theta: Theta, state: Batch, x: Tensor) -> Tensor:
        ways = required_ways(self.score, "imp")
        features_SF, features_QF = features_of_both(self.model, theta, state, x)
        sigma = theta[LOG_SIGMA].exp() if self.learn_sigma else features_SF.new_tensor([self.sigma])
        found = infer_clusters(features_SF, state.y, ways, sigma.detach(), self.concentration, self.clusters)
        logits_QC = -squared_distances(features_QF, found.centres) / (2 * sigma)
        classes_W = torch.arange(ways, device=x.device)
        own_WC = (found.labels == classes_W[:, None]) & found.exists
        return without_absent(only(own_WC, logits_QC[:, None, :]).amax(-1), own_WC.sum(1))


class Clusters(NamedTuple):
    """Clusters of a support set, as many places as there could be: first the classes', then one for each row."""

    centres: Tensor
    """[C, F]"""
    labels: Tensor
    """[C]"""
    exists: Tensor
    """bool [C]"""


def infer_clusters(
    features_SF: Tensor, y: Tensor, ways: int, sigma: Tensor, concentration: float, most: int | None
) -> Clusters:
    """Steps 1 to 3. The centres are differentiable in the features, with the rows' shares as constants."""
    means_WF, counts_W = class_means(features_SF, y, ways)
    fixed_SF = features_SF.detach()
    starts_CF = torch.cat([means_WF.detach(), fixed_SF])
    labels_C = torch.cat([torch.arange(ways, device=y.device), y])
    same_SC = (y[:, None] == labels_C) & (y != PADDING)[:, None]
    distance_SC = squared_distances(fixed_SF, starts_CF)
    limit = threshold(means_WF.detach(), counts_W, sigma, concentration)
    exists_C = _opened(distance_SC, same_SC, counts_W > 0, limit, most)
    member_SC = same_SC & exists_C
    share_SC = only(member_SC, -distance_SC / (2 * sigma)).softmax(-1) * member_SC
    held_C = share_SC.sum(0)
    centres_CF = share_SC.T @ features_SF / held_C.clamp(min=EMPTY)[:, None]
    return Clusters(centres_CF, labels_C, exists_C & (held_C > EMPTY))


def threshold(means_WF: Tensor, counts_W: Tensor, sigma: Tensor, concentration: float) -> Tensor:
    """λ, [1]. ρ is the variance of the present classes' means, averaged over features."""
    present_W1 = (counts_W > 0).to(means_WF.dtype)[:, None]
    centre_F = (means_WF * present_W1).sum(0) / present_W1.sum()
    variance_F = ((means_WF - centre_F).square() * present_W1).sum(0) / (present_W1.sum() - 1).clamp(min=1)
    spread = variance_F.mean()
    return sigma * (-2 * math.log(concentration) + means_WF.shape[1] * torch.log1p(spread / sigma))


def _opened(
    distance_SC: Tensor, same_SC: Tensor, present_W: Tensor, limit: Tensor, most: int | None
) -> Tensor:
    """Which clusters there are after step 2, bool [C]."""
    rows, total = distance_SC.shape
    places_C = torch.arange(total, device=distance_SC.device)
    exists_C = torch.cat([present_W, torch.zeros_like(same_SC[:, 0])])
    for s in range(rows):
        own_C = same_SC[s] & exists_C
        opens = same_SC[s].any() & (torch.where(own_C, distance_SC[s], torch.inf).amin() > limit)
        if most is not None:
            opens = opens & (own_C.sum() < most)
        exists_C = exists_C | (opens & (places_C == total - rows + s))
    return exists_C
