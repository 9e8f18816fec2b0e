"""A simple neural attentive meta-learner: Mishra, Rohaninejad, Chen & Abbeel 2018, arXiv 1707.03141.

Shapes: S support rows, Q query rows, C channels (more after every layer), K and V key and value size of an attention.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from distmeta.algorithms.class_features import check_ways, embed_together, find_head_shape, require_rows
from distmeta.protocols import PADDING, Batch, Model, Score, Theta, find_ways, one_hot
from distmeta.trees import tree_map

Size = Annotated[int, Field(ge=1)]
Attention = Annotated[list[Annotated[list[Size], Field(min_length=2, max_length=2)]], Field(min_length=1)]
OMNIGLOT_ATTENTION = [[64, 32], [256, 128], [512, 256]]


class SNAIL:
    """Read the support pairs and then a query with causal convolutions and attention, and predict the query's label.

        sequence = (e(x_1), y_1), …, (e(x_S), y_S), (e(x), 0);   output = the last row's
        TCBlock:   X ← [X, tanh(W_f * X) ⊙ σ(W_g * X)],   * causal, two taps 1, 2, 4, … rows apart             (§3)
        Attention: X ← [X, softmax(QKᵀ/√k, causal) V]

    The default is the paper's Omniglot network: Attention(64, 32), TCBlock(128), Attention(256, 128), TCBlock(128),
    Attention(512, 256), and a linear layer. Every query ends its own sequence. Support rows never see a query, so their
    activations are computed once for all queries: [S, C] and [Q, C] instead of [Q, S + 1, C].

    y is one-hot, with as many classes as the model's head has outputs; evaluation may have fewer classes, not more.
    Targets of a regression are used as they are. The order of the support rows matters: train with `tasks.order:
    random`. Rows of padding are not part of the sequence. e is the model's features after one more linear layer, as in
    the paper's embedding. A batch norm in the model sees support and queries as one batch.

    Deviation: the paper's pseudo-code has dilations 2, 4, 8, …, with which a block would see every other row. Here they
    are 1, 2, 4, …, so a block of L layers sees 2^L rows.

    Args:
        length: rows that a TC block sees, ≥ 2; it has ⌈log2 length⌉ layers. The paper has ways · shots + 1, the
            longest sequence. Longer sequences work; only attention sees further than `length` rows.
        filters: channels that each layer of a TC block adds, ≥ 1.
        attention: (key, value) sizes of the attention blocks. A TC block lies between each two of them.
        embedding: outputs of the linear layer on the features, ≥ 1.

    Raises:
        InputError: the model has no last linear layer.
    """

    group_size = 1
    inner_steps = 0

    def __init__(
        self,
        model: Model,
        score: Score,
        length: Annotated[int, Field(ge=2)] = 32,
        filters: Size = 128,
        attention: Attention = OMNIGLOT_ATTENTION,
        embedding: Size = 64,
    ):
        self.model = model
        self.score = score
        self.outputs, self.features = find_head_shape(model, "snail")
        self.layers = math.ceil(math.log2(length))
        self.filters = filters
        self.attention = attention
        self.embedding = embedding

    def init(self, generator: torch.Generator) -> Theta:
        theta = self.model.init_body()

        def add_linear(name: str, fan_in: int, fan_out: int) -> None:
            bound = fan_in**-0.5  # as torch.nn.Linear starts
            theta[f"{name}.weight"] = bound * (2 * torch.rand(fan_in, fan_out, generator=generator) - 1)
            theta[f"{name}.bias"] = bound * (2 * torch.rand(fan_out, generator=generator) - 1)

        add_linear("snail.embedding", self.features, self.embedding)
        channels = self.embedding + self.outputs
        for i, (key, value) in enumerate(self.attention):
            if i > 0:
                for layer in range(self.layers):
                    add_linear(f"snail.tc.{i}.{layer}", 2 * channels, 2 * self.filters)
                    channels += self.filters
            for part, size in (("query", key), ("key", key), ("value", value)):
                add_linear(f"snail.attention.{i}.{part}", channels, size)
            channels += value
        add_linear("snail.out", channels, self.outputs)
        return theta

    def begin(self, theta: Theta, support: Batch) -> Batch:
        """Return the support set with rows of padding first. There they act like the zeros before a sequence."""
        if find_ways(self.score) is None:
            return support
        check_ways(self.score, self.outputs, "snail")
        order = torch.argsort((support.y != PADDING).int(), stable=True)
        return Batch(tree_map(lambda leaf: leaf[order], support.x), support.y[order])

    def step(self, theta: Theta, state: Batch, support: Batch, k: int) -> Batch:
        raise AssertionError("there is no inner step")

    def predict(self, theta: Theta, state: Batch, x: Tensor) -> Tensor:
        features_SF, features_QF = embed_together(self.model, theta, state, x)
        embedded_SC = apply_linear(theta, "snail.embedding", features_SF)
        embedded_QC = apply_linear(theta, "snail.embedding", features_QF)
        if find_ways(self.score) is None:
            labels = require_rows(state.y, "snail")
            real_S = torch.ones_like(labels[:, 0], dtype=torch.bool)
        else:
            labels = one_hot(state.y, self.outputs, embedded_SC.dtype)
            real_S = state.y != PADDING
        unknown = embedded_QC.new_zeros(len(embedded_QC), labels.shape[1])
        s_SC = torch.cat([embedded_SC, labels], 1) * real_S[:, None]
        q_QC = torch.cat([embedded_QC, unknown], 1)
        _, q_QC = self.read_sequences(theta, s_SC, q_QC, real_S)
        return apply_linear(theta, "snail.out", q_QC)

    def read_sequences(
        self, theta: Theta, s_SC: Tensor, q_QC: Tensor, real_S: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Apply all blocks to the support rows and to each query after them."""
        for i in range(len(self.attention)):
            if i > 0:
                for layer in range(self.layers):
                    s_SC, q_QC = convolve(theta, f"snail.tc.{i}.{layer}", 2**layer, s_SC, q_QC, real_S)
            s_SC, q_QC = attend(theta, f"snail.attention.{i}", s_SC, q_QC, real_S)
        return s_SC, q_QC


def apply_linear(theta: Theta, name: str, x: Tensor) -> Tensor:
    return x @ theta[f"{name}.weight"] + theta[f"{name}.bias"]


def convolve(
    theta: Theta, name: str, dilation: int, s_SC: Tensor, q_QC: Tensor, real_S: Tensor
) -> tuple[Tensor, Tensor]:
    """Append the outputs of a gated causal convolution with two taps, `dilation` rows apart, as new channels.

    Before the first row, and in place of padding, the input is zero.
    """
    # Row t holds support row t − dilation; row S holds what a query sees, which comes after the last support row.
    shifted = torch.cat([s_SC.new_zeros(dilation, s_SC.shape[1]), s_SC])

    def gate(before: Tensor, x: Tensor) -> Tensor:
        content, gates = apply_linear(theta, name, torch.cat([before, x], 1)).chunk(2, 1)
        return content.tanh() * gates.sigmoid()

    new_SC = gate(shifted[: len(s_SC)], s_SC) * real_S[:, None]
    new_QC = gate(shifted[len(s_SC)].expand_as(q_QC), q_QC)
    return torch.cat([s_SC, new_SC], 1), torch.cat([q_QC, new_QC], 1)


def attend(theta: Theta, name: str, s_SC: Tensor, q_QC: Tensor, real_S: Tensor) -> tuple[Tensor, Tensor]:
    """Append what every row reads from itself and the rows before it, as new channels."""
    query_SK, key_SK, value_SV = (
        apply_linear(theta, f"{name}.{part}", s_SC) for part in ("query", "key", "value")
    )
    query_QK, key_QK, value_QV = (
        apply_linear(theta, f"{name}.{part}", q_QC) for part in ("query", "key", "value")
    )
    scale = key_SK.shape[1] ** -0.5
    # A row of padding reads only itself: a softmax over nothing would be NaN.
    itself_SS = torch.eye(len(s_SC), dtype=torch.bool, device=s_SC.device)
    sees_SS = (torch.ones_like(itself_SS).tril() & real_S) | itself_SS
    weight_SS = (query_SK @ key_SK.T * scale).masked_fill(~sees_SS, -torch.inf).softmax(1)
    to_support_QS = (query_QK @ key_SK.T * scale).masked_fill(~real_S, -torch.inf)
    to_itself_Q1 = (query_QK * key_QK).sum(1, keepdim=True) * scale
    weights = torch.cat([to_support_QS, to_itself_Q1], 1).softmax(1)
    weight_QS, weight_Q1 = weights.split([len(s_SC), 1], 1)
    read_SV = weight_SS @ value_SV * real_S[:, None]
    read_QV = weight_QS @ value_SV + weight_Q1 * value_QV
    return torch.cat([s_SC, read_SV], 1), torch.cat([q_QC, read_QV], 1)
