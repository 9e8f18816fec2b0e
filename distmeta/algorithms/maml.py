"""Model-agnostic meta-learning: Finn, Abbeel & Levine 2017, arXiv 1703.03400; ANIL; BOIL."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from distmeta.algorithms.adaptation import (
    BETAS,
    Adapting,
    Betas,
    OptimizerName,
    adapted_names,
    begin_phi,
    check_adam,
    optimizer,
    support_gradient,
)
from distmeta.protocols import Model, Score, Theta


class MAML:
    """θ is an initialisation from which a few gradient steps on a task's support set solve the task.

        φ_0 = θ,   φ_{k+1} = φ_k − α ∇L_support(φ_k),   meta-gradient = ∇_θ L_query(φ_K)        (Algorithm 1)

    The meta-gradient is exact: it goes through every inner step and the optimizer's state. `first_order: true` takes
    ∇L_support as a constant (FOMAML, §5.2): the meta-gradient is then ∇L_query at φ_K.

    Args:
        inner_lr: α. The default is the paper's for 5-way Omniglot (appendix A.1).
        inner_steps: K.
        first_order: FOMAML.
        adapt: which parameters the inner loop moves: `all`; `head`, the last linear layer alone (ANIL: Raghu et al.
            2020, arXiv 1909.09157); `body`, all others (BOIL: Oh et al. 2021, arXiv 2008.08882); or a glob over names.
        inner_optimizer: `sgd`, `momentum` or `adam`, as torch.optim's; their state starts anew in every task.
        momentum, betas, eps: the optimizer's, where it has them. Adam divides by |g| + ε: where a gradient is as good
            as 0, its rounding decides the step, and a larger ε than torch's 1e-8 is safer.
    """

    group_size = 1

    def __init__(
        self,
        model: Model,
        score: Score,
        inner_lr: Annotated[float, Field(gt=0)] = 0.4,
        inner_steps: Annotated[int, Field(ge=1)] = 1,
        first_order: bool = False,
        adapt: str = "all",
        inner_optimizer: OptimizerName = "sgd",
        momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9,
        betas: Betas = BETAS,
        eps: Annotated[float, Field(gt=0)] = 1e-8,
    ):
        check_adam(model, inner_optimizer)
        self.model, self.score = model, score
        self.inner_lr, self.inner_steps, self.first_order = inner_lr, inner_steps, first_order
        self.names = adapted_names(model, adapt)
        self.options = (inner_optimizer, momentum, betas, eps)

    def init(self, generator: torch.Generator) -> Theta:
        return self.model.init(generator)

    def begin(self, theta: Theta, support: Any) -> Adapting:
        return optimizer(*self.options).begin(begin_phi(self.model, self.score, theta, support), self.names)

    def step(self, theta: Theta, state: Adapting, support: Any, k: int) -> Adapting:
        gradient = support_gradient(self.model, self.score, state.phi, support, self.names, self.first_order)
        update, moments = optimizer(*self.options).update(gradient, state.moments, k)
        phi = state.phi | {name: state.phi[name] - self.inner_lr * update[name] for name in update}
        return Adapting(phi, moments)

    def predict(self, theta: Theta, state: Adapting, x: Tensor) -> Tensor:
        return self.model(state.phi, x)
