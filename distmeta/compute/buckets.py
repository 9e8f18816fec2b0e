"""Tasks of unequal shapes: those of one shape are computed together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils._pytree import tree_flatten, tree_map

from distmeta.errors import InputError
from distmeta.protocols import Episode, Episodes, TaskFamily


class Bucket(NamedTuple):
    """Tasks whose episodes have the same shapes and dtypes."""

    episodes: Episode
    """Stacked, [T, ...]."""
    positions: Sequence[int]
    """Where they are among all tasks, [T]."""


def drawn(family: TaskFamily, split: str, ids: np.ndarray) -> Episodes:
    """What the family draws; stacked over tasks where all are alike.

    Raises:
        InputError: it drew a list of another length.
    """
    episodes = family.draw(split, ids)
    if not isinstance(episodes, list):
        return episodes
    if len(episodes) != len(ids):
        raise InputError(
            f"tasks.type: draw gave {len(episodes)} episodes, expected one for each of {len(ids)} tasks"
        )
    alike = len({_shape(episode) for episode in episodes}) == 1
    return _stacked(episodes) if alike else episodes


def buckets(episodes: Episodes, size: int = 1) -> list[Bucket]:
    """The tasks, whole groups of `size`, by their shapes: in the order in which a shape is first met.

    Raises:
        InputError: the tasks of a group differ in shape.
    """
    if not isinstance(episodes, list):
        count = len(tree_flatten(episodes)[0][0])
        return [Bucket(episodes, range(count))]
    found: dict[Any, list[int]] = {}
    for start in range(0, len(episodes), size):
        group = range(start, start + size)
        shapes = {_shape(episodes[i]) for i in group}
        if len(shapes) > 1:
            raise InputError(
                f"tasks.type: got unequal shapes for tasks {start} and {start + size - 1} of a shard, expected equal "
                f"ones: the algorithm compares {size} tasks at a time; pad them, or use another algorithm"
            )
        found.setdefault(shapes.pop(), []).extend(group)
    return [Bucket(_stacked(episodes[i] for i in positions), positions) for positions in found.values()]


def in_order(rows: np.ndarray, positions: Sequence[int]) -> np.ndarray:
    """Rows that stand bucket by bucket, in the order of the tasks."""
    ordered = np.empty_like(rows)
    ordered[np.asarray(positions)] = rows
    return ordered


def _stacked(episodes: Iterable[Episode]) -> Episode:
    return tree_map(lambda *leaves: torch.stack(leaves), *episodes)


def _shape(episode: Episode) -> Any:
    """What must be equal for episodes to be stacked."""
    leaves, spec = tree_flatten(episode)
    return str(spec), *((tuple(leaf.shape), leaf.dtype) for leaf in leaves)
