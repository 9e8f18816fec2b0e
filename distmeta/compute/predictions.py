"""Labels and predictions of query rows, from a model's outputs (`distmeta evaluate --predictions`)."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from distmeta.errors import InputError
from distmeta.protocols import Episodes, PredictsLabels, TaskFamily
from distmeta.trees import name_leaves, tree_map

CAPABILITY = "give the task family a method predict_labels(outputs, batch) that returns the predictions"


class Predictions(NamedTuple):
    """Labels and predictions of one task's query rows, by the name of the leaf of `y`; "" if `y` is one tensor."""

    labels: dict[str, np.ndarray]
    """[Q, ...] each."""
    predictions: dict[str, np.ndarray]
    """The same shapes."""


def predict_labels(
    family: TaskFamily, episodes: Episodes, outputs: Any, ways: int | None
) -> list[Predictions]:
    """Return the labels and predictions of every task.

    Args:
        outputs: of the query sets, stacked over tasks, or a list with one per task.
        ways: how many outputs a classification uses; None: all.

    Raises:
        InputError: the family has no labels, or it is not clear which prediction the outputs mean.
    """
    rows = []
    count = len(episodes) if isinstance(episodes, list) else len(name_leaves(episodes)[0][1])
    for t in range(count):
        is_list = isinstance(episodes, list)
        query = episodes[t].query if is_list else tree_map(lambda leaf, t=t: leaf[t], episodes.query)
        output = outputs[t] if isinstance(outputs, list) else tree_map(lambda leaf, t=t: leaf[t], outputs)
        rows.append(_predict_task(family, query, output, ways))
    return rows


def _predict_task(family: TaskFamily, query: Any, outputs: Any, ways: int | None) -> Predictions:
    labels = read_labels(query)
    if isinstance(family, PredictsLabels):
        predictions = family.predict_labels(outputs, query)
    else:
        predictions = choose_predictions(labels, outputs, ways)
    return Predictions(_to_arrays(labels), _to_arrays(predictions))


def read_labels(query: Any) -> Any:
    """Return `y` of a query set, a NamedTuple or a dict."""
    fields = query if isinstance(query, dict) else query._asdict()
    if "y" not in fields:
        raise InputError("--predictions: this task family has no labels: its query set has no y")
    return fields["y"]


def choose_predictions(labels: Any, outputs: Any, ways: int | None = None) -> Any:
    """Return the predictions that outputs mean, a pytree like the labels.

    - Float labels: the outputs.
    - Labels 0 and 1 (or negative: ignored), outputs of the same shape: logits, 1 if they are positive.
    - Integer labels [Q, ...], outputs [Q, C, ...] or [Q, ..., C] with C > 1: the class with the largest output.

    Args:
        ways: how many of the C outputs are used; None: all.

    Raises:
        InputError: none of these, or both positions of the class axis are possible.
    """
    named_labels = name_leaves(labels)
    named_outputs = name_leaves(outputs)
    if len(named_labels) != len(named_outputs):
        raise InputError(
            f"--predictions: got {len(named_labels)} tensors of labels and {len(named_outputs)} of outputs, expected "
            f"as many: {CAPABILITY}"
        )
    remaining = iter(output for _, output in named_outputs)
    return tree_map(lambda label: _choose_prediction(label, next(remaining), ways), labels)


def _choose_prediction(labels: Tensor, outputs: Tensor, ways: int | None) -> Tensor:
    if labels.is_floating_point():
        if outputs.numel() == labels.numel() and len(outputs) == len(labels):
            return outputs.reshape(labels.shape)
    elif outputs.shape == labels.shape:
        if not labels.numel() or int(labels.max()) <= 1:  # else they are counts, or classes
            return (outputs > 0).to(labels.dtype)
    elif outputs.dim() == labels.dim() + 1:
        axes = {
            axis
            for axis in (1, outputs.dim() - 1)
            if outputs.shape[:axis] + outputs.shape[axis + 1 :] == labels.shape and outputs.shape[axis] > 1
        }
        if len(axes) == 1:
            (axis,) = axes
            used = outputs if ways is None else outputs.narrow(axis, 0, min(ways, outputs.shape[axis]))
            return used.argmax(axis)
    raise InputError(
        f"--predictions: got outputs of shape {list(outputs.shape)} for labels of shape {list(labels.shape)} "
        f"({str(labels.dtype).removeprefix('torch.')}), for which no single meaning is known: {CAPABILITY}"
    )


def _to_arrays(values: Any) -> dict[str, np.ndarray]:
    return {name: torch.as_tensor(value).detach().cpu().numpy() for name, value in name_leaves(values)}
