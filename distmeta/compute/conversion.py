"""What a user's `draw` or `collect` returned, as tensors: conversions whose meaning is clear, and checks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distmeta.errors import InputError
from distmeta.protocols import PADDING, Batch, Episode, Episodes, Examples, HasWays, PerStep
from distmeta.trees import name_leaves, tree_leaves, tree_map

KEPT_DTYPES = (torch.float32, torch.int64, torch.bool, torch.uint8, torch.complex64)
"""uint8 is kept because it may mean tokens or pixels, which need different treatment."""
DTYPES_BY_KIND = {"f": np.float32, "i": np.int64, "u": np.int64, "b": np.bool_, "c": np.complex64}
"""What numpy's kinds of dtypes become."""
PARTS = {"support", "query"}


def convert_episodes(drawn: Any, score: Any = None) -> Episodes:
    """Return episodes of tensors.

    - numpy arrays and lists of numbers become tensors.
    - Floats become float32, the dtype of theta; integers become int64.
    - Boolean and uint8 labels of a classification become int64.
    - A pair (support, query) or a dict with these keys becomes an `Episode`; a pair (x, y) or a dict with these keys
      becomes a `Batch`.

    Args:
        drawn: what `draw` returned: an episode, or a list with one per task.
        score: the family's. It shows whether the targets are classes.

    Raises:
        InputError: something is no number, or its meaning is not clear.
    """
    if isinstance(drawn, list):
        return [_convert_episode(episode, score) for episode in drawn]
    return _convert_episode(drawn, score)


def _convert_episode(drawn: Any, score: Any) -> Episode:
    if _is_ready(drawn):
        return _convert_labels(drawn, score)  # the usual case costs microseconds
    if isinstance(drawn, Mapping) and set(drawn) == PARTS:
        drawn = Episode(drawn["support"], drawn["query"])
    if type(drawn) is tuple and len(drawn) == 2:
        drawn = Episode(*drawn)
    if not isinstance(drawn, Episode):
        raise InputError(
            f"tasks.type: draw returned {type(drawn).__name__}, expected an Episode, or a list with one Episode "
            "per task"
        )
    if isinstance(drawn.query, Tensor | np.ndarray):
        raise InputError(
            f"tasks.type: draw returned query as {type(drawn.query).__name__}, expected a Batch of x and y: "
            "Episode(Batch(x, y), Batch(x, y))"
        )
    support = convert_data(drawn.support, "draw returned support")
    query = convert_data(drawn.query, "draw returned query")
    return _convert_labels(Episode(support, query), score)


def _is_ready(drawn: Any) -> bool:
    """Return whether nothing but labels may need a conversion."""
    if not (
        isinstance(drawn, Episode) and isinstance(drawn.support, Batch) and isinstance(drawn.query, Batch)
    ):
        return False
    return all(isinstance(leaf, Tensor) and leaf.dtype in KEPT_DTYPES for leaf in tree_leaves(drawn))


def convert_data(part: Any, source: str) -> Any:
    """Return a support or query set, or any other pytree of data, with tensors as leaves.

    Args:
        source: where it comes from, for messages: `draw returned support`.

    Raises:
        InputError: a leaf is no number, or a batch is a dict with further fields.
    """
    if isinstance(part, PerStep):
        return PerStep(tuple(convert_data(batch, source) for batch in part.batches))
    if type(part) is tuple and len(part) == 2:
        part = Batch(*part)
    if isinstance(part, Mapping) and {"x", "y"} <= set(part):
        if len(part) > 2:
            raise InputError(
                f"tasks.type: {source} as a dict of {', '.join(part)}, expected a Batch, or a NamedTuple of your own "
                "with these fields"
            )
        part = Batch(part["x"], part["y"])
    return _convert(part, source)


def _convert(value: Any, source: str) -> Any:
    """Convert the leaves of a pytree. A list of numbers is a leaf."""
    if isinstance(value, Tensor):
        return _convert_dtype(value)
    if isinstance(value, np.ndarray | np.generic | bool | int | float):
        return _convert_array(np.asarray(value), source)
    if isinstance(value, list) and _holds_numbers(value):
        return _convert_array(_build_array(value, source), source)
    if isinstance(value, Mapping):
        return {name: _convert(child, f"{source}.{name}") for name, child in value.items()}
    if isinstance(value, tuple) and type(value) is not tuple:  # a NamedTuple
        build: Any = type(value)
        children = zip(build._fields, value, strict=True)
        return build(*(_convert(child, f"{source}.{name}") for name, child in children))
    if isinstance(value, list | tuple):
        return type(value)(_convert(child, f"{source}.{n}") for n, child in enumerate(value))
    raise InputError(
        f"tasks.type: {source} as {type(value).__name__}, expected tensors, arrays or lists of numbers"
    )


def _holds_numbers(value: Any) -> bool:
    while isinstance(value, list) and value:
        value = value[0]
    return isinstance(value, bool | int | float | np.generic)


def _build_array(numbers: list[Any], source: str) -> np.ndarray:
    try:
        return np.asarray(numbers)
    except ValueError as error:
        raise InputError(
            f"tasks.type: {source} as lists of different lengths, expected equal lengths: pad them, or return a list "
            "with one Episode per task"
        ) from error


def _convert_array(array: np.ndarray, source: str) -> Tensor:
    """Return a tensor of an array of any memory layout. It never shares memory that may not be written to."""
    kind = array.dtype.kind
    if kind not in DTYPES_BY_KIND:
        raise InputError(f"tasks.type: {source} as an array of {array.dtype}, expected numbers")
    dtype = np.uint8 if array.dtype == np.uint8 else DTYPES_BY_KIND[kind]
    native = array.astype(dtype, order="C", copy=not array.flags.writeable)
    return torch.from_numpy(native)


def _convert_dtype(value: Tensor) -> Tensor:
    if value.dtype in KEPT_DTYPES:
        return value
    if value.is_complex():
        return value.to(torch.complex64)
    return value.to(torch.float32 if value.is_floating_point() else torch.int64)


def _convert_labels(episode: Episode, score: Any) -> Episode:
    """Turn boolean and uint8 labels of a classification into int64, which has room for `PADDING`."""
    if not isinstance(score, HasWays):
        return episode
    return Episode(*(_convert_part_labels(part) for part in episode))


def _convert_part_labels(part: Any) -> Any:
    if not isinstance(part, Examples):
        return part
    batch: Any = part  # a NamedTuple: `_convert` has refused everything else
    if isinstance(batch.y, Tensor) and batch.y.dtype in (torch.bool, torch.uint8):
        return batch._replace(y=batch.y.to(torch.int64))
    return batch


# --- Checks -------------------------------------------------------------------------------------------------------


def check_episodes(episodes: Episodes, tasks: int, score: Any, source: str = "draw") -> None:
    """Check the first episodes of a job for common mistakes.

    Args:
        source: what returned them, for messages.

    Raises:
        InputError: names the field, what came and what was expected.
    """
    if isinstance(episodes, list):
        for episode in episodes:
            _check_episode(episode, score, source)
        return
    for name, leaf in name_leaves(episodes):
        if leaf.dim() == 0 or len(leaf) != tasks:
            raise InputError(
                f"tasks.type: {source} returned {name} of shape {list(leaf.shape)} for {tasks} tasks, expected a "
                f"leading task axis, [{tasks}, …], or a list with one Episode per task"
            )
    for t in range(tasks):
        _check_episode(tree_map(lambda leaf, t=t: leaf[t], episodes), score, source)


def _check_episode(episode: Episode, score: Any, source: str) -> None:
    for name, part in episode._asdict().items():
        if not isinstance(part, Examples):
            continue  # collected data, or what only an algorithm of the user's own reads
        rows = {leaf_name: len(leaf) for leaf_name, leaf in name_leaves(part.x) if leaf.dim()}
        _check_rows(f"{source} returned", name, rows, part.y)
        if isinstance(score, HasWays):
            _check_classes(f"{source} returned {name}.y", part.y, score.ways)


def _check_rows(source: str, name: str, rows: Mapping[str, int], y: Any) -> None:
    counts = set(rows.values())
    if 0 in counts:
        raise InputError(f"tasks.type: {source} an empty {name}.x, expected at least one example")
    for leaf_name, leaf in name_leaves(y):
        if len(counts) == 1 and leaf.dim() and len(leaf) not in counts:
            field = f"{name}.y.{leaf_name}" if leaf_name else f"{name}.y"
            raise InputError(
                f"tasks.type: {source} {counts.pop()} examples in {name}.x and {len(leaf)} in {field}, expected "
                "as many"
            )


def _check_classes(source: str, y: Any, ways: int) -> None:
    if not isinstance(y, Tensor) or y.dim() != 1:
        found = f"shape {list(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise InputError(
            f"tasks.type: {source} as {found} of one task, expected class indices [N], because score has `ways`"
        )
    if y.is_floating_point():
        raise InputError(
            f"tasks.type: {source} as {str(y.dtype).removeprefix('torch.')}, expected class indices (int64), because "
            "score has `ways`: use y.long()"
        )
    if len(y) and not (int(y.min()) >= PADDING and int(y.max()) < ways):
        raise InputError(
            f"tasks.type: {source} with classes from {int(y.min())} to {int(y.max())}, expected 0 to {ways - 1} "
            f"(score.ways = {ways})"
        )


# --- Explanations -------------------------------------------------------------------------------------------------


def describe_missing_numbers(episodes: Episodes) -> str | None:
    """Return a note if data have numbers that are not finite, or None.

    This is no error: a model may treat NaN as a missing value, and tasks without a finite gradient are left out.
    """
    for name, leaf in name_leaves(episodes):
        if leaf.is_floating_point() and not bool(leaf.isfinite().all()):
            kind = "NaN" if bool(leaf.isnan().any()) else "infinity"
            return (
                f"tasks.type: draw returned {kind} in {name}, expected finite numbers, unless the model or the score "
                "replaces them: tasks whose gradient is not finite are left out"
            )
    return None


def find_difference(episode: Episode) -> str | None:
    """Return how the inputs of one task's support and query differ, apart from their numbers of examples, or None.

    It explains a failure. Alone it is no mistake, because a model may take both.
    """
    support, query = episode
    if not (isinstance(support, Examples) and isinstance(query, Examples)):
        return None
    support_leaves = dict(name_leaves(support.x))
    query_leaves = dict(name_leaves(query.x))
    if list(support_leaves) != list(query_leaves):
        described = [
            f"the fields {', '.join(leaves)}" if "" not in leaves else "one tensor"
            for leaves in (support_leaves, query_leaves)
        ]
        return f"support.x as {described[0]} and query.x as {described[1]}, expected the same structure"
    for name, leaf in support_leaves.items():
        other = query_leaves[name]
        field = f"x.{name}" if name else "x"
        if leaf.dtype != other.dtype:
            dtypes = [str(one.dtype).removeprefix("torch.") for one in (leaf, other)]
            return f"support.{field} as {dtypes[0]} and query.{field} as {dtypes[1]}, expected the same dtype"
        if leaf.shape[1:] != other.shape[1:]:
            return (
                f"support.{field} of shape {list(leaf.shape)} and query.{field} of shape {list(other.shape)}, "
                "expected equal shapes except for the number of examples"
            )
    return None
