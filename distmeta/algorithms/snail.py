"""A simple neural attentive meta-learner: Mishra, Rohaninejad, Chen & Abbeel 2018, arXiv 1707.03141.

Shapes: S support rows, Q query rows, C channels (they grow from layer to layer), K and V an attention's key and value.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from distmeta.algorithms.class_features import check_ways, features_of_both, head_shape
from distmeta.protocols import PADDING, Batch, Model, Score, Theta, one_hot, ways_of

Size = Annotated[int, Field(ge=1)]
Attention = Annotated[list[Annotated[list[Size], Field(min_length=2, max_length=2)]], Field(min_length=1)]
OMNIGLOT = [[64, 32], [256, 128], [512, 256]]


class SNAIL:
    """A network of causal convolutions and attention reads the support pairs, then the query, and names its label.

        sequence = (e(x_1), y_1), …, (e(x_S), y_S), (e(x), 0);   output = the last row's
        TCBlock:   X ← [X, tanh(W_f * X) ⊙ σ(W_g * X)],   * causal, two taps 1, 2, 4, … rows apart             (§3)
        Attention: X ← [X, softmax(QKᵀ/√k, causal) V]

    Attention(64, 32), TCBlock(128), Attention(256, 128), TCBlock(128), Attention(512, 256), and a linear layer: the
    paper's Omniglot network. Every query is the end of a sequence of its own. Support rows never see it, so their
    activations are computed once for all queries: [S, C] and [Q, C] instead of [Q, S + 1, C].

    y is one-hot, with as many classes as the model's head has outputs: evaluation may have fewer, not more. Targets of
    a regression enter as they are. The order of the support rows matters: train with `tasks.order: random`. Rows of
    padding are left out of the sequence. The model gives e, its features, through one more linear layer, as the
    paper's embedding has; a batch norm in it sees support and queries as one batch.

    Deviation: the paper's pseudo-code has dilations 2, 4, 8, …, by which a block would see every other row; here 1, 2,
    4, …, so that a block of L layers sees 2^L rows.

    Args:
        length: rows that a TC block sees, which gives its ⌈log2 length⌉ layers; the paper's is ways · shots + 1 (the
            longest sequence). A longer sequence works; beyond `length` rows attention alone reaches.
        filters: channels that a layer of a TC block adds.
        attention: (key, value) sizes of the attention blocks; between two of them is a TC block.
        embedding: outputs of the linear layer on the features.

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
        attention: Attention = OMNIGLOT,
        embedding: Size = 64,
    ):
        self.model, self.score = model, score
        self.shape = head_shape(model, "snail")
        self.layers = math.ceil(math.log2(length))
        self.filters, self.attention, self.embedding = filters, attention, embedding

    def init(self, generator: torch.Generator) -> Theta:
        theta = self.model.init_body()
        outputs, features = self.shape

        def linear(name: str, fan_in: int, fan_out: int) -> None:
            bound = fan_in**-0.5  # torch.nn.Linear's own
            theta[f"{name}.weight"] = bound * (2 * torch.rand(fan_in, fan_out, generator=generator) - 1)
            theta[f"{name}.bias"] = bound * (2 * torch.rand(fan_out, generator=generator) - 1)

        linear("snail.embedding", features, self.embedding)
        channels = self.embedding + outputs
        for i, (key, value) in enumerate(self.attention):
            if i > 0:
                for layer in range(self.layers):
                    linear(f"snail.tc.{i}.{layer}", 2 * channels, 2 * self.filters)
                    channels += self.filters
            for part, size in (("query", key), ("key", key), ("value", value)):
                linear(f"snail.attention.{i}.{part}", channels, size)
            channels += value
        linear("snail.out", channels, outputs)
        return theta

    def begin(self, theta: Theta, support: Batch) -> Batch:
        """The support set, rows of padding first: whatever reaches back from a row meets its own kind alone."""
        if ways_of(self.score) is None:
            return support
        check_ways(self.score, self.shape[0], "snail")
        order = torch.argsort((support.y != PADDING).int(), stable=True)
        return Batch(support.x[order], support.y[order])

    def step(self, theta: Theta, state: Batch, support: Batch, k: int) -> Batch:
        raise AssertionError("there is no inner step")

    def predict(self, theta: Theta, state: Batch, x: Tensor) -> Tensor:
        features_SF, features_QF = features_of_both(self.model, theta, state, x)
        s_SC, q_QC = (apply(theta, "snail.embedding", f) for f in (features_SF, features_QF))
        labels, real_S = self._labels(theta, state.y, s_SC.dtype)
        s_SC = torch.cat([s_SC, labels], 1) * real_S[:, None]
        q_QC = torch.cat([q_QC, q_QC.new_zeros(len(x), labels.shape[1])], 1)
        return apply(theta, "snail.out", self.read(theta, s_SC, q_QC, real_S)[1])

    def read(self, theta: Theta, s_SC: Tensor, q_QC: Tensor, real_S: Tensor) -> tuple[Tensor, Tensor]:
        """All blocks, on the support rows and on each query after them."""
        for i in range(len(self.attention)):
            for layer in range(self.layers if i > 0 else 0):
                s_SC, q_QC = dense(theta, f"snail.tc.{i}.{layer}", 2**layer, s_SC, q_QC, real_S)
            s_SC, q_QC = attend(theta, f"snail.attention.{i}", s_SC, q_QC, real_S)
        return s_SC, q_QC

    def _labels(self, theta: Theta, y: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What the sequence shows of y, and which rows are none of padding."""
        if ways_of(self.score) is None:
            return y, torch.ones_like(y[:, 0], dtype=torch.bool)
        return one_hot(y, len(theta["snail.out.bias"]), dtype), y != PADDING


def apply(theta: Theta, name: str, x: Tensor) -> Tensor:
    """The linear layer of that name."""
    return x @ theta[f"{name}.weight"] + theta[f"{name}.bias"]


def dense(
    theta: Theta, name: str, dilation: int, s_SC: Tensor, q_QC: Tensor, real_S: Tensor
) -> tuple[Tensor, Tensor]:
    """A gated causal convolution with two taps, `dilation` rows apart; its outputs are further channels.

    Before the first row there are zeros, as in place of padding.
    """
    back = torch.cat([s_SC.new_zeros(dilation, s_SC.shape[1]), s_SC])  # row t: row t − dilation; S: a query's

    def gated(before: Tensor, x: Tensor) -> Tensor:
        content, gate = apply(theta, name, torch.cat([before, x], 1)).chunk(2, 1)
        return content.tanh() * gate.sigmoid()

    new_SC = gated(back[: len(s_SC)], s_SC) * real_S[:, None]
    new_QC = gated(back[len(s_SC)].expand_as(q_QC), q_QC)
    return torch.cat([s_SC, new_SC], 1), torch.cat([q_QC, new_QC], 1)


def attend(theta: Theta, name: str, s_SC: Tensor, q_QC: Tensor, real_S: Tensor) -> tuple[Tensor, Tensor]:
    """Every row reads itself and what precedes it; what it reads are further channels."""
    query_SK, key_SK, value_SV = (apply(theta, f"{name}.{part}", s_SC) for part in ("query", "key", "value"))
    query_QK, key_QK, value_QV = (apply(theta, f"{name}.{part}", q_QC) for part in ("query", "key", "value"))
    scale = key_SK.shape[1] ** -0.5
    # Padding reads itself: a softmax over nothing is not a number.
    itself = torch.eye(len(s_SC), dtype=torch.bool, device=s_SC.device)
    seen_SS = (torch.ones_like(itself).tril() & real_S) | itself
    weight_SS = (query_SK @ key_SK.T * scale).masked_fill(~seen_SS, -torch.inf).softmax(1)
    to_support_QS = (query_QK @ key_SK.T * scale).masked_fill(~real_S, -torch.inf)
    to_itself_Q1 = (query_QK * key_QK).sum(1, keepdim=True) * scale
    weight_QS, weight_Q1 = torch.cat([to_support_QS, to_itself_Q1], 1).softmax(1).split([len(s_SC), 1], 1)
    read_SV = weight_SS @ value_SV * real_S[:, None]
    return torch.cat([s_SC, read_SV], 1), torch.cat([q_QC, weight_QS @ value_SV + weight_Q1 * value_QV], 1)
