"""MAML for reinforcement learning: Finn et al. 2017, §5.3; PPO's clipping; ProMP; E-MAML."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from distmeta.algorithms.adaptation import adapted_names, begin_phi, support_gradient
from distmeta.errors import InputError
from distmeta.protocols import Episode, Metrics, Model, Score, Theta, Unroll, support_at, to_float32
from distmeta.trajectories import Trajectories, divergence, log_prob, mean, surrogate

NonNegative = Annotated[float, Field(ge=0)]


class PolicyMAML:
    """θ is a policy from which a few policy gradients, each on trajectories of its own, solve the task.

        φ_0 = θ,   φ_{k+1} = φ_k − α ∇ −E_{τ_k ~ φ_k}[ρ A],   ρ = π_φ(a|s) / π_behaviour(a|s)
        meta-loss = −E_{τ_K ~ φ_K}[min(ρ A, clip(ρ, 1±ε) A)]  +  η/K Σ_k KL(π_behaviour ‖ π_{φ_k})  +  E-MAML's term

    Trajectories are collected first and are constants in the loss; the meta-gradient is its exact derivative through
    every inner step. With ratios inside, that is ProMP's low-variance-curvature estimator (Rothfuss et al. 2019, arXiv
    1810.06784); `kl` η > 0 adds its penalty. In the first of `outer_epochs` steps on a collection ρ = 1: the clipping
    does nothing and the penalty has no gradient.

    E-MAML (Stadie et al. 2018, arXiv 1803.01118; Al-Shedivat et al. 2018, 1710.03641) credits the trajectories that
    were adapted on with what was reached afterwards:

        − Σ_k Σ_i log π_{φ_k}(τ_k,i) (R_K − b_k,i),   b_k,i the mean return of the other trajectories of step k

    in the units of the surrogate (divided by the steps of a query trajectory and the query's scale of advantages). The
    steps inside are then on −E[log π A]: for given trajectories that is φ's own derivative; ratios would count their
    dependence on θ twice. The baseline is ours; it does not depend on τ_k,i, so that nothing is biased. The term sums
    over whole trajectories and is noisy.

    Deviation: the outer step is the job's optimizer; the MAML paper's is TRPO.

    Args:
        inner_lr: α; 0.1 in the MAML paper's first step.
        inner_steps: K.
        outer_epochs: steps of the outer optimizer on one collection of trajectories; clipping and penalty are for more
            than one.
        later_lr: α of steps past the K that were trained; null: half of α, as in the paper's evaluation.
        clip: PPO's ε; null: no clipping.
        kl: η.
        first_order: takes the policy gradients inside as constants.
        e_maml: adds E-MAML's term. Needs two trajectories or more.
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
        kl: NonNegative = 0.0,
        first_order: bool = False,
        e_maml: bool = False,
    ):
        self.model, self.score = model, score
        self.inner_lr, self.inner_steps, self.first_order = inner_lr, inner_steps, first_order
        self.outer_epochs = outer_epochs
        self.later_lr = inner_lr / 2 if later_lr is None else later_lr
        self.clip, self.kl, self.e_maml = clip, kl, e_maml
        self.names = adapted_names(model, "all")

    def init(self, generator: torch.Generator) -> Theta:
        return self.model.init(generator)

    def begin(self, theta: Theta, support: Any) -> Theta:
        return begin_phi(self.model, self.score, theta, support)

    def step(self, theta: Theta, phi: Theta, support: Any, k: int) -> Theta:
        score = given_trajectories if self.e_maml else self.score
        gradient = support_gradient(self.model, score, phi, support, self.names, self.first_order)
        rate = self.inner_lr if k < self.inner_steps else self.later_lr
        return phi | {name: phi[name] - rate * g for name, g in gradient.items()}

    def predict(self, theta: Theta, phi: Theta, x: Tensor) -> Tensor:
        return self.model(phi, x)

    def meta_loss(
        self, theta: Theta, episode: Episode, unroll: Unroll, score: Score
    ) -> tuple[Tensor, Metrics]:
        query: Trajectories = episode.query
        after = unroll(self, theta, episode.support, every=True)
        outputs = to_float32(self.predict(theta, after[-1], query.x))
        loss = surrogate(outputs, query, self.clip)
        metrics = {"loss": loss, **score(outputs, query)[1]}
        if self.kl == 0 and not self.e_maml:
            return loss, metrics
        before = [self.begin(theta, support_at(episode.support, 0)), *after[:-1]]
        for k, phi in enumerate(before):
            support: Trajectories = support_at(episode.support, k)
            old = to_float32(self.predict(theta, phi, support.x))
            penalty = mean(divergence(support.behaviour, old, support.action), support)
            loss = loss + self.kl / self.inner_steps * penalty
            if self.e_maml:
                loss = loss + explored(old, support, query)
        return loss, metrics


def given_trajectories(outputs: Tensor, batch: Trajectories) -> tuple[Tensor, Metrics]:
    """−E[log π A]: the policy gradient, and its derivative for trajectories that stay as they are."""
    return -mean(log_prob(outputs, batch.action) * batch.advantage, batch), {}


def explored(outputs: Tensor, support: Trajectories, query: Trajectories) -> Tensor:
    """−Σ_i log π(τ_i) (R − b_i), b_i the mean return of the others, in the units of the query's surrogate."""
    count = len(support.total)
    if count < 2:
        raise InputError(
            "tasks.trajectories: got 1 with algorithm.e_maml, whose baseline is the mean of the other trajectories: "
            "expected 2 or more"
        )
    others = (support.total.sum() - support.total) / (count - 1)
    gain = (query.total.mean() - others) / (query.scale[0] * query.real.sum(-1).mean())
    logs = (log_prob(outputs, support.action) * support.real).sum(-1)
    return -(logs * gain).sum()
