"""Meta-SGD: Li, Zhou, Chen & Li 2017, arXiv 1707.09835."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from distmeta.algorithms.adaptation import (
    adapted_names,
    begin_phi,
    rate_of,
    shapes_for_any_ways,
    support_gradient,
)
from distmeta.protocols import Model, Score, Theta

SMALLEST, LARGEST = 0.005, 0.1


class MetaSGD:
    """MAML that learns the rate and the sign of every single parameter's step along with θ.

        φ_{k+1} = φ_k − α ∘ ∇L_support(φ_k),   φ_0 = θ,   meta-gradient = ∇_{θ,α} L_query(φ_K)      (Algorithm 1)

    α (keys `inner_lr.<parameter>`, the parameter's shape) is unconstrained: a negative entry climbs. All K steps
    share it. The paper moves θ and α by one outer rate β; `outer.rates: {"inner_lr.*": …}` gives α its own.

    A head with free ways (`model.head` shared or prototype) has one row of rates [1, F] for all classes.

    Args:
        inner_lr: the first value of every α; null draws one for all, uniform in [0.005, 0.1], as the paper does (§4).
        inner_steps: K; one in the paper.
        first_order: takes ∇L_support as a constant.
    """

    group_size = 1

    def __init__(
        self,
        model: Model,
        score: Score,
        inner_lr: float | None = None,
        inner_steps: Annotated[int, Field(ge=1)] = 1,
        first_order: bool = False,
    ):
        self.model, self.score = model, score
        self.inner_lr, self.inner_steps, self.first_order = inner_lr, inner_steps, first_order
        self.names = adapted_names(model, "all")

    def init(self, generator: torch.Generator) -> Theta:
        theta = self.model.init(generator)
        drawn = float(torch.empty(()).uniform_(SMALLEST, LARGEST, generator=generator))
        value = drawn if self.inner_lr is None else self.inner_lr
        shapes = shapes_for_any_ways(self.model, theta, self.names)
        return theta | {rate_of(name): torch.full(shape, value) for name, shape in shapes.items()}

    def begin(self, theta: Theta, support: Any) -> Theta:
        return begin_phi(self.model, self.score, theta, support)

    def step(self, theta: Theta, phi: Theta, support: Any, k: int) -> Theta:
        gradient = support_gradient(self.model, self.score, phi, support, self.names, self.first_order)
        return phi | {name: phi[name] - theta[rate_of(name)] * g for name, g in gradient.items()}

    def predict(self, theta: Theta, phi: Theta, x: Tensor) -> Tensor:
        return self.model(phi, x)
