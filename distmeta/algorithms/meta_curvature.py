"""Meta-Curvature: Park & Oliva 2019, arXiv 1902.03356."""

from __future__ import annotations

import math
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from distmeta.algorithms.adaptation import begin_phi, select_adapted, support_gradient
from distmeta.algorithms.learned_rates import choose_rate_shapes, find_parameter_shape, inner_lr_key
from distmeta.protocols import Model, Score, Theta, select_prefix


class MetaCurvature:
    """MAML whose inner gradients are transformed by learned matrices, one per mode of a parameter's tensor.

        φ_{k+1} = φ_k − α MC(∇L_support(φ_k)),   MC(G) = G ×_filter M_f ×_in M_i ×_out M_o
        MC(G)[o, i, f] = Σ_{a,b,c} M_o[o, a] M_i[i, b] M_f[f, c] G[a, b, c]

    G is [out, in, filter] for a convolution (its kernel is flattened) and [out, in] for a linear layer. A vector (bias
    or norm) has an elementwise `scale`, as in the authors' code and in learn2learn. All matrices are dense and learned:
    the paper's MC2. They start as identities and the scales as ones, which is MAML. Keys:
    `curvature.<parameter>.<out | in | filter | scale>`. The size of M_i is the square of the number of inputs.

    A head with free ways (`model.head` shared or prototype) has no matrix over the classes: only M_i, and one scale.

    Args:
        inner_lr: α > 0. The default is the authors' for Omniglot.
        inner_steps: K ≥ 1.
        learn_inner_lr: learn one rate per parameter tensor (keys `inner_lr.<parameter>`, [1]), starting at α.
        first_order: treat ∇L_support as a constant.
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
        self.model = model
        self.score = score
        self.inner_lr = inner_lr
        self.inner_steps = inner_steps
        self.learn_inner_lr = learn_inner_lr
        self.first_order = first_order
        self.names = select_adapted(model, "all")

    def init(self, generator: torch.Generator) -> Theta:
        theta = self.model.init(generator)
        curvature: Theta = {}
        for name, shape in choose_rate_shapes(self.model, theta, self.names).items():
            has_free_ways = shape != find_parameter_shape(self.model, name)
            identity = build_identity(shape, has_free_ways)
            curvature |= {f"{curvature_prefix(name)}{mode}": value for mode, value in identity.items()}
        theta = theta | curvature
        if self.learn_inner_lr:
            theta |= {inner_lr_key(name): torch.full((1,), self.inner_lr) for name in self.names}
        return theta

    def begin(self, theta: Theta, support: Any) -> Theta:
        return begin_phi(self.model, self.score, theta, support)

    def step(self, theta: Theta, phi: Theta, support: Any, k: int) -> Theta:
        gradient = support_gradient(self.model, self.score, phi, support, self.names, self.first_order)
        moved: Theta = {}
        for name, g in gradient.items():
            rate = theta.get(inner_lr_key(name), self.inner_lr)
            moved[name] = phi[name] - rate * transform(g, select_modes(theta, name))
        return phi | moved

    def predict(self, theta: Theta, phi: Theta, x: Tensor) -> Tensor:
        return self.model(phi, x)


def transform(gradient: Tensor, modes: Theta) -> Tensor:
    """Return MC(G), in the shape of G. `modes` holds `out`, `in` and `filter`, or only `scale`."""
    if "scale" in modes:
        return modes["scale"] * gradient
    if "out" in modes:
        gradient = torch.tensordot(modes["out"], gradient, 1)
    if "in" in modes:
        gradient = torch.einsum("ib,ob...->oi...", modes["in"], gradient)
    if "filter" in modes:
        gradient = (gradient.flatten(2) @ modes["filter"].T).reshape(gradient.shape)
    return gradient


def build_identity(shape: tuple[int, ...], has_free_ways: bool) -> Theta:
    """Return the modes that leave a gradient of this shape unchanged."""
    if len(shape) < 2:
        return {"scale": torch.ones(shape)}
    modes: Theta = {}
    if not has_free_ways:
        modes["out"] = torch.eye(shape[0])
    modes["in"] = torch.eye(shape[1])
    if len(shape) > 2:
        modes["filter"] = torch.eye(math.prod(shape[2:]))
    return modes


def curvature_prefix(name: str) -> str:
    return f"curvature.{name.removeprefix('model.')}."


def select_modes(theta: Theta, name: str) -> Theta:
    """Return the modes of a parameter by name: `out`, `in`, `filter`, `scale`."""
    prefix = curvature_prefix(name)
    return {key.removeprefix(prefix): value for key, value in select_prefix(theta, prefix).items()}
