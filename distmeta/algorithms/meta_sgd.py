"""Meta-SGD: Li, Zhou, Chen & Li 2017, arXiv 1707.09835."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from distmeta.algorithms.adaptation import begin_phi, select_adapted, support_gradient
from distmeta.algorithms.learned_rates import choose_rate_shapes, inner_lr_key
from distmeta.protocols import Model, Score, Theta

SMALLEST_RATE = 0.005
LARGEST_RATE = 0.1


class MetaSGD:
    """MAML that also learns the rate and the direction of every parameter's step.

        φ_{k+1} = φ_k − α ∘ ∇L_support(φ_k),   φ_0 = θ,   meta-gradient = ∇_{θ,α} L_query(φ_K)      (Algorithm 1)

    α has the shape of the parameters (keys `inner_lr.<parameter>`) and any sign. All K steps share it. A head with free
    ways (`model.head` shared or prototype) has one row of rates, [1, F], for all classes.

    The paper updates θ and α with the same outer rate β. `outer.groups: {"inner_lr.*": {lr: …}}` gives α another one.

    Args:
        inner_lr: the initial value of every entry of α; null draws one value for all, uniform in [0.005, 0.1], as the
            paper does (§4).
        inner_steps: K ≥ 1; the paper has one.
        first_order: treat ∇L_support as a constant.
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
        self.model = model
        self.score = score
        self.inner_lr = inner_lr
        self.inner_steps = inner_steps
        self.first_order = first_order
        self.names = select_adapted(model, "all")

    def init(self, generator: torch.Generator) -> Theta:
        theta = self.model.init(generator)
        drawn = float(torch.empty(()).uniform_(SMALLEST_RATE, LARGEST_RATE, generator=generator))
        value = drawn if self.inner_lr is None else self.inner_lr
        shapes = choose_rate_shapes(self.model, theta, self.names)
        return theta | {inner_lr_key(name): torch.full(shape, value) for name, shape in shapes.items()}

    def begin(self, theta: Theta, support: Any) -> Theta:
        return begin_phi(self.model, self.score, theta, support)

    def step(self, theta: Theta, phi: Theta, support: Any, k: int) -> Theta:
        gradient = support_gradient(self.model, self.score, phi, support, self.names, self.first_order)
        return phi | {name: phi[name] - theta[inner_lr_key(name)] * g for name, g in gradient.items()}

    def predict(self, theta: Theta, phi: Theta, x: Tensor) -> Tensor:
        return self.model(phi, x)
