"""Memory-augmented networks: Santoro et al. 2016, arXiv 1605.06065; with the memories of the NTM and the DNC.

Shapes: S support rows, Q query rows, N rows of a sequence, F features, D outputs, H units of the controller, R read
heads of W numbers each; any leading axes (`...`) in a single step.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from distmeta.algorithms.class_features import check_ways, embed_together, find_head_shape, require_rows
from distmeta.algorithms.memory.addressing import Memory
from distmeta.algorithms.memory.dnc import build_dnc
from distmeta.algorithms.memory.lrua import build_lrua
from distmeta.algorithms.memory.ntm import build_ntm
from distmeta.compute.gradient import query_loss
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
    find_ways,
    one_hot,
)
from distmeta.trees import tree_map

Size = Annotated[int, Field(ge=1)]
INSTANCES = {1: "1st", 2: "2nd", 5: "5th", 10: "10th"}


class ControllerState(NamedTuple):
    """What is carried from one row to the next."""

    hidden: Tensor
    """Output of the LSTM, [..., H]."""
    cell: Tensor
    """Its cell state, [..., H]."""
    read: Tensor
    """What the heads read last, [..., R·W]."""
    memory: Any
    """State of the memory."""
    label: Tensor
    """The last row's label, one-hot, or its target, [..., D]; zeros before the first row."""


class MANNState(NamedTuple):
    """A task after its support set was read."""

    controller: ControllerState
    support: Batch
    """Kept for batch norms, which see support and queries together."""


class MANN:
    """Read a task row by row with a recurrent controller and an external memory, and learn it along the way.

        h_t, c_t = LSTM([e(x_t), y_{t−1}, r_{t−1}], h_{t−1}, c_{t−1})
        M_t, r_t = access(M_{t−1}, W_m h_t + b_m)                                             (lrua.py, ntm.py, dnc.py)
        outputs  = W_o [h_t, r_t] + b_o                                                               (§2, §3)

    A row's label comes one row late, so the memory must bind it to its example. y is one-hot, with as many classes as
    the model's head has outputs; evaluation may have fewer classes, not more. Targets of a regression are used as they
    are. Rows of padding change nothing. e are the model's features; the paper uses raw pixels, as does the model
    `{type: mlp, hidden: []}`. A batch norm in the model sees only the support set while that is read, and both sets
    afterwards.

    Training reads support and query rows as one sequence, with the loss of every position, as in the paper. Prediction
    reads each query row from the state after the support set, so it does not depend on other queries. Training's `loss`
    and `accuracy` are those of such predictions. `accuracy_1st`, `_2nd`, `_5th` and `_10th` are the training
    sequence's, at the first, second, … row of a class (the paper's table 1). Rows should come in random order:
    `tasks.order: random`.

    Weights start normal with variance 1 / inputs, biases at 0, the biases of the forget gates at 1.

    Args:
        memory: `lrua` (the paper's), `ntm` (Graves et al. 2014) or `dnc` (Graves et al. 2016).
        controller: H ≥ 1.
        slots: rows of the memory, ≥ 1.
        width: columns of the memory, ≥ 1.
        reads: R, at most `slots`.
        decay: γ in [0, 1] of lrua's usage. The default is that of a reproduction (tristandeleu/ntm-one-shot).
        shift: furthest move of an ntm head in one access, in slots, ≥ 1.
        sequence: query rows in a training sequence after the support rows, ≥ 1; null: all.
        sequential: read the query rows as one sequence too, without their labels, and train with the query loss only.
            For tasks that are sequences (`copy`).

    Raises:
        InputError: the model has no last linear layer, or there are more read heads than slots.
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
                f"algorithm.sequence: got {sequence} with algorithm.sequential: true, which reads all query rows, "
                "expected only one of them"
            )
        self.model = model
        self.score = score
        self.outputs, self.inputs = find_head_shape(model, "mann")
        self.controller = controller
        self.read = reads * width
        self.memory_options = (memory, slots, width, reads, decay, shift)
        self.sequence = sequence
        self.sequential = sequential

    def init(self, generator: torch.Generator) -> Theta:
        def normal(fan_in: int, rows: int, columns: int) -> Tensor:
            return torch.randn(rows, columns, generator=generator) / fan_in**0.5

        units = self.controller
        known = units + self.read
        fan_in = self.inputs + known + self.outputs
        emitted_size = build_memory(*self.memory_options).emitted_size
        bias_of_forget_gates = torch.cat([torch.zeros(units), torch.ones(units), torch.zeros(2 * units)])
        return self.model.init_body() | {
            "controller.input": normal(fan_in, self.inputs, 4 * units),
            "controller.recurrent": normal(fan_in, known + self.outputs, 4 * units),
            "controller.bias": bias_of_forget_gates,
            "heads.weight": normal(units, units, emitted_size),
            "heads.bias": torch.zeros(emitted_size),
            "readout.weight": normal(known, known, self.outputs),
            "readout.bias": torch.zeros(self.outputs),
        }

    def begin(self, theta: Theta, support: Batch) -> MANNState:
        check_ways(self.score, self.outputs, "mann")
        features_SF = self.model.features(theta, support.x)
        controller, _ = self._read_sequence(theta, self._start(theta), features_SF, support.y)
        return MANNState(controller, support)

    def step(self, theta: Theta, state: MANNState, support: Batch, k: int) -> MANNState:
        raise AssertionError("there is no inner step")

    def predict(self, theta: Theta, state: MANNState, x: Tensor) -> Tensor:
        _, features_QF = embed_together(self.model, theta, state.support, x)
        if self.sequential:
            unknown_QD = features_QF.new_zeros(len(features_QF), self.outputs)
            _, outputs = self._read_sequence(theta, state.controller, features_QF, unknown_QD)
            return outputs
        return self._read_each(theta, state.controller, features_QF)

    def meta_loss(
        self, theta: Theta, episode: Episode, unroll: Unroll, score: Score
    ) -> tuple[Tensor, Metrics]:
        if self.sequential:
            return query_loss(self, theta, episode, unroll, score)
        support, query = episode
        continuation = tree_map(lambda leaf: leaf[: self.sequence], Batch(query.x, query.y))
        features_SF = self.model.features(theta, support.x)  # as in `begin`
        _, features_QF = embed_together(self.model, theta, support, query.x)
        controller, support_SD = self._read_sequence(theta, self._start(theta), features_SF, support.y)
        _, query_ND = self._read_sequence(theta, controller, features_QF[: self.sequence], continuation.y)
        read = Batch(support.x, support.y)
        rows = tree_map(lambda *parts: torch.cat(parts), read, continuation)
        outputs_ND = torch.cat([support_SD, query_ND])
        loss, _ = score(outputs_ND, rows)
        constants = tree_map(lambda leaf: leaf.detach(), (theta, controller, features_QF))
        loss_of_predictions, metrics = score(self._read_each(*constants), query)
        by_instance = measure_accuracy_by_instance(outputs_ND, rows.y, find_ways(score))
        return loss, {"loss": loss_of_predictions, **metrics, **by_instance}

    def _start(self, theta: Theta) -> ControllerState:
        like = theta["readout.bias"]
        zeros_H = like.new_zeros(self.controller)
        return ControllerState(
            hidden=zeros_H,
            cell=zeros_H,
            read=like.new_zeros(self.read),
            memory=build_memory(*self.memory_options).begin(like),
            label=like.new_zeros(self.outputs),
        )

    def _read_sequence(
        self, theta: Theta, controller: ControllerState, features_NF: Tensor, y: Tensor
    ) -> tuple[ControllerState, Tensor]:
        """Read rows with their labels, one after the other. Return the state after the last, and the outputs [N, D]."""
        has_classes = isinstance(y, Tensor) and not y.is_floating_point()
        labels_ND = one_hot(y, self.outputs, features_NF.dtype) if has_classes else require_rows(y, "mann")
        known = []
        for n, inputs in enumerate(self._project_inputs(theta, features_NF)):
            after = self._read_row(theta, controller, inputs)._replace(label=labels_ND[n])
            known.append(torch.cat([after.hidden, after.read], -1))
            controller = skip_padding(y[n] != PADDING, after, controller) if has_classes else after
        return controller, torch.stack(known) @ theta["readout.weight"] + theta["readout.bias"]

    def _read_each(self, theta: Theta, controller: ControllerState, features_QF: Tensor) -> Tensor:
        """Return the outputs [Q, D] of rows that are each read from the same state."""
        copies = tree_map(lambda leaf: leaf.expand(len(features_QF), *leaf.shape), controller)
        after = self._read_row(theta, copies, self._project_inputs(theta, features_QF))
        known_QK = torch.cat([after.hidden, after.read], -1)
        return known_QK @ theta["readout.weight"] + theta["readout.bias"]

    def _project_inputs(self, theta: Theta, features_NF: Tensor) -> Tensor:
        """Return what the rows themselves contribute to the gates of the LSTM, [N, 4H]."""
        return features_NF @ theta["controller.input"] + theta["controller.bias"]

    def _read_row(self, theta: Theta, controller: ControllerState, inputs: Tensor) -> ControllerState:
        """Return the state after one row: the LSTM first, then the memory. `label` stays as it was."""
        recurrent = torch.cat([controller.hidden, controller.read, controller.label], -1)
        gates = inputs + recurrent @ theta["controller.recurrent"]
        input_H, forget_H, output_H, candidate_H = gates.split(self.controller, -1)
        cell_H = forget_H.sigmoid() * controller.cell + input_H.sigmoid() * candidate_H.tanh()
        hidden_H = output_H.sigmoid() * cell_H.tanh()
        emitted = hidden_H @ theta["heads.weight"] + theta["heads.bias"]
        memory, read = build_memory(*self.memory_options).access(controller.memory, emitted)
        return ControllerState(hidden_H, cell_H, read, memory, controller.label)


def build_memory(kind: str, slots: int, width: int, reads: int, decay: float, shift: int) -> Memory:
    if kind == "lrua":
        return build_lrua(slots, width, reads, decay)
    if kind == "ntm":
        return build_ntm(slots, width, reads, shift)
    return build_dnc(slots, width, reads)


def skip_padding(is_real: Tensor, after: ControllerState, before: ControllerState) -> ControllerState:
    """Return the state after a row, or the one before it if the row is padding."""
    return tree_map(lambda new, old: torch.where(is_real, new, old), after, before)


def measure_accuracy_by_instance(outputs_ND: Tensor, y_N: Tensor, ways: int | None) -> Metrics:
    """Return the accuracy at the first, second, fifth and tenth row of a class, if an average class has so many rows.

    It is NaN if a padded task has no such row.
    """
    if ways is None:
        return {}
    classes_NW = one_hot(y_N, ways, torch.int64)
    instance_N = (classes_NW.cumsum(0) * classes_NW).sum(-1)
    correct_N = (outputs_ND[:, :ways].argmax(-1) == y_N).float()
    metrics = {}
    for instance, name in INSTANCES.items():
        if instance <= len(y_N) // ways:
            rows_N = (instance_N == instance).float()
            metrics[f"accuracy_{name}"] = (correct_N * rows_N).sum() / rows_N.sum()
    return metrics
