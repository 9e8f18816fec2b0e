"""Model-agnostic meta-learning: Finn, Abbeel & Levine 2017, arXiv 1703.03400; ANIL; BOIL."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from distmeta.algorithms.adaptation import (
    BETAS,
    Adapt,
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
    select_adapted,
    select_minibatch,
    stop_if_reached,
    support_gradient_and_loss,
)
from distmeta.errors import InputError
from distmeta.protocols import Model, Score, Theta


class MAML:
    """Learn an initialisation θ from which a few gradient steps on the support set solve a task.

        φ_0 = θ,   φ_{k+1} = φ_k − α ∇L_support(φ_k),   meta-gradient = ∇_θ L_query(φ_K)        (Algorithm 1)

    The meta-gradient is exact: it goes through every inner step and through the optimizer's state.

    Args:
        inner_lr: α > 0. The default is the paper's for 5-way Omniglot (appendix A.1).
        inner_steps: K ≥ 1.
        first_order: treat ∇L_support as a constant (FOMAML, §5.2). The meta-gradient is then ∇L_query(φ_K).
        adapt: the parameters that the inner loop changes. `all`; `head`, only the last layer (ANIL: Raghu et al.
            2020, arXiv 1909.09157); `body`, all others (BOIL: Oh et al. 2021, arXiv 2008.08882); or a glob or a list
            of globs over parameter names.
        inner_optimizer: `sgd`, `momentum`, `adam` or `adamw`, as in torch.optim. Its state starts at zero in every
            task.
        momentum: μ in [0, 1), for `momentum`.
        betas: β₁ and β₂ in [0, 1), for `adam` and `adamw`.
        eps: ε > 0, for `adam` and `adamw`. Adam divides by |g| + ε, so with torch's 1e-8 the rounding of a gradient
            near 0 decides the step. A larger ε is safer.
        inner_weight_decay: λ ≥ 0; added to the gradient, or with `adamw` decoupled from it.
        inner_clip_norm: largest norm of the gradient of all adapted parameters in a step; null: not clipped.
        inner_schedule: how α changes over the steps: `constant`, `linear`, `cosine` (`adaptation.list_factors`), or a
            list with a factor for each step. Evaluation with more steps keeps the last factor.
        inner_batch: support rows that a step sees, one minibatch after the other; null: all.
        inner_stop_loss: a task takes no more steps once the support loss of a step (of its minibatch, with
            `inner_batch`) is at most this; null: all steps.
        backprop_steps: the number of last steps with second derivatives. In earlier steps ∇L_support is a constant, so
            0 is FOMAML, and K or null is MAML. Memory holds the second-order graphs of only these steps. Not with
            `first_order`.
    """

    group_size = 1

    def __init__(
        self,
        model: Model,
        score: Score,
        inner_lr: Annotated[float, Field(gt=0)] = 0.4,
        inner_steps: Annotated[int, Field(ge=1)] = 1,
        first_order: bool = False,
        adapt: Adapt = "all",
        inner_optimizer: OptimizerName = "sgd",
        momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9,
        betas: Betas = BETAS,
        eps: Annotated[float, Field(gt=0)] = 1e-8,
        inner_weight_decay: Annotated[float, Field(ge=0)] = 0.0,
        inner_clip_norm: Annotated[float, Field(gt=0)] | None = None,
        inner_schedule: InnerSchedule = "constant",
        inner_batch: Annotated[int, Field(ge=1)] | None = None,
        inner_stop_loss: float | None = None,
        backprop_steps: Annotated[int, Field(ge=0)] | None = None,
    ):
        check_inner_optimizer(model, inner_optimizer)
        check_inner_batch(score, inner_batch)
        if first_order and backprop_steps:
            raise InputError(
                f"algorithm.backprop_steps: got {backprop_steps} with first_order: true, expected null: no step of a "
                "first-order method has second derivatives"
            )
        self.model = model
        self.score = score
        self.inner_lr = inner_lr
        self.inner_steps = inner_steps
        self.first_order = first_order or backprop_steps == 0
        self.names = select_adapted(model, adapt)
        self.inner_batch = inner_batch
        self.inner_stop_loss = inner_stop_loss
        self.constant_steps = 0 if backprop_steps is None else max(inner_steps - backprop_steps, 0)
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
        return allow_stopping(self.optimizer.begin(phi, self.names), self.inner_stop_loss)

    def step(self, theta: Theta, state: InnerState, support: Any, k: int) -> InnerState:
        batch = select_minibatch(support, k, self.inner_batch, self.score)
        is_constant = self.first_order or k < self.constant_steps
        gradient, loss = support_gradient_and_loss(
            self.model, self.score, state.phi, batch, self.names, is_constant
        )
        after = self.optimizer.step(state, gradient, k, self.inner_lr)
        return stop_if_reached(state, after, loss, self.inner_stop_loss)

    def predict(self, theta: Theta, state: InnerState, x: Tensor) -> Tensor:
        return self.model(state.phi, x)
