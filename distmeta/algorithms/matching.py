"""Matching networks: Vinyals, Blundell, Lillicrap, Kavukcuoglu & Wierstra 2016, arXiv 1606.04080.

Shapes: S support rows, Q query rows, F features, W ways, D targets of a regression.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from distmeta.algorithms.class_features import (
    cosines,
    embed_together,
    find_feature_size,
    mask_absent_classes,
    mask_logits,
    require_rows,
)
from distmeta.algorithms.protonet import init_scale, read_scale
from distmeta.protocols import PADDING, Batch, Model, Score, Theta, find_ways, one_hot


class MatchingNet:
    """Predict an attention-weighted mean of the support labels, with attention in a learned embedding.

        a(x̂, x_i) = softmax_i( s · cos(f(x̂), g(x_i)) ),   ŷ = Σ_i a(x̂, x_i) y_i               (§2.1, equation 1)

    For classes, y_i is one-hot and the outputs are the log-probabilities log ŷ. For a regression the output is ŷ, the
    kernel regressor of Nadaraya and Watson (the paper has only classification). There is no inner loop. Any number of
    ways and rows works.

    Args:
        scale: the inverse temperature s > 0. The paper has none, which is 1; then no row has more than e² times the
            weight of another.
        learn_scale: learn s, starting at `scale` (key `metric.log_scale`).
        full_context: let the embeddings depend on the whole support set (§2.1.1): g is a bidirectional LSTM over it
            with a skip connection (appendix A.2), f an LSTM that reads it by attention, with skip connections (A.1). g
            depends on the **order** of the support rows. Train with `tasks.order: random`, or it learns the order of
            the classes.
        processing_steps: how often f reads the support set, the K ≥ 1 of A.1. The paper gives no number; 5 was enough
            for the same scheme in "Order matters", arXiv 1511.06391.
        features: number of the model's features; null: the inputs of its linear head. Only used with full context.

    Raises:
        InputError: full context, and the model has no linear head and `features` is not given.
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
        self.model = model
        self.score = score
        self.scale = scale
        self.learn_scale = learn_scale
        self.full_context = full_context
        self.processing_steps = processing_steps
        self.features = find_feature_size(model, features) if full_context else 0

    def init(self, generator: torch.Generator) -> Theta:
        theta = self.model.init_body() | init_scale(self.scale, self.learn_scale)
        if not self.full_context:
            return theta
        size = self.features
        bound = size**-0.5  # as torch.nn.LSTM starts

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
        ways = find_ways(self.score)
        features_SF, features_QF = embed_together(self.model, theta, state, x)
        real_S = torch.ones_like(features_SF[:, 0], dtype=torch.bool) if ways is None else state.y != PADDING
        if self.full_context:
            features_SF = embed_support(theta, features_SF, real_S)
            features_QF = embed_query(theta, features_QF, features_SF, real_S, self.processing_steps)
        scores_QS = read_scale(theta, self.scale) * cosines(features_QF, features_SF)
        log_attention_QS = mask_logits(scores_QS, real_S).log_softmax(-1)
        if ways is None:
            return log_attention_QS.exp() @ require_rows(state.y, "matching")
        classes_WS = one_hot(state.y, ways, features_SF.dtype).T
        log_p_QW = mask_logits(log_attention_QS[:, None, :], classes_WS > 0).logsumexp(-1)
        return mask_absent_classes(log_p_QW, classes_WS.sum(1))


def embed_support(theta: Theta, features_SF: Tensor, real_S: Tensor) -> Tensor:
    """Return g(x_i, S) = →h_i + ←h_i + g'(x_i), [S, F], from an LSTM in each direction (A.2).

    Rows of padding do not change the state of the LSTMs.
    """

    def run_lstm(name: str, order: Iterable[int]) -> list[Tensor]:
        h = torch.zeros_like(features_SF[0])
        c = h
        outputs = []
        for s in order:
            next_h, next_c = step_lstm(theta, name, features_SF[s], h, c)
            h = torch.where(real_S[s], next_h, h)
            c = torch.where(real_S[s], next_c, c)
            outputs.append(h)
        return outputs

    rows = range(len(features_SF))
    forward = run_lstm("forward", rows)
    backward = run_lstm("backward", reversed(rows))
    return torch.stack(forward) + torch.stack(backward[::-1]) + features_SF


def embed_query(theta: Theta, features_QF: Tensor, context_SF: Tensor, real_S: Tensor, steps: int) -> Tensor:
    """Return f(x̂, S) = h_K of attLSTM (A.1, equations 3 to 6), [Q, F].

    r_{k−1} = Σ_i softmax_i(h_{k−1}·g(x_i)) g(x_i),   ĥ_k, c_k = LSTM(f'(x̂), [h_{k−1}, r_{k−1}], c_{k−1}),
    h_k = ĥ_k + f'(x̂),   h_0 = c_0 = 0
    """
    h_QF = torch.zeros_like(features_QF)
    c_QF = h_QF
    for _ in range(steps):
        attention_QS = mask_logits(h_QF @ context_SF.T, real_S).softmax(-1)
        state = torch.cat([h_QF, attention_QS @ context_SF], -1)
        output_QF, c_QF = step_lstm(theta, "attention", features_QF, state, c_QF)
        h_QF = output_QF + features_QF
    return h_QF


def step_lstm(theta: Theta, name: str, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output and the cell state of an LSTM after one step."""
    gates = torch.cat([x, h], -1) @ theta[f"context.{name}.weight"] + theta[f"context.{name}.bias"]
    input_gate, forget_gate, candidate, output_gate = gates.chunk(4, -1)
    c = forget_gate.sigmoid() * c + input_gate.sigmoid() * candidate.tanh()
    return output_gate.sigmoid() * c.tanh(), c
