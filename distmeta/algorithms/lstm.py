"""The LSTM meta-learner: Ravi & Larochelle 2017, "Optimization as a model for few-shot learning", ICLR.

Shapes: P numbers in phi, H hidden units.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from distmeta.algorithms.adaptation import begin_phi, check_inner_batch, select_minibatch
from distmeta.compute.inner_gradient import inner_gradient
from distmeta.protocols import Model, Score, Theta

PREPROCESSING_P = 10
"""p of `preprocess`."""


class LSTMState(NamedTuple):
    """The state of both layers for every coordinate of phi. Everything except phi starts at zero in every task."""

    phi: Theta
    """The cell state c of the second layer."""
    hidden: Tensor
    """h, the output of the first layer, [P, H]."""
    cell: Tensor
    """The cell state of the first layer, [P, H]."""
    forget: Tensor
    """f, the last forget gate of the second layer, [P, 1]."""
    input: Tensor
    """i, its last input gate, [P, 1]."""


class LSTMMetaLearner:
    """Train an LSTM as the inner optimizer: a learner's parameters are its cell state, and theta holds its gates.

        h_t = LSTM(x_t, h_{t−1}),   x_t = preprocessed (L_t, ∇_t),   ∇_t = ∇L_t(c_{t−1})                     (§3.2)
        f_t = σ(W_F [h_t, c_{t−1}, f_{t−1}] + b_F),   i_t = σ(W_I [h_t, c_{t−1}, i_{t−1}] + b_I)
        c_t = f_t c_{t−1} − i_t ∇_t,   φ_0 = c_0 = θ's `model.*`,   meta-gradient = ∇_θ L_query(c_K)    (Algorithm 1)

    L_t is the loss of step t's support rows, one number for all coordinates. All coordinates share the gates' weights,
    and each has its own state: [P, H] per layer. At the start this is gradient descent with a slight decay, with f
    between 0.982 and 0.993 and i between 0.007 and 0.018.

    Deviations: f_{t−1} and i_{t−1} are the gates, as in the paper's text; the authors' code feeds back their logits,
    and divides ∇_t once more by the number of rows. Batch norms use the statistics of the batch in evaluation too
    (§3.5: running ones).

    Args:
        hidden: H ≥ 1; 20 in the authors' code.
        inner_steps: K ≥ 1; in the paper (§5.1) 12 for 1 shot, 5 for 5 shots.
        inner_batch: support examples per inner step (Algorithm 1's batch); null, or more than there are: all.
        first_order: as in the paper (§3.3), treat L_t and ∇_t as constants, so the meta-gradient goes only through the
            cells and gates. `false` differentiates them as well. That is exact, needs second derivatives, and goes
            through log |∇_t|.
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
        check_inner_batch(score, inner_batch)
        self.model = model
        self.score = score
        self.hidden = hidden
        self.inner_steps = inner_steps
        self.inner_batch = inner_batch
        self.first_order = first_order

    def init(self, generator: torch.Generator) -> Theta:
        """Return the model's parameters and the gates. Ranges are those of the authors' code, gate biases of §3.2."""

        def uniform(low: float, high: float, *shape: int) -> Tensor:
            return low + (high - low) * torch.rand(shape, generator=generator)

        H = self.hidden
        return self.model.init(generator) | {
            "lstm.weight": uniform(-0.01, 0.01, 4 + H, 4 * H),
            "lstm.bias": uniform(-0.01, 0.01, 4 * H),
            "lstm.forget.weight": uniform(-0.01, 0.01, H + 2, 1),
            "lstm.forget.bias": uniform(4, 5, 1),
            "lstm.input.weight": uniform(-0.01, 0.01, H + 2, 1),
            "lstm.input.bias": uniform(-5, -4, 1),
        }

    def begin(self, theta: Theta, support: Any) -> LSTMState:
        phi = begin_phi(self.model, self.score, theta, support)
        c_P = flatten(phi)
        zeros_PH = c_P.new_zeros(len(c_P), self.hidden)
        zeros_P1 = c_P.new_zeros(len(c_P), 1)
        return LSTMState(phi, zeros_PH, zeros_PH, zeros_P1, zeros_P1)

    def step(self, theta: Theta, state: LSTMState, support: Any, k: int) -> LSTMState:
        batch = select_minibatch(support, k, self.inner_batch, self.score)
        phi = state.phi
        if self.first_order:
            phi = {name: value.detach() for name, value in phi.items()}

        def support_loss(p: Theta) -> tuple[Tensor, Tensor]:
            loss = self.score(self.model(p, batch.x), batch)[0]
            return loss, loss

        gradient, loss = inner_gradient(support_loss, phi, has_aux=True, first_order=self.first_order)
        if self.first_order:
            loss = loss.detach()
        return update(theta, state, gradient, loss)

    def predict(self, theta: Theta, state: LSTMState, x: Tensor) -> Tensor:
        return self.model(state.phi, x)


def update(theta: Theta, state: LSTMState, gradient: Theta, loss: Tensor) -> LSTMState:
    """Return the state of both layers after one step.

    Args:
        gradient: ∇_t, with the keys and shapes of phi.
        loss: L_t, a scalar.
    """
    c_P1 = flatten(state.phi)[:, None]
    gradient_P1 = flatten(gradient)[:, None]
    x_P4 = torch.cat([preprocess(loss).expand(len(c_P1), 2), preprocess(gradient_P1[:, 0])], 1)
    gates = torch.cat([x_P4, state.hidden], 1) @ theta["lstm.weight"] + theta["lstm.bias"]
    input_PH, forget_PH, output_PH, candidate_PH = gates.chunk(4, 1)
    cell_PH = forget_PH.sigmoid() * state.cell + input_PH.sigmoid() * candidate_PH.tanh()
    hidden_PH = output_PH.sigmoid() * cell_PH.tanh()

    def gate(name: str, previous_P1: Tensor) -> Tensor:
        inputs = torch.cat([hidden_PH, c_P1, previous_P1], 1)
        return (inputs @ theta[f"lstm.{name}.weight"] + theta[f"lstm.{name}.bias"]).sigmoid()

    forget_P1 = gate("forget", state.forget)
    input_P1 = gate("input", state.input)
    next_c_P1 = forget_P1 * c_P1 - input_P1 * gradient_P1
    return LSTMState(unflatten(next_c_P1[:, 0], state.phi), hidden_PH, cell_PH, forget_P1, input_P1)


def preprocess(x: Tensor) -> Tensor:
    """Return the magnitude and sign of numbers of any size, [...] -> [..., 2].

        (log|x| / p, sign x) if |x| ≥ e^−p,   else (−1, e^p x);   p = 10

    Reference: Andrychowicz et al. 2016, arXiv 1606.04474, appendix A.
    """
    is_large = x.abs() >= math.exp(-PREPROCESSING_P)
    # For small x the logarithm is not used. It is taken at 1 instead, so that its derivative is finite.
    log = torch.where(is_large, x.abs(), 1.0).log() / PREPROCESSING_P
    magnitude = torch.where(is_large, log, -1.0)
    sign = torch.where(is_large, x.sign(), math.exp(PREPROCESSING_P) * x)
    return torch.stack([magnitude, sign], -1)


def flatten(phi: Theta) -> Tensor:
    """Return all entries as one vector, [P]."""
    return torch.cat([value.flatten() for value in phi.values()])


def unflatten(c_P: Tensor, like: Theta) -> Theta:
    """Return a vector [P] with the names and shapes of `like`."""
    parts = c_P.split([value.numel() for value in like.values()])
    return {name: part.view(like[name].shape) for name, part in zip(like, parts, strict=True)}
