"""A user's data in the types that a task family draws: arrays, lists and trees become what training has seen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distmeta.errors import InputError
from distmeta.runtime.problem import Problem
from distmeta.trees import tree_leaves


def build_support(problem: Problem, x: Any, y: Any) -> Any:
    """Return a support set of the family's type, on the problem's device.

    Args:
        x: the inputs; or a whole support set, if y is None.
    """
    example = problem.example.support
    if y is None:
        return match("support", x, example, problem)
    fields = _list_fields(example)
    if set(fields) != {"x", "y"}:
        raise InputError(
            f"adapt: got x and y, but support sets of {problem.job.tasks.type} have the fields {', '.join(fields)}: "
            "expected a whole one, adapt(support)"
        )
    inputs = build_inputs(problem, x, fields["x"])
    rows = len(tree_leaves(inputs)[0])
    return replace_field(
        replace_field(example, "x", inputs), "y", _build_targets(problem, y, fields["y"], rows)
    )


def build_inputs(problem: Problem, x: Any, example: Any = None) -> Any:
    """Return inputs like those of the family's query sets (or like `example`), on the problem's device."""
    example = read_field(problem.example.query, "x") if example is None else example
    inputs = match("x", x, example, problem)
    expected = tuple(problem.family.in_shape)
    if isinstance(inputs, Tensor) and tuple(inputs.shape[1:]) != expected:
        raise InputError(f"x: got examples of shape {tuple(inputs.shape[1:])}, expected {expected}")
    return inputs


def _build_targets(problem: Problem, y: Any, example: Any, rows: int) -> Any:
    """Return targets like those of the family, with one row per example."""
    if not isinstance(example, Tensor):
        return match("y", y, example, problem)
    given = to_tensor("y", y)
    shape = tuple(given.shape)
    expected = (rows, *example.shape[1:])
    if example.is_floating_point():
        if shape != expected:
            raise InputError(f"y: got numbers of shape {shape}, expected targets of shape {expected}")
    elif given.is_floating_point():
        raise InputError(f"y: got numbers of shape {shape}, expected integer labels of shape {expected}")
    elif shape != expected:
        raise InputError(
            f"y: got labels of shape {shape}, expected one for each of the {rows} examples, {expected}"
        )
    return match("y", given, example, problem)


def is_class_index(labels: Any) -> bool:
    """Return whether the targets are one integer per example."""
    return isinstance(labels, Tensor) and not labels.is_floating_point() and labels.dim() == 1


def match(name: str, value: Any, example: Any, problem: Problem) -> Any:
    """Return a user's value with the structure and the dtypes of an example, leaf by leaf.

    Raises:
        InputError: names the leaf that differs.
    """
    if isinstance(example, Tensor):
        return _match_tensor(name, value, example, problem)
    fields = _list_fields(example)
    given = _list_fields(value) if isinstance(value, Mapping | tuple | list) else None
    if given is not None and not isinstance(value, Mapping) and len(given) == len(fields):
        given = dict(zip(fields, given.values(), strict=True))  # by position
    if given is None or set(given) != set(fields):
        found = type(value).__name__ if given is None else ", ".join(map(str, given))
        raise InputError(f"{name}: got {found}, expected {', '.join(map(str, fields))}")
    matched = {key: match(f"{name}.{key}", given[key], fields[key], problem) for key in fields}
    return _rebuild(example, matched)


def _match_tensor(name: str, value: Any, example: Tensor, problem: Problem) -> Tensor:
    tensor = to_tensor(name, value)
    if tensor.dim() and tensor.dim() != example.dim() and "." in name:
        raise InputError(
            f"{name}: got a tensor with {tensor.dim()} axes, expected {example.dim()}, as in training"
        )
    if tensor.is_floating_point() and not example.is_floating_point():
        raise InputError(
            f"{name}: got {str(tensor.dtype).removeprefix('torch.')}, expected "
            f"{str(example.dtype).removeprefix('torch.')}, as in training"
        )
    return tensor.to(problem.device, example.dtype)


def to_tensor(name: str, value: Any) -> Tensor:
    """Return a detached tensor. Arrays are copied, because they may be read-only."""
    try:
        return value.detach() if isinstance(value, Tensor) else torch.tensor(np.asarray(value))
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{name}: got {type(value).__name__} ({error}), expected an array of numbers"
        ) from None


# --- Trees of one level -------------------------------------------------------------------------------------------


def _list_fields(node: Any) -> dict[Any, Any]:
    """Return the children of a dict, a NamedTuple, a tuple or a list, by name or position."""
    if isinstance(node, Mapping):
        return dict(node)
    if is_named_tuple(node):
        return node._asdict()
    return dict(enumerate(node))


def is_named_tuple(node: Any) -> bool:
    return isinstance(node, tuple) and type(node) is not tuple


def _rebuild(node: Any, fields: dict[Any, Any]) -> Any:
    """Return a container like `node` with other children."""
    build: Any = type(node)
    if isinstance(node, Mapping):
        return build(fields)
    return build(**fields) if is_named_tuple(node) else build(fields.values())


def read_field(node: Any, name: str) -> Any:
    """Return a field of a support or query set; None if it has no such field."""
    return _list_fields(node).get(name)


def replace_field(node: Any, name: str, value: Any) -> Any:
    """Return the support or query set with another value of a field."""
    return _rebuild(node, {**_list_fields(node), name: value})
