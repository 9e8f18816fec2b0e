"""A learned optimizer that is an LSTM: Ravi & Larochelle 2017, "Optimization as a model for few-shot learning", ICLR.

Shapes: P numbers in phi, H hidden units.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from distmeta.algorithms.adaptation import begin_phi, check_batches, minibatch
from distmeta.protocols import Model, Score, Theta

P = 10
"""Of `preprocess`."""


class Optimising(NamedTuple):
    """The cell state, which is phi, and what both layers remember; all but phi starts at zero in every task."""

    phi: Theta
    hidden: Tensor
    """h, [P, H]."""
    cell: Tensor
    """The first layer's own cell state, [P, H]."""
    forget: Tensor
    """f, [P, 1]."""
    input: Tensor
    """i, [P, 1]."""


class LSTMLearner:
    """The parameters of a task's learner are the cell state of an LSTM, which theta's gates update.

        h_t = LSTM(x_t, h_{t−1}),   x_t = preprocessed (L_t, ∇_t),   ∇_t = ∇L_t(c_{t−1})                     (§3.2)
        f_t = σ(W_F [h_t, c_{t−1}, f_{t−1}] + b_F),   i_t = σ(W_I [h_t, c_{t−1}, i_{t−1}] + b_I)
        c_t = f_t c_{t−1} − i_t ∇_t,   φ_0 = c_0 = θ's `model.*`,   meta-gradient = ∇_θ L_query(c_K)    (Algorithm 1)

    L_t is the loss of step t's support rows, one number for all coordinates. The gates' weights are shared by all
    coordinates, each of which has a state of its own: [P, H] a layer.

    The meta-gradient is the paper's (§3.3): L_t and ∇_t are constants; it goes through the cells and both gates alone.
    `first_order: false` differentiates them as well, which is exact, costs second derivatives, and goes through
    log |∇_t|. It starts as gradient descent with a slight decay: f between 0.982 and 0.993, i between 0.007 and 0.018.

    Deviations: f_{t−1} and i_{t−1} are the gates, as the paper writes; the authors' code feeds their logits back, and
    divides ∇_t once more by the number of rows. A batch norm uses the statistics of the batch at hand in evaluation
    too (§3.5: running ones).

    Args:
        hidden: H; 20 in the authors' code.
        inner_steps: K; the paper's for 1 shot (§5.1), 5 for 5 shots.
        inner_batch: support examples that a step sees (Algorithm 1's batch); null, or where there are no more: all.
        first_order: see above.
    """

    group_size = 1

    def __init__(
        self,
        model: Model,
        score: Score,
        hidden: Annotated[int, Field(ge=1)] = 20,
        inner_steps: Annotated[int, Field(ge=1)] = 12,
        inner_batch: Annotated[int, Field(ge=1)] | None = None,
        first_order: bool = True,
    ):
        check_batches(score, inner_batch)
        self.model, self.score = model, score
        self.hidden, self.inner_steps, self.inner_batch = hidden, inner_steps, inner_batch
        self.first_order = first_order

    def init(self, generator: torch.Generator) -> Theta:
        def uniform(low: float, high: float, *shape: int) -> Tensor:
            return low + (high - low) * torch.rand(shape, generator=generator)

        H = self.hidden
        return self.model.init(generator) | {  # the authors' code; the biases after §3.2
            "lstm.weight": uniform(-0.01, 0.01, 4 + H, 4 * H),
            "lstm.bias": uniform(-0.01, 0.01, 4 * H),
            "lstm.forget.weight": uniform(-0.01, 0.01, H + 2, 1),
            "lstm.forget.bias": uniform(4, 5, 1),
            "lstm.input.weight": uniform(-0.01, 0.01, H + 2, 1),
            "lstm.input.bias": uniform(-5, -4, 1),
        }

    def begin(self, theta: Theta, support: Any) -> Optimising:
        phi = begin_phi(self.model, self.score, theta, support)
        c_P = flatten(phi)
        units_PH, gate_P1 = c_P.new_zeros(len(c_P), self.hidden), c_P.new_zeros(len(c_P), 1)
        return Optimising(phi, units_PH, units_PH, gate_P1, gate_P1)

    def step(self, theta: Theta, state: Optimising, support: Any, k: int) -> Optimising:
        rows = minibatch(support, k, self.inner_batch)
        phi = state.phi
        if self.first_order:
            phi = {name: value.detach() for name, value in phi.items()}
        gradient, loss = torch.func.grad_and_value(lambda p: self.score(self.model(p, rows.x), rows)[0])(phi)
        if self.first_order:
            gradient, loss = {name: g.detach() for name, g in gradient.items()}, loss.detach()
        return update(theta, state, gradient, loss)

    def predict(self, theta: Theta, state: Optimising, x: Tensor) -> Tensor:
        return self.model(state.phi, x)


def update(theta: Theta, state: Optimising, gradient: Theta, loss: Tensor) -> Optimising:
    """One step of both layers, given the gradient (of phi's keys and shapes) and the loss (a scalar)."""
    c_P1 = flatten(state.phi)[:, None]
    gradient_P1 = flatten(gradient)[:, None]
    seen_P4 = torch.cat([preprocess(loss).expand(len(c_P1), 2), preprocess(gradient_P1[:, 0])], 1)
    sums = torch.cat([seen_P4, state.hidden], 1) @ theta["lstm.weight"] + theta["lstm.bias"]
    write, keep, show, content = sums.chunk(4, 1)
    cell_PH = keep.sigmoid() * state.cell + write.sigmoid() * content.tanh()
    hidden_PH = show.sigmoid() * cell_PH.tanh()

    def gate(name: str, before_P1: Tensor) -> Tensor:
        inputs = torch.cat([hidden_PH, c_P1, before_P1], 1)
        return (inputs @ theta[f"lstm.{name}.weight"] + theta[f"lstm.{name}.bias"]).sigmoid()

    forget_P1, input_P1 = gate("forget", state.forget), gate("input", state.input)
    c_P1 = forget_P1 * c_P1 - input_P1 * gradient_P1
    return Optimising(unflatten(c_P1[:, 0], state.phi), hidden_PH, cell_PH, forget_P1, input_P1)


def preprocess(x: Tensor) -> Tensor:
    """Size and sign of numbers of any magnitude, [...] -> [..., 2].

        (log|x| / p, sign x) where |x| ≥ e^−p,   (−1, e^p x) elsewhere;   p = 10

    Reference: Andrychowicz et al. 2016, arXiv 1606.04474, appendix A.
    """
    large = x.abs() >= math.exp(-P)
    log = torch.where(large, x.abs(), 1.0).log() / P  # no infinite derivative in the branch not taken
    return torch.stack([torch.where(large, log, -1.0), torch.where(large, x.sign(), math.exp(P) * x)], -1)


def flatten(phi: Theta) -> Tensor:
    return torch.cat([value.flatten() for value in phi.values()])


def unflatten(c_P: Tensor, like: Theta) -> Theta:
    parts = c_P.split([value.numel() for value in like.values()])
    return {name: part.view(like[name].shape) for name, part in zip(like, parts, strict=True)}
