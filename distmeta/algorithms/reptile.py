"""Reptile: Nichol, Achiam & Schulman 2018, arXiv 1803.02999."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from distmeta.algorithms.adaptation import (
    Betas,
    InnerOptimizer,
    InnerSchedule,
    InnerState,
    OptimizerName,
    allow_stopping,
    begin_phi,
    check_inner_batch,
    check_inner_optimizer,
    list_factors,
    select_minibatch,
    stop_if_reached,
    support_gradient_and_loss,
)
from distmeta.compute.gradient import query_loss, support_at
from distmeta.protocols import Episode, Metrics, Model, Score, Theta, Unroll

BETAS_WITHOUT_MOMENTUM = [0.0, 0.999]


class Reptile:
    """Move θ towards the parameters at which a few gradient steps on a task arrive.

        φ_0 = θ,   φ_{k+1} = φ_k − α ∇L_batch_k(φ_k),   meta-gradient = θ − φ_K                 (Algorithm 2)

    With SGD of rate ε as outer optimizer this is the paper's θ ← θ + ε(φ_K − θ). It is not the derivative of a query
    loss. The meta-loss is the surrogate ½‖θ − sg(φ_K)‖², whose gradient it is. The query set is not used in training;
    its loss is a metric.

    Deviation: the inner optimizer's state starts at zero in every task. The authors' code has one worker, which
    carries Adam's second moment from task to task.

    Args:
        inner_lr: α > 0. The defaults of α and of the optimizer (Adam with β₁ = 0) are the paper's for Omniglot
            (appendix A).
        inner_steps: K ≥ 1. With K = 1 the meta-gradient is α∇L, that of joint training (§3).
        inner_batch: support examples per inner step; null, or more than there are: all. The paper's analysis (§5)
            assumes that the steps see different minibatches.
        inner_optimizer: `sgd`, `momentum`, `adam` or `adamw`, as in torch.optim.
        momentum: μ in [0, 1), for `momentum`.
        betas: β₁ and β₂ in [0, 1), for `adam` and `adamw`.
        eps: ε > 0, for `adam` and `adamw`.
        inner_weight_decay: λ ≥ 0; added to the gradient, or with `adamw` decoupled from it.
        inner_clip_norm: largest norm of the gradient of all parameters in a step; null: not clipped.
        inner_schedule: how α changes over the steps, as in `maml`.
        inner_stop_loss: a task takes no more steps once the support loss of a step (of its minibatch, with
            `inner_batch`) is at most this; null: all steps.
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
        betas: Betas = BETAS_WITHOUT_MOMENTUM,
        eps: Annotated[float, Field(gt=0)] = 1e-8,
        inner_weight_decay: Annotated[float, Field(ge=0)] = 0.0,
        inner_clip_norm: Annotated[float, Field(gt=0)] | None = None,
        inner_schedule: InnerSchedule = "constant",
        inner_stop_loss: float | None = None,
    ):
        check_inner_optimizer(model, inner_optimizer)
        check_inner_batch(score, inner_batch)
        self.model = model
        self.score = score
        self.inner_lr = inner_lr
        self.inner_steps = inner_steps
        self.inner_batch = inner_batch
        self.inner_stop_loss = inner_stop_loss
        self.optimizer = InnerOptimizer(
            inner_optimizer,
            momentum,
            betas,
            eps,
            weight_decay=inner_weight_decay,
            clip_norm=inner_clip_norm,
            factors=list_factors(inner_schedule, inner_steps),
        )

    def init(self, generator: torch.Generator) -> Theta:
        return self.model.init(generator)

    def begin(self, theta: Theta, support: Any) -> InnerState:
        phi = begin_phi(self.model, self.score, theta, support)
        return allow_stopping(self.optimizer.begin(phi, tuple(phi)), self.inner_stop_loss)

    def step(self, theta: Theta, state: InnerState, support: Any, k: int) -> InnerState:
        batch = select_minibatch(support, k, self.inner_batch, self.score)
        gradient, loss = support_gradient_and_loss(self.model, self.score, state.phi, batch)
        after = self.optimizer.step(state, gradient, k, self.inner_lr)
        return stop_if_reached(state, after, loss, self.inner_stop_loss)

    def predict(self, theta: Theta, state: InnerState, x: Tensor) -> Tensor:
        return self.model(state.phi, x)

    def meta_loss(
        self, theta: Theta, episode: Episode, unroll: Unroll, score: Score
    ) -> tuple[Tensor, Metrics]:
        constants = {name: value.detach() for name, value in theta.items()}
        state = unroll(self, constants, episode.support, detach=True)
        _, metrics = query_loss(self, constants, episode, lambda *_: state, score)
        # φ_0 is theta itself, except for a shared head, whose row is repeated for every class.
        start = self.begin(theta, support_at(episode.support, 0)).phi
        squares = [(start[name] - phi).square().sum() for name, phi in state.phi.items()]
        return 0.5 * torch.stack(squares).sum(), metrics
