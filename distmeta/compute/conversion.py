"""What a user's `draw` returned, as episodes of tensors: conversions whose meaning is clear, and checks."""

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


def convert_episodes(drawn: Any, score: Any = None) -> Episodes:
    """Return episodes of tensors.

    - numpy arrays and lists of numbers become tensors.
    - Floats become float32, the dtype of theta; integers become int64.
    - Boolean labels of a classification become 0 and 1.
    - A pair (support, query) becomes an `Episode`; a pair (x, y) or a dict with these keys becomes a `Batch`.

    Args:
        drawn: what `draw` returned: an episode, or a list with one per task.
        score: the family's. It shows whether the targets are classes.
    """
    if isinstance(drawn, Episode) and isinstance(drawn.support, Batch) and _are_ready(drawn):
        return _convert_labels(drawn, score)  # the usual case costs microseconds
    if isinstance(drawn, list):
        return [_convert_episode(episode, score) for episode in drawn]
    return _convert_episode(drawn, score)


def _are_ready(episode: Episode) -> bool:
    leaves = tree_leaves(episode)
    return all(isinstance(leaf, Tensor) and leaf.dtype in KEPT_DTYPES for leaf in leaves)


def _convert_episode(drawn: Any, score: Any) -> Episode:
    if not isinstance(drawn, Episode):
        if not (isinstance(drawn, tuple) and len(drawn) == 2):
            raise InputError(
                f"tasks.type: draw returned {type(drawn).__name__}, expected an Episode, or a list with one Episode "
                "per task"
            )
        drawn = Episode(*drawn)
    return _convert_labels(Episode(_convert_part(drawn.support), _convert_part(drawn.query)), score)


def _convert_part(part: Any) -> Any:
    """Convert a support or query set."""
    if isinstance(part, PerStep):
        return PerStep(tuple(_convert_part(batch) for batch in part.batches))
    if type(part) is tuple and len(part) == 2:
        part = Batch(*part)
    if isinstance(part, Mapping) and set(part) == {"x", "y"}:
        part = Batch(part["x"], part["y"])
    return _convert(part)


def _convert(value: Any) -> Any:
    """Convert the leaves of a pytree. A list of numbers is a leaf."""
    if isinstance(value, Tensor):
        return _convert_dtype(value)
    if isinstance(value, np.ndarray | np.generic | bool | int | float):
        return _convert_dtype(torch.as_tensor(value))
    if isinstance(value, list) and _holds_numbers(value):
        return _convert_dtype(torch.as_tensor(np.asarray(value)))
    if isinstance(value, Mapping):
        return {name: _convert(child) for name, child in value.items()}
    if isinstance(value, tuple) and type(value) is not tuple:  # a NamedTuple
        build: Any = type(value)
        return build(*(_convert(child) for child in value))
    if isinstance(value, list | tuple):
        return type(value)(_convert(child) for child in value)
    raise InputError(
        f"tasks.type: draw returned an episode with a {type(value).__name__}, expected tensors, arrays or lists of "
        "numbers"
    )


def _holds_numbers(value: Any) -> bool:
    while isinstance(value, list) and value:
        value = value[0]
    return isinstance(value, bool | int | float | np.generic)


def _convert_dtype(value: Tensor) -> Tensor:
    if value.dtype in KEPT_DTYPES:
        return value
    if value.is_complex():
        return value.to(torch.complex64)
    return value.to(torch.float32 if value.is_floating_point() else torch.int64)


def _convert_labels(episode: Episode, score: Any) -> Episode:
    """Turn boolean labels of a classification into 0 and 1."""
    if not isinstance(score, HasWays):
        return episode
    parts = []
    for part in episode:
        if isinstance(part, Batch) and isinstance(part.y, Tensor) and part.y.dtype == torch.bool:
            part = part._replace(y=part.y.to(torch.int64))
        parts.append(part)
    return Episode(*parts)


# --- Checks -------------------------------------------------------------------------------------------------------


def check_episodes(episodes: Episodes, tasks: int, score: Any) -> None:
    """Check the first episodes of a job for common mistakes.

    Raises:
        InputError: names the field, what came and what was expected.
    """
    if isinstance(episodes, list):
        for episode in episodes:
            _check_episode(episode, score)
        return
    for name, leaf in name_leaves(episodes):
        if leaf.dim() == 0 or len(leaf) != tasks:
            raise InputError(
                f"tasks.type: draw returned {name} of shape {list(leaf.shape)} for {tasks} tasks, expected a leading "
                f"task axis, [{tasks}, …], or a list with one Episode per task"
            )
    for t in range(tasks):
        _check_episode(tree_map(lambda leaf, t=t: leaf[t], episodes), score)


def _check_episode(episode: Episode, score: Any) -> None:
    for name, part in episode._asdict().items():
        if not isinstance(part, Examples):
            continue  # collected data, or what only an algorithm of the user's own reads
        rows = {leaf_name: len(leaf) for leaf_name, leaf in name_leaves(part.x) if leaf.dim()}
        _check_rows(name, rows, part.y)
        if isinstance(score, HasWays):
            _check_classes(name, part.y, score.ways)


def _check_rows(name: str, rows: Mapping[str, int], y: Any) -> None:
    counts = set(rows.values())
    if 0 in counts:
        raise InputError(f"tasks.type: draw returned an empty {name}.x, expected at least one example")
    for leaf_name, leaf in name_leaves(y):
        if len(counts) == 1 and leaf.dim() and len(leaf) not in counts:
            field = f"{name}.y.{leaf_name}" if leaf_name else f"{name}.y"
            raise InputError(
                f"tasks.type: draw returned {counts.pop()} examples in {name}.x and {len(leaf)} in {field}, expected "
                "as many"
            )


def _check_classes(name: str, y: Any, ways: int) -> None:
    if not isinstance(y, Tensor) or y.dim() != 1:
        found = f"shape {list(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise InputError(
            f"tasks.type: draw returned {name}.y as {found} of one task, expected class indices [N], because score has "
            "`ways`"
        )
    if y.is_floating_point():
        raise InputError(
            f"tasks.type: draw returned {name}.y as {str(y.dtype).removeprefix('torch.')}, expected class indices "
            "(int64), because score has `ways`: use y.long()"
        )
    if len(y) and not (int(y.min()) >= PADDING and int(y.max()) < ways):
        raise InputError(
            f"tasks.type: draw returned {name}.y with classes from {int(y.min())} to {int(y.max())}, expected 0 to "
            f"{ways - 1} (score.ways = {ways})"
        )
