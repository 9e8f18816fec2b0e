"""Matching networks: Vinyals, Blundell, Lillicrap, Kavukcuoglu & Wierstra 2016, arXiv 1606.04080.

Shapes: S support rows, Q query rows, F features, W ways, D targets of a regression.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from distmeta.algorithms.class_features import cosines, feature_size, features_of_both, only, without_absent
from distmeta.algorithms.protonet import initial_scale, scale_in
from distmeta.protocols import PADDING, Batch, Model, Score, Theta, one_hot, select_prefix, ways_of


class MatchingNet:
    """The label of a query is an attention-weighted mean of the support's labels, in embeddings that are learned.

        a(x̂, x_i) = softmax_i( s · cos(f(x̂), g(x_i)) ),   ŷ = Σ_i a(x̂, x_i) y_i               (§2.1, equation 1)

    For classes y_i is one-hot and the outputs are log ŷ, log-probabilities; for a regression ŷ itself, the kernel
    regressor of Nadaraya and Watson (the paper classifies only). No inner loop. Any number of ways and of rows.

    Args:
        scale: s, the inverse temperature. The paper has none: 1, with which no row has e² times another's weight.
        learn_scale: s is in theta, as `metric.log_scale`, and `scale` is where it starts; else it is fixed.
        full_context: the embeddings see the whole support set (§2.1.1): g is a bidirectional LSTM over it with a skip
            connection (appendix A.2), f an LSTM that reads it by attention, with skip connections (A.1). g depends on
            the **order** of the support rows: train with `tasks.order: random`, or it learns the classes' order.
        processing_steps: reads that f makes, the K of A.1, where the paper gives none; 5 was enough in "Order
            matters", arXiv 1511.06391, which the same scheme is from.
        features: length of the model's features; null: what enters its linear head. Full context alone asks for it.

    Raises:
        InputError: full context for a model without a linear head, `features` not given.
    """

    group_size = 1
    inner_steps = 0

    def __init__(
        self,
        model: Model,
        score: Score,
        scale: Annotated[float, Field(gt=0)] = 1.0,
        learn_scale: bool = False,
        full_context: bool = False,
        processing_steps: Annotated[int, Field(ge=1)] = 5,
        features: Annotated[int, Field(ge=1)] | None = None,
    ):
        self.model, self.score = model, score
        self.scale, self.learn_scale = scale, learn_scale
        self.full_context, self.processing_steps = full_context, processing_steps
        self.features = feature_size(model, features) if full_context else None

    def init(self, generator: torch.Generator) -> Theta:
        theta = self.model.init_body() | initial_scale(self.scale, self.learn_scale)
        if self.features is None:
            return theta
        size, bound = self.features, self.features**-0.5  # as torch.nn.LSTM starts

        def uniform(*shape: int) -> Tensor:
            return (2 * torch.rand(shape, generator=generator) - 1) * bound

        for name, inputs in (("forward", 2), ("backward", 2), ("attention", 3)):
            theta[f"context.{name}.weight"] = uniform(inputs * size, 4 * size)
            theta[f"context.{name}.bias"] = uniform(4 * size)
        return theta

    def begin(self, theta: Theta, support: Batch) -> Batch:
        return support

    def step(self, theta: Theta, state: Batch, support: Batch, k: int) -> Batch:
        return state

    def predict(self, theta: Theta, state: Batch, x: Tensor) -> Tensor:
        ways = ways_of(self.score)
        features_SF, features_QF = features_of_both(self.model, theta, state, x)
        real_S = torch.ones_like(features_SF[:, 0], dtype=torch.bool) if ways is None else state.y != PADDING
        if self.full_context:
            features_SF = context_of_support(theta, features_SF, real_S)
            features_QF = context_of_query(theta, features_QF, features_SF, real_S, self.processing_steps)
        scores_QS = scale_in(theta, self.scale) * cosines(features_QF, features_SF)
        log_a_QS = only(real_S, scores_QS).log_softmax(-1)
        if ways is None:
            return log_a_QS.exp() @ state.y
        classes_WS = one_hot(state.y, ways, features_SF.dtype).T
        log_p_QW = only(classes_WS > 0, log_a_QS[:, None, :]).logsumexp(-1)
        return without_absent(log_p_QW, classes_WS.sum(1))


def context_of_support(theta: Theta, features_SF: Tensor, real_S: Tensor) -> Tensor:
    """g(x_i, S) = →h_i + ←h_i + g'(x_i), by an LSTM in either direction; padding leaves their states alone (A.2)."""

    def outputs(name: str, order: range) -> list[Tensor]:
        h = c = torch.zeros_like(features_SF[0])
        rows = []
        for s in order:
            new_h, new_c = _lstm(theta, name, features_SF[s], h, c)
            h, c = torch.where(real_S[s], new_h, h), torch.where(real_S[s], new_c, c)
            rows.append(h)
        return rows

    count = len(features_SF)
    forward, backward = outputs("forward", range(count)), outputs("backward", range(count - 1, -1, -1))
    return torch.stack(forward) + torch.stack(backward[::-1]) + features_SF


def context_of_query(
    theta: Theta, features_QF: Tensor, context_SF: Tensor, real_S: Tensor, steps: int
) -> Tensor:
    """f(x̂, S) = h_K of attLSTM (A.1, equations 3 to 6), [Q, F].

    r_{k−1} = Σ_i softmax_i(h_{k−1}·g(x_i)) g(x_i),   ĥ_k, c_k = LSTM(f'(x̂), [h_{k−1}, r_{k−1}], c_{k−1}),
    h_k = ĥ_k + f'(x̂),   h_0 = c_0 = 0
    """
    h_QF = c_QF = torch.zeros_like(features_QF)
    for _ in range(steps):
        attention_QS = only(real_S, h_QF @ context_SF.T).softmax(-1)
        state = torch.cat([h_QF, attention_QS @ context_SF], -1)
        new_QF, c_QF = _lstm(theta, "attention", features_QF, state, c_QF)
        h_QF = new_QF + features_QF
    return h_QF


def _lstm(theta: Theta, name: str, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """One step of an LSTM: (output, cell)."""
    own = select_prefix(theta, f"context.{name}.")
    gates = torch.cat([x, h], -1) @ own[f"context.{name}.weight"] + own[f"context.{name}.bias"]
    write, keep, value, show = gates.chunk(4, -1)
    c = keep.sigmoid() * c + write.sigmoid() * value.tanh()
    return show.sigmoid() * c.tanh(), c
