"""Meta-Curvature: Park & Oliva 2019, arXiv 1902.03356."""

from __future__ import annotations

import math
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
    whole_shape,
)
from distmeta.protocols import Model, Score, Theta, select_prefix


class MetaCurvature:
    """MAML whose inner gradients are transformed by learned matrices, one for each mode of a parameter's tensor.

        φ_{k+1} = φ_k − α MC(∇L_support(φ_k)),   MC(G) = G ×_filter M_f ×_in M_i ×_out M_o
        MC(G)[o, i, f] = Σ_{a,b,c} M_o[o, a] M_i[i, b] M_f[f, c] G[a, b, c]

    with G [out, in, filter] of a convolution, its kernel flattened. A linear layer has out and in, a vector (bias,
    norm) an elementwise `scale`, as in the authors' code and learn2learn. Matrices start as the identity, scales as
    ones: MAML. All are dense and learned: the paper's MC2. Keys `curvature.<parameter>.<out | in | filter | scale>`;
    an M_i is as large as the number of inputs squared.

    A head with free ways (`model.head` shared or prototype) has no matrix over the classes: M_i alone, and one scale.

    Args:
        inner_lr: α. The default is the authors' for Omniglot.
        inner_steps: K.
        learn_inner_lr: one learned rate [1] for each parameter tensor, keys `inner_lr.<parameter>`, starting at α.
        first_order: takes ∇L_support as a constant.
    """

    group_size = 1

    def __init__(
        self,
        model: Model,
        score: Score,
        inner_lr: Annotated[float, Field(gt=0)] = 0.4,
        inner_steps: Annotated[int, Field(ge=1)] = 1,
        learn_inner_lr: bool = False,
        first_order: bool = False,
    ):
        self.model, self.score = model, score
        self.inner_lr, self.inner_steps = inner_lr, inner_steps
        self.learn_inner_lr, self.first_order = learn_inner_lr, first_order
        self.names = adapted_names(model, "all")

    def init(self, generator: torch.Generator) -> Theta:
        theta = self.model.init(generator)
        curvature: Theta = {}
        for name, shape in shapes_for_any_ways(self.model, theta, self.names).items():
            free_ways = shape != whole_shape(self.model, name)
            start = _identity(shape, free_ways)
            curvature |= {f"{_prefix(name)}{mode}": value for mode, value in start.items()}
        rates = {rate_of(name): torch.full((1,), self.inner_lr) for name in self.names}
        return theta | curvature | (rates if self.learn_inner_lr else {})

    def begin(self, theta: Theta, support: Any) -> Theta:
        return begin_phi(self.model, self.score, theta, support)

    def step(self, theta: Theta, phi: Theta, support: Any, k: int) -> Theta:
        gradient = support_gradient(self.model, self.score, phi, support, self.names, self.first_order)
        update = {name: transform(g, _modes(theta, name)) for name, g in gradient.items()}
        return phi | {
            name: phi[name] - theta.get(rate_of(name), self.inner_lr) * u for name, u in update.items()
        }

    def predict(self, theta: Theta, phi: Theta, x: Tensor) -> Tensor:
        return self.model(phi, x)


def transform(gradient: Tensor, modes: Theta) -> Tensor:
    """MC(G): the mode products of `modes` (`out`, `in`, `filter`, or `scale` alone), in the shape of G."""
    if "scale" in modes:
        return modes["scale"] * gradient
    if "out" in modes:
        gradient = torch.tensordot(modes["out"], gradient, 1)
    if "in" in modes:
        gradient = torch.einsum("ib,ob...->oi...", modes["in"], gradient)
    if "filter" in modes:
        gradient = (gradient.flatten(2) @ modes["filter"].T).reshape(gradient.shape)
    return gradient


def _identity(shape: tuple[int, ...], free_ways: bool) -> Theta:
    """The transformation that changes nothing."""
    if len(shape) < 2:
        return {"scale": torch.ones(shape)}
    modes = {} if free_ways else {"out": torch.eye(shape[0])}
    modes["in"] = torch.eye(shape[1])
    return modes | ({"filter": torch.eye(math.prod(shape[2:]))} if len(shape) > 2 else {})


def _prefix(name: str) -> str:
    return f"curvature.{name.removeprefix('model.')}."


def _modes(theta: Theta, name: str) -> Theta:
    prefix = _prefix(name)
    return {key.removeprefix(prefix): value for key, value in select_prefix(theta, prefix).items()}
