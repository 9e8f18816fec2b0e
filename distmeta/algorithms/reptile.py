"""Reptile: Nichol, Achiam & Schulman 2018, arXiv 1803.02999."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from distmeta.algorithms.adaptation import (
    Adapting,
    Betas,
    OptimizerName,
    begin_phi,
    check_adam,
    check_batches,
    minibatch,
    optimizer,
    support_gradient,
)
from distmeta.protocols import Episode, Metrics, Model, Score, Theta, Unroll, query_loss, support_at

NO_FIRST_MOMENT = [0.0, 0.999]


class Reptile:
    """Moves θ towards the parameters that a few gradient steps on a task end at.

        φ_0 = θ,   φ_{k+1} = φ_k − α ∇L_batch_k(φ_k),   meta-gradient = θ − φ_K                 (Algorithm 2)

    An outer SGD of rate ε is the paper's θ ← θ + ε(φ_K − θ). It is not the derivative of a query loss: the
    surrogate ½‖θ − sg(φ_K)‖² has this gradient; the query loss is among the metrics, and the query set takes no
    part in training.

    Args:
        inner_lr: α. The default, with Adam of β₁ = 0 inside, is the paper's for Omniglot (appendix A).
        inner_steps: K. With K = 1 this is the gradient of the average loss, α∇L: joint training (§3).
        inner_batch: support examples that one inner step sees; null, or where there are no more: all. The paper's
            analysis (§5) rests on steps that see different minibatches.
        inner_optimizer, momentum, betas, eps: `sgd`, `momentum` or `adam`, as torch.optim's. Its state starts anew in
            every task; the authors' code carries Adam's second moment from task to task on its one worker.
    """

    group_size = 1

    def __init__(
        self,
        model: Model,
        score: Score,
        inner_lr: Annotated[float, Field(gt=0)] = 1e-3,
        inner_steps: Annotated[int, Field(ge=1)] = 5,
        inner_batch: Annotated[int, Field(ge=1)] | None = None,
        inner_optimizer: OptimizerName = "adam",
        momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9,
        betas: Betas = NO_FIRST_MOMENT,
        eps: Annotated[float, Field(gt=0)] = 1e-8,
    ):
        check_adam(model, inner_optimizer)
        check_batches(score, inner_batch)
        self.model, self.score = model, score
        self.inner_lr, self.inner_steps, self.inner_batch = inner_lr, inner_steps, inner_batch
        self.options = (inner_optimizer, momentum, betas, eps)

    def init(self, generator: torch.Generator) -> Theta:
        return self.model.init(generator)

    def begin(self, theta: Theta, support: Any) -> Adapting:
        phi = begin_phi(self.model, self.score, theta, support)
        return optimizer(*self.options).begin(phi, tuple(phi))

    def step(self, theta: Theta, state: Adapting, support: Any, k: int) -> Adapting:
        rows = minibatch(support, k, self.inner_batch)
        gradient = support_gradient(self.model, self.score, state.phi, rows)
        update, moments = optimizer(*self.options).update(gradient, state.moments, k)
        return Adapting({name: p - self.inner_lr * update[name] for name, p in state.phi.items()}, moments)

    def predict(self, theta: Theta, state: Adapting, x: Tensor) -> Tensor:
        return self.model(state.phi, x)

    def meta_loss(
        self, theta: Theta, episode: Episode, unroll: Unroll, score: Score
    ) -> tuple[Tensor, Metrics]:
        fixed = {name: value.detach() for name, value in theta.items()}
        state = unroll(self, fixed, episode.support, detach=True)
        _, metrics = query_loss(self, fixed, episode, lambda *_: state, score)
        start = self.begin(theta, support_at(episode.support, 0)).phi  # theta, but for a shared head
        distance = [(start[name] - phi).square().sum() for name, phi in state.phi.items()]
        return 0.5 * torch.stack(distance).sum(), metrics
