"""Model-agnostic meta-learning: Finn, Abbeel & Levine 2017, arXiv 1703.03400."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from distmeta.algorithms.inner import support_gradient
from distmeta.core import Model, Score, Theta


class MAML:
    """θ is an initialisation from which a few gradient steps on a task's support set solve the task.

        φ_0 = θ,   φ_{k+1} = φ_k − α ∇L_support(φ_k),   meta-gradient = ∇_θ L_query(φ_K)        (Algorithm 1)

    The meta-gradient is exact: it goes through every inner step. `first_order: true` takes ∇L_support as a
    constant (FOMAML, §5.2): the meta-gradient is then ∇L_query at φ_K.

    Args:
        inner_lr: α. The default is the paper's for 5-way Omniglot (appendix A.1).
        inner_steps: K.
        first_order: FOMAML.
    """

    group_size = 1

    def __init__(
        self,
        model: Model,
        score: Score,
        inner_lr: Annotated[float, Field(gt=0)] = 0.4,
        inner_steps: Annotated[int, Field(ge=1)] = 1,
        first_order: bool = False,
    ):
        self.model, self.score = model, score
        self.inner_lr, self.inner_steps, self.first_order = inner_lr, inner_steps, first_order

    def init(self, generator: torch.Generator) -> Theta:
        return self.model.init(generator)

    def begin(self, theta: Theta, support: Any) -> Theta:
        return dict(theta)

    def step(self, theta: Theta, phi: Theta, support: Any, k: int) -> Theta:
        gradient = support_gradient(self.model, self.score, phi, support)
        if self.first_order:
            gradient = {name: g.detach() for name, g in gradient.items()}
        return {name: phi[name] - self.inner_lr * gradient[name] for name in phi}

    def predict(self, theta: Theta, phi: Theta, x: Tensor) -> Tensor:
        return self.model(phi, x)
