"""CAVIA: Zintgraf, Shiarlis, Kurin, Hofmann & Whiteson 2019, arXiv 1810.03642."""

from __future__ import annotations

import math
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from distmeta.algorithms.adaptation import NORMS, begin_phi
from distmeta.errors import InputError, did_you_mean
from distmeta.protocols import Model, Score, Theta

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
THIRD = 2


class InContext(NamedTuple):
    phi: Theta
    """The network: the same from the first step to the last."""
    context: Tensor
    """c [n]: what is adapted."""


class CAVIA:
    """A few context parameters, further inputs of one layer, are adapted to a task; the network is shared.

        c_0 = 0,   c_{k+1} = c_k − α ∇_c L_support(c_k, θ),   meta-gradient = ∇_θ L_query(c_K, θ)                (§3)

    How the n = `context` parameters c enter a layer with output h, by a learned V (key `context.weight`):

        a linear layer:            h + V c,  V [out, n]: the paper's input [x; c], V the weight's columns for c
        a convolution or a norm:   (1 + V_γ c) ∘ h + V_β c,  V [2·out, n]: the paper's FiLM on feature maps

    Both are made by changing the layer's own weight and bias, so that any model can be used. By default it is the
    third convolution's output as the norm after it gives it (the paper's choice), where there are convolutions; else
    the first linear layer.

    Deviations: a FiLM layer has no bias of its own, the norm's weight and bias being just that; FiLM comes before
    the block's ReLU, as in the authors' code, but also before its pooling; the gradient is not clipped per task.

    Args:
        inner_lr: α. The default of this, of `inner_steps` and of `context` are the paper's for classification; its sine
            waves have 1 step and 5 context parameters.
        inner_steps: K.
        context: n, how many context parameters a task has.
        layer: name of the layer instead (a linear one, a convolution or a norm, with a bias).
        first_order: takes ∇L_support as a constant.

    Raises:
        InputError: no such layer; or `model.head: shared`, whose classes would stay alike as the head is not adapted.
    """

    group_size = 1

    def __init__(
        self,
        model: Model,
        score: Score,
        inner_lr: Annotated[float, Field(gt=0)] = 1.0,
        inner_steps: Annotated[int, Field(ge=1)] = 2,
        context: Annotated[int, Field(ge=1)] = 100,
        layer: str | None = None,
        first_order: bool = False,
    ):
        self.model, self.score = model, score
        self.inner_lr, self.inner_steps, self.first_order = inner_lr, inner_steps, first_order
        self.context = context
        own = model.init(torch.Generator())
        if model.head_init == "shared":
            raise InputError(
                "model.head: got shared for cavia, which does not adapt the head, so that all classes would stay "
                "alike: expected linear or prototype"
            )
        name = _choose(model, own) if layer is None else _named(model, own, layer)
        self.weight, self.bias = _keys(name)
        self.film = not isinstance(model.module.get_submodule(name), nn.Linear)

    def init(self, generator: torch.Generator) -> Theta:
        """V starts as the authors' code draws it: as columns of the linear layer, or as a FiLM layer (Kaiming)."""
        theta = self.model.init(generator)
        out = theta[self.weight].shape[0] * (2 if self.film else 1)
        bound = math.sqrt(3 / self.context)
        if not self.film:
            bound = 1 / math.sqrt(theta[self.weight].shape[1] + self.context)
        start = torch.empty(out, self.context).uniform_(-bound, bound, generator=generator)
        return theta | {"context.weight": start}

    def begin(self, theta: Theta, support: Any) -> InContext:
        phi = begin_phi(self.model, self.score, theta, support)
        return InContext(phi, theta["context.weight"].new_zeros(self.context))

    def step(self, theta: Theta, state: InContext, support: Any, k: int) -> InContext:
        def loss_at(context: Tensor) -> Tensor:
            outputs = self.predict(theta, InContext(state.phi, context), support.x)
            return self.score(outputs, support)[0]

        gradient = torch.func.grad(loss_at)(state.context)
        if self.first_order:
            gradient = gradient.detach()
        return InContext(state.phi, state.context - self.inner_lr * gradient)

    def predict(self, theta: Theta, state: InContext, x: Tensor) -> Tensor:
        phi, entering = state.phi, theta["context.weight"] @ state.context
        if not self.film:
            return self.model(phi | {self.bias: phi[self.bias] + entering}, x)
        scale, shift = entering.chunk(2)
        weight = phi[self.weight]
        rows = (1 + scale).reshape(-1, *[1] * (weight.dim() - 1))
        modulated = {self.weight: rows * weight, self.bias: (1 + scale) * phi[self.bias] + shift}
        return self.model(phi | modulated, x)


def _choose(model: Model, own: Theta) -> str:
    """The norm after the third convolution (the last where there are fewer), else that itself, else a linear layer."""
    modules = list(model.module.named_modules())
    convolutions = [i for i, (_, module) in enumerate(modules) if isinstance(module, CONVOLUTIONS)]
    candidates = []
    if convolutions:
        at = min(THIRD, len(convolutions) - 1)
        end = [*convolutions, len(modules)][at + 1]
        block = modules[convolutions[at] + 1 : end]
        candidates = [name for name, module in block if isinstance(module, NORMS)]
        candidates.append(modules[convolutions[at]][0])
    candidates += [name for name, module in modules if isinstance(module, nn.Linear)]
    usable = [name for name in candidates if _usable(own, name)]
    if not usable:
        raise InputError(
            "algorithm.layer: got null, and the model has no trainable convolution, norm or linear layer with a bias "
            "for a context to enter: expected such a model, or algorithm.type maml"
        )
    return usable[0]


def _named(model: Model, own: Theta, layer: str) -> str:
    kinds = (nn.Linear, *CONVOLUTIONS, *NORMS)
    fitting = [name for name, module in model.module.named_modules() if isinstance(module, kinds)]
    fitting = [name for name in fitting if _usable(own, name)]
    if layer not in fitting:
        raise InputError(
            f"algorithm.layer: got {layer!r}, expected a trainable linear layer, convolution or norm with a bias; "
            f"{did_you_mean(layer, fitting)}"
        )
    return layer


def _usable(own: Theta, name: str) -> bool:
    """It has a trainable weight, whose first axis is the output, and a bias."""
    weight, bias = _keys(name)
    return weight in own and bias in own and own[bias].shape == own[weight].shape[:1]


def _keys(name: str) -> tuple[str, str]:
    prefix = f"model.{name}." if name else "model."
    return prefix + "weight", prefix + "bias"
