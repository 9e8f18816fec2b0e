"""CAVIA: Zintgraf, Shiarlis, Kurin, Hofmann & Whiteson 2019, arXiv 1810.03642."""

from __future__ import annotations

import math
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from distmeta.algorithms.adaptation import NORM_LAYERS, begin_phi
from distmeta.compute.inner_gradient import inner_gradient
from distmeta.errors import InputError, did_you_mean
from distmeta.protocols import Model, Score, Theta

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class ContextState(NamedTuple):
    phi: Theta
    """The network, which the inner loop does not change."""
    context: Tensor
    """c [n], the adapted context parameters."""


class CAVIA:
    """Adapt a few context parameters, which are additional inputs of one layer, and share the network among tasks.

        c_0 = 0,   c_{k+1} = c_k − α ∇_c L_support(c_k, θ),   meta-gradient = ∇_θ L_query(c_K, θ)                (§3)

    A learned matrix V (key `context.weight`) carries the n context parameters c into a layer with output h:

        linear layer:           h + V c,  V [out, n]: the paper's input [x; c], where V are the weights for c
        convolution or norm:    (1 + V_γ c) ∘ h + V_β c,  V [2·out, n]: the paper's FiLM on feature maps

    Both change only the layer's weight and bias, so any model can be used. By default the layer is the norm after the
    third convolution (the paper's choice), or without convolutions the first linear layer.

    Deviations: the FiLM layer has no bias, because the norm's weight and bias do the same. FiLM comes before the
    block's ReLU, as in the authors' code, but also before its pooling. The gradient is not clipped per task.

    Args:
        inner_lr: α > 0. The defaults of α, K and n are the paper's for classification. Its sine waves have K = 1 and
            n = 5.
        inner_steps: K ≥ 1.
        context: n ≥ 1, the number of context parameters.
        layer: name of another layer: a linear layer, a convolution or a norm, with a bias.
        first_order: treat ∇_c L_support as a constant.

    Raises:
        InputError: there is no such layer; or `model.head: shared`, which needs an inner loop that adapts the head.
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
        if model.head_init == "shared":
            raise InputError(
                "model.head: got shared for cavia, expected linear or prototype: cavia does not adapt the head, and "
                "without adaptation the rows of a shared head stay equal for all classes"
            )
        self.model = model
        self.score = score
        self.inner_lr = inner_lr
        self.inner_steps = inner_steps
        self.context = context
        self.first_order = first_order
        parameters = model.init(torch.Generator())
        if layer is None:
            layer = choose_layer(model, parameters)
        else:
            check_layer(model, parameters, layer)
        self.weight, self.bias = build_layer_keys(layer)
        self.uses_film = not isinstance(model.module.get_submodule(layer), nn.Linear)

    def init(self, generator: torch.Generator) -> Theta:
        """Return the model's parameters and V, which is drawn as in the authors' code.

        V starts like columns of the linear layer, or like a FiLM layer (Kaiming).
        """
        theta = self.model.init(generator)
        out, *inputs = theta[self.weight].shape
        if self.uses_film:
            out = 2 * out
            bound = math.sqrt(3 / self.context)
        else:
            bound = 1 / math.sqrt(inputs[0] + self.context)
        start = torch.empty(out, self.context).uniform_(-bound, bound, generator=generator)
        return theta | {"context.weight": start}

    def begin(self, theta: Theta, support: Any) -> ContextState:
        phi = begin_phi(self.model, self.score, theta, support)
        return ContextState(phi, theta["context.weight"].new_zeros(self.context))

    def step(self, theta: Theta, state: ContextState, support: Any, k: int) -> ContextState:
        def support_loss(context: Tensor) -> Tensor:
            outputs = self.predict(theta, ContextState(state.phi, context), support.x)
            return self.score(outputs, support)[0]

        gradient = inner_gradient(support_loss, state.context, first_order=self.first_order)
        return ContextState(state.phi, state.context - self.inner_lr * gradient)

    def predict(self, theta: Theta, state: ContextState, x: Tensor) -> Tensor:
        phi = state.phi
        weight = phi[self.weight]
        bias = phi[self.bias]
        from_context = theta["context.weight"] @ state.context
        if not self.uses_film:
            return self.model(phi | {self.bias: bias + from_context}, x)
        scale, shift = from_context.chunk(2)
        rows = (1 + scale).reshape(-1, *[1] * (weight.dim() - 1))
        return self.model(phi | {self.weight: rows * weight, self.bias: (1 + scale) * bias + shift}, x)


def choose_layer(model: Model, parameters: Theta) -> str:
    """Return the norm after the third convolution (or the last, if there are fewer), else that convolution.

    If there are no convolutions, or none of these has a trainable weight and bias, return the first linear layer.
    """
    modules = list(model.module.named_modules())
    convolutions = [i for i, (_, module) in enumerate(modules) if isinstance(module, CONVOLUTIONS)]
    candidates = []
    if convolutions:
        chosen = min(2, len(convolutions) - 1)
        start = convolutions[chosen]
        end = [*convolutions, len(modules)][chosen + 1]
        candidates = [name for name, module in modules[start + 1 : end] if isinstance(module, NORM_LAYERS)]
        candidates.append(modules[start][0])
    candidates += [name for name, module in modules if isinstance(module, nn.Linear)]
    usable = [name for name in candidates if can_take_context(parameters, name)]
    if not usable:
        raise InputError(
            "algorithm.layer: got null, and the model has no trainable convolution, norm or linear layer with a bias "
            "that context parameters could enter, expected such a model, or algorithm.type=maml"
        )
    return usable[0]


def check_layer(model: Model, parameters: Theta, layer: str) -> None:
    """Refuse a layer that context parameters cannot enter."""
    kinds = (nn.Linear, *CONVOLUTIONS, *NORM_LAYERS)
    named = [name for name, module in model.module.named_modules() if isinstance(module, kinds)]
    usable = [name for name in named if can_take_context(parameters, name)]
    if layer not in usable:
        raise InputError(
            f"algorithm.layer: got {layer!r}, expected a trainable linear layer, convolution or norm with a bias; "
            f"{did_you_mean(layer, usable)}"
        )


def can_take_context(parameters: Theta, name: str) -> bool:
    """Return whether the layer has a trainable bias and a trainable weight whose first axis is the output."""
    weight, bias = build_layer_keys(name)
    if weight not in parameters or bias not in parameters:
        return False
    return parameters[bias].shape == parameters[weight].shape[:1]


def build_layer_keys(name: str) -> tuple[str, str]:
    """Return the keys of a layer's weight and bias. The name of the model itself is empty."""
    prefix = f"model.{name}." if name else "model."
    return prefix + "weight", prefix + "bias"
