"""MAML for reinforcement learning: Finn et al. 2017, arXiv 1703.03400, §5.3; PPO's clipping; ProMP; E-MAML."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from distmeta.algorithms.adaptation import begin_phi, select_adapted, support_gradient
from distmeta.compute.gradient import support_at, to_float32
from distmeta.errors import InputError
from distmeta.protocols import Episode, Metrics, Model, Score, Theta, Unroll
from distmeta.trajectories import (
    Trajectories,
    kl_divergence,
    log_prob,
    mean_over_steps,
    surrogate_loss,
)


class PolicyMAML:
    """Learn a policy θ from which a few policy gradient steps, each on new trajectories, solve a task.

        φ_0 = θ,   φ_{k+1} = φ_k − α ∇ −E_{τ_k ~ φ_k}[ρ A],   ρ = π_φ(a|s) / π_behaviour(a|s)
        meta-loss = −E_{τ_K ~ φ_K}[min(ρ A, clip(ρ, 1±ε) A)]  +  η/K Σ_k KL(π_behaviour ‖ π_{φ_k})  +  E-MAML's term

    Trajectories are collected first and are constants in the loss. The meta-gradient is its exact derivative through
    every inner step. With ratios in the inner loss this is ProMP's low-variance-curvature estimator (Rothfuss et al.
    2019, arXiv 1810.06784), and η > 0 adds ProMP's penalty. In the first of `outer_epochs` steps on the same
    trajectories ρ = 1, so clipping does nothing and the penalty has no gradient.

    E-MAML (Stadie et al. 2018, arXiv 1803.01118; Al-Shedivat et al. 2018, arXiv 1710.03641) also credits the support
    trajectories with the return after adaptation:

        − Σ_k Σ_i log π_{φ_k}(τ_k,i) (R_K − b_k,i),   b_k,i = mean return of the other trajectories of step k

    It is divided by the length of a query trajectory and by the scale of the query's advantages, which gives it the
    units of the surrogate. The inner loss is then −E[log π A], the derivative of φ for given trajectories; with ratios
    their dependence on θ would count twice. The baseline b is ours. It does not depend on τ_k,i, so it adds no bias.
    The term sums over whole trajectories and is noisy.

    Deviation: the outer step is that of the job's optimizer; the MAML paper has TRPO.

    Args:
        inner_lr: α > 0; 0.1 in the MAML paper's first step.
        inner_steps: K ≥ 1.
        outer_epochs: steps of the outer optimizer on the same trajectories, ≥ 1. With 1, clipping and penalty have no
            effect.
        later_lr: α of steps after the K-th, > 0; null: half of α, as in the paper's evaluation.
        clip: PPO's ε in (0, 1); null: no clipping.
        kl: η ≥ 0.
        first_order: treat the inner policy gradients as constants.
        e_maml: add E-MAML's term. It needs at least two trajectories.
    """

    group_size = 1

    def __init__(
        self,
        model: Model,
        score: Score,
        inner_lr: Annotated[float, Field(gt=0)] = 0.1,
        inner_steps: Annotated[int, Field(ge=1)] = 1,
        outer_epochs: Annotated[int, Field(ge=1)] = 1,
        later_lr: Annotated[float, Field(gt=0)] | None = None,
        clip: Annotated[float, Field(gt=0, lt=1)] | None = 0.2,
        kl: Annotated[float, Field(ge=0)] = 0.0,
        first_order: bool = False,
        e_maml: bool = False,
    ):
        self.model = model
        self.score = score
        self.inner_lr = inner_lr
        self.inner_steps = inner_steps
        self.outer_epochs = outer_epochs
        self.later_lr = inner_lr / 2 if later_lr is None else later_lr
        self.clip = clip
        self.kl = kl
        self.first_order = first_order
        self.e_maml = e_maml
        self.names = select_adapted(model, "all")

    def init(self, generator: torch.Generator) -> Theta:
        return self.model.init(generator)

    def begin(self, theta: Theta, support: Any) -> Theta:
        return begin_phi(self.model, self.score, theta, support)

    def step(self, theta: Theta, phi: Theta, support: Any, k: int) -> Theta:
        score = score_log_likelihood if self.e_maml else self.score
        gradient = support_gradient(self.model, score, phi, support, self.names, self.first_order)
        rate = self.inner_lr if k < self.inner_steps else self.later_lr
        return phi | {name: phi[name] - rate * g for name, g in gradient.items()}

    def predict(self, theta: Theta, phi: Theta, x: Tensor) -> Tensor:
        return self.model(phi, x)

    def meta_loss(
        self, theta: Theta, episode: Episode, unroll: Unroll, score: Score
    ) -> tuple[Tensor, Metrics]:
        query: Trajectories = episode.query
        phis = unroll(self, theta, episode.support, every=True)
        outputs = to_float32(self.predict(theta, phis[-1], query.x))
        loss = surrogate_loss(outputs, query, self.clip)
        metrics = {"loss": loss, **score(outputs, query)[1]}
        if self.kl == 0 and not self.e_maml:
            return loss, metrics
        start = self.begin(theta, support_at(episode.support, 0))
        for k, phi in enumerate([start, *phis[:-1]]):
            support: Trajectories = support_at(episode.support, k)
            support_outputs = to_float32(self.predict(theta, phi, support.x))
            penalty = mean_over_steps(
                kl_divergence(support.behaviour, support_outputs, support.action), support
            )
            loss = loss + self.kl / self.inner_steps * penalty
            if self.e_maml:
                loss = loss + exploration_loss(support_outputs, support, query)
        return loss, metrics


def score_log_likelihood(outputs: Tensor, batch: Trajectories) -> tuple[Tensor, Metrics]:
    """Return −E[log π A]. Its gradient is the policy gradient, also in its derivative for given trajectories."""
    return -mean_over_steps(log_prob(outputs, batch.action) * batch.advantage, batch), {}


def exploration_loss(outputs: Tensor, support: Trajectories, query: Trajectories) -> Tensor:
    """Return E-MAML's term of one inner step, −Σ_i log π(τ_i) (R − b_i), in the units of the query's surrogate."""
    count = len(support.total)
    if count < 2:
        raise InputError(
            "tasks.trajectories: got 1 with algorithm.e_maml, expected 2 or more: the baseline is the mean return of "
            "the other trajectories"
        )
    baseline = (support.total.sum() - support.total) / (count - 1)
    gain = (query.total.mean() - baseline) / (query.scale[0] * query.real.sum(-1).mean())
    log_likelihood = (log_prob(outputs, support.action) * support.real).sum(-1)
    return -(log_likelihood * gain).sum()
