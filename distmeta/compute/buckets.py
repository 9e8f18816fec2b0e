"""Tasks of unequal shapes: tasks of the same shape are computed together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch

from distmeta.errors import InputError
from distmeta.protocols import Episode, Episodes
from distmeta.trees import tree_flatten, tree_map


class Bucket(NamedTuple):
    """Tasks whose episodes have the same shapes and dtypes."""

    episodes: Episode
    """Stacked, leaves [T, ...]."""
    positions: Sequence[int]
    """Their positions among all tasks, [T]."""


def stack_if_equal(episodes: list[Episode], tasks: int) -> Episodes:
    """Return the episodes that `draw` returned as a list: stacked if they all have the same shapes.

    Raises:
        InputError: the list does not have one episode per task.
    """
    if len(episodes) != tasks:
        raise InputError(
            f"tasks.type: draw returned {len(episodes)} episodes, expected one for each of {tasks} tasks"
        )
    shapes = {_describe_shape(episode) for episode in episodes}
    return _stack(episodes) if len(shapes) == 1 else episodes


def group_by_shape(episodes: list[Episode], group_size: int) -> list[Bucket]:
    """Sort whole groups of tasks by their shapes, in the order in which the shapes first occur.

    Raises:
        InputError: the tasks of a group differ in shape.
    """
    positions_by_shape: dict[Any, list[int]] = {}
    for start in range(0, len(episodes), group_size):
        group = range(start, start + group_size)
        shapes = {_describe_shape(episodes[i]) for i in group}
        if len(shapes) > 1:
            raise InputError(
                f"tasks.type: got unequal shapes for tasks {start} and {start + group_size - 1} of a shard, expected "
                f"equal ones: the algorithm compares {group_size} tasks at a time; pad them, or use another algorithm"
            )
        positions_by_shape.setdefault(shapes.pop(), []).extend(group)
    return [
        Bucket(_stack(episodes[i] for i in positions), positions) for positions in positions_by_shape.values()
    ]


def _stack(episodes: Iterable[Episode]) -> Episode:
    return tree_map(lambda *leaves: torch.stack(leaves), *episodes)


def _describe_shape(episode: Episode) -> Any:
    """Return what must be equal for episodes to be stacked: structure, shapes and dtypes."""
    leaves, structure = tree_flatten(episode)
    return str(structure), *((tuple(leaf.shape), leaf.dtype) for leaf in leaves)
