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
    InnerState,
    OptimizerName,
    begin_phi,
    check_inner_optimizer,
    select_adapted,
    support_gradient,
)
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
        inner_optimizer: `sgd`, `momentum` or `adam`, as in torch.optim. Its state starts at zero in every task.
        momentum: μ in [0, 1), for `momentum`.
        betas: β₁ and β₂ in [0, 1), for `adam`.
        eps: ε > 0, for `adam`. Adam divides by |g| + ε, so with torch's 1e-8 the rounding of a gradient near 0 decides
            the step. A larger ε is safer.
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
    ):
        check_inner_optimizer(model, inner_optimizer)
        self.model = model
        self.score = score
        self.inner_lr = inner_lr
        self.inner_steps = inner_steps
        self.first_order = first_order
        self.names = select_adapted(model, adapt)
        self.optimizer = InnerOptimizer(inner_optimizer, momentum, betas, eps)

    def init(self, generator: torch.Generator) -> Theta:
        return self.model.init(generator)

    def begin(self, theta: Theta, support: Any) -> InnerState:
        return self.optimizer.begin(begin_phi(self.model, self.score, theta, support), self.names)

    def step(self, theta: Theta, state: InnerState, support: Any, k: int) -> InnerState:
        gradient = support_gradient(self.model, self.score, state.phi, support, self.names, self.first_order)
        return self.optimizer.step(state, gradient, k, self.inner_lr)

    def predict(self, theta: Theta, state: InnerState, x: Tensor) -> Tensor:
        return self.model(state.phi, x)
