"""Memory-augmented networks: Santoro et al. 2016, arXiv 1605.06065; with the memories of the NTM and the DNC.

Shapes: S support rows, Q query rows, N rows of a sequence, F features, D outputs, H units of the controller, R heads
that read W numbers each; any leading axes (`...`) in a single step.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from torch.utils._pytree import tree_map

from distmeta.algorithms.class_features import check_ways, features_of_both, head_shape
from distmeta.algorithms.memory.addressing import Memory
from distmeta.algorithms.memory.dnc import dnc
from distmeta.algorithms.memory.lrua import lrua
from distmeta.algorithms.memory.ntm import ntm
from distmeta.errors import InputError
from distmeta.protocols import (
    PADDING,
    Batch,
    Episode,
    Metrics,
    Model,
    Score,
    Theta,
    Unroll,
    one_hot,
    query_loss,
    ways_of,
)

Size = Annotated[int, Field(ge=1)]
INSTANCES = {1: "1st", 2: "2nd", 5: "5th", 10: "10th"}


class Reading(NamedTuple):
    """What is carried from one row to the next."""

    hidden: Tensor
    """[..., H], as the cell."""
    cell: Tensor
    read: Tensor
    """[..., R·W], what the heads read last."""
    memory: Any
    last: Tensor
    """[..., D], the last row's label, one-hot, or its target; zeros before the first row."""


class Read(NamedTuple):
    """A task after its support set was read; the support is kept for batch norms (`features_of_both`)."""

    reading: Reading
    support: Batch


class MANN:
    """A recurrent controller with an external memory reads a task row after row, and learns it on the way.

        h_t, c_t = LSTM([e(x_t), y_{t−1}, r_{t−1}], h_{t−1}, c_{t−1})
        M_t, r_t = access(M_{t−1}, W_m h_t + b_m)                            (memory_lrua, memory_ntm, memory_dnc)
        outputs  = W_o [h_t, r_t] + b_o                                                               (§2, §3)

    A row's label comes one row late, so that it must be bound to its example in the memory. y is one-hot, with as many
    classes as the model's head has outputs: evaluation may have fewer, not more. Targets of a regression enter as they
    are. Rows of padding change nothing. e is the model's features; the paper feeds raw pixels, as the model
    `{type: mlp, hidden: []}` does. A batch norm in it sees the support by itself, the queries together with it.

    Training reads support and query rows as one sequence, with the loss of every position, as the paper does.
    Prediction reads each query row alone, from the state after the support, so that it depends on no other query;
    training's `loss` and `accuracy` are those of such predictions. `accuracy_1st`, `_2nd`, `_5th` and `_10th` are the
    training sequence's, at the first, second, … row of a class (the paper's table 1). Rows should come in random order:
    `tasks.order: random`.

    Weights start normal with variance 1 / inputs, biases at 0, those of the forget gates at 1.

    Args:
        memory: `lrua` (the paper's), `ntm` (Graves et al. 2014) or `dnc` (Graves et al. 2016).
        controller: H.
        slots, width: rows and columns of the memory.
        reads: R.
        decay: γ, of usage in lrua; the default is that of a reproduction (tristandeleu/ntm-one-shot).
        shift: furthest move of an ntm head in one access.
        sequence: query rows that a training sequence goes on with after the support; null: all.
        sequential: the query rows are one sequence too, read one after the other without their labels; training has
            the query loss alone. For tasks that are sequences (`copy`).

    Raises:
        InputError: the model has no last linear layer; more read heads than slots.
    """

    group_size = 1
    inner_steps = 0

    def __init__(
        self,
        model: Model,
        score: Score,
        memory: Literal["lrua", "ntm", "dnc"] = "lrua",
        controller: Size = 200,
        slots: Size = 128,
        width: Size = 40,
        reads: Size = 4,
        decay: Annotated[float, Field(ge=0, le=1)] = 0.95,
        shift: Size = 1,
        sequence: Size | None = None,
        sequential: bool = False,
    ):
        if reads > slots:
            raise InputError(f"algorithm.reads: got {reads}, expected at most algorithm.slots = {slots}")
        if sequential and sequence is not None:
            raise InputError(
                f"algorithm.sequence: got {sequence} with algorithm.sequential: true, which reads all query rows: "
                "leave one out"
            )
        self.model, self.score = model, score
        self.outputs, self.inputs = head_shape(model, "mann")
        self.controller, self.read = controller, reads * width
        self.options = (memory, slots, width, reads, decay, shift)
        self.sequence, self.sequential = sequence, sequential

    def init(self, generator: torch.Generator) -> Theta:
        known, units = self.controller + self.read, self.controller
        emits = memory_of(*self.options).emits

        def normal(fan_in: int, rows: int, columns: int) -> Tensor:
            return torch.randn(rows, columns, generator=generator) / fan_in**0.5

        forget = torch.cat([torch.zeros(units), torch.ones(units), torch.zeros(2 * units)])
        fan_in = self.inputs + known + self.outputs
        return self.model.init_body() | {
            "controller.input": normal(fan_in, self.inputs, 4 * units),
            "controller.recurrent": normal(fan_in, known + self.outputs, 4 * units),
            "controller.bias": forget,
            "heads.weight": normal(units, units, emits),
            "heads.bias": torch.zeros(emits),
            "readout.weight": normal(known, known, self.outputs),
            "readout.bias": torch.zeros(self.outputs),
        }

    def begin(self, theta: Theta, support: Batch) -> Read:
        check_ways(self.score, self.outputs, "mann")
        features_SF = self.model.features(theta, support.x)
        return Read(self._sequence(theta, self._start(theta), features_SF, support.y)[0], support)

    def step(self, theta: Theta, state: Read, support: Batch, k: int) -> Read:
        raise AssertionError("there is no inner step")

    def predict(self, theta: Theta, state: Read, x: Tensor) -> Tensor:
        _, features_QF = features_of_both(self.model, theta, state.support, x)
        if self.sequential:
            unknown_QD = features_QF.new_zeros(len(x), self.outputs)
            return self._sequence(theta, state.reading, features_QF, unknown_QD)[1]
        return self._each(theta, state.reading, features_QF)

    def meta_loss(
        self, theta: Theta, episode: Episode, unroll: Unroll, score: Score
    ) -> tuple[Tensor, Metrics]:
        if self.sequential:
            return query_loss(self, theta, episode, unroll, score)
        support, query = episode
        go_on = Batch(*(leaf[: self.sequence] for leaf in query))
        features_SF = self.model.features(theta, support.x)  # as `begin` reads them
        _, features_QF = features_of_both(self.model, theta, support, query.x)
        reading, first_SD = self._sequence(theta, self._start(theta), features_SF, support.y)
        _, others_ND = self._sequence(theta, reading, features_QF[: self.sequence], go_on.y)
        rows = Batch(*(torch.cat(pair) for pair in zip(support, go_on, strict=True)))
        outputs_ND = torch.cat([first_SD, others_ND])
        loss, _ = score(outputs_ND, rows)
        fixed = tree_map(lambda leaf: leaf.detach(), (theta, reading, features_QF))
        query_value, metrics = score(self._each(*fixed), query)
        return loss, {"loss": query_value, **metrics, **by_instance(outputs_ND, rows.y, ways_of(score))}

    def _start(self, theta: Theta) -> Reading:
        like = theta["readout.bias"]
        units_H = like.new_zeros(self.controller)
        nothing = memory_of(*self.options).begin(like)
        return Reading(units_H, units_H, like.new_zeros(self.read), nothing, like.new_zeros(self.outputs))

    def _sequence(
        self, theta: Theta, reading: Reading, features_NF: Tensor, y: Tensor
    ) -> tuple[Reading, Tensor]:
        """Reads rows with their labels, one after the other: the state after the last, and the outputs [N, D]."""
        classes = not y.is_floating_point()
        labels_ND = one_hot(y, self.outputs, features_NF.dtype) if classes else y
        known = []
        for n, driven in enumerate(self._driven(theta, features_NF)):
            after = self._step(theta, reading, driven)._replace(last=labels_ND[n])
            known.append(torch.cat([after.hidden, after.read], -1))
            reading = chosen(y[n] != PADDING, after, reading) if classes else after
        return reading, torch.stack(known) @ theta["readout.weight"] + theta["readout.bias"]

    def _each(self, theta: Theta, reading: Reading, features_QF: Tensor) -> Tensor:
        """Outputs [Q, D] of rows that are each read from the same state."""
        copies = tree_map(lambda leaf: leaf.expand(len(features_QF), *leaf.shape), reading)
        after = self._step(theta, copies, self._driven(theta, features_QF))
        known_QK = torch.cat([after.hidden, after.read], -1)
        return known_QK @ theta["readout.weight"] + theta["readout.bias"]

    def _driven(self, theta: Theta, features_NF: Tensor) -> Tensor:
        """What the rows themselves add to the controller's gates, [N, 4H]."""
        return features_NF @ theta["controller.input"] + theta["controller.bias"]

    def _step(self, theta: Theta, reading: Reading, driven: Tensor) -> Reading:
        """One row: the controller, then the memory."""
        known = torch.cat([reading.hidden, reading.read, reading.last], -1)
        gates = driven + known @ theta["controller.recurrent"]
        enter_H, keep_H, show_H, new_H = gates.split(self.controller, -1)
        cell_H = keep_H.sigmoid() * reading.cell + enter_H.sigmoid() * new_H.tanh()
        hidden_H = show_H.sigmoid() * cell_H.tanh()
        emitted = hidden_H @ theta["heads.weight"] + theta["heads.bias"]
        content, read = memory_of(*self.options).access(reading.memory, emitted)
        return Reading(hidden_H, cell_H, read, content, reading.last)


def memory_of(kind: str, slots: int, width: int, reads: int, decay: float, shift: int) -> Memory:
    """The memory of a name."""
    if kind == "lrua":
        return lrua(slots, width, reads, decay)
    return ntm(slots, width, reads, shift) if kind == "ntm" else dnc(slots, width, reads)


def chosen(real: Tensor, after: Reading, before: Reading) -> Reading:
    """The state after a row, or where the row is padding, before it."""
    return tree_map(lambda new, old: torch.where(real, new, old), after, before)


def by_instance(outputs_ND: Tensor, y_N: Tensor, ways: int | None) -> Metrics:
    """Accuracy at the first, second, fifth and tenth row of a class, as far as a class of equal share has so many.

    NaN where a task filled up with padding has no such row.
    """
    if ways is None:
        return {}
    classes_NW = one_hot(y_N, ways, torch.int64)
    instance_N = (classes_NW.cumsum(0) * classes_NW).sum(-1)
    correct_N = (outputs_ND[:, :ways].argmax(-1) == y_N).float()
    fitting = {k: name for k, name in INSTANCES.items() if k <= len(y_N) // ways}
    shown = {name: (instance_N == k).float() for k, name in fitting.items()}
    return {f"accuracy_{name}": (correct_N * rows_N).sum() / rows_N.sum() for name, rows_N in shown.items()}
