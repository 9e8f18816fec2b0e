"""Which examples an episode shows: its classes, its drawings, and their order.

Shapes: T tasks, W ways, S shots, Q queries per class, n = S + Q drawings per class.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from distmeta.errors import InputError
from distmeta.protocols import PADDING
from distmeta.seeding import draw_uniforms

SIZES = 1
"""The part of a task's random numbers that chooses its ways and shots. Part 0 chooses classes and drawings."""
ORDER = 2
"""The part that chooses the order of rows."""


class ClassEntry(NamedTuple):
    """A class of a split: rows of the images, all turned by the same angle."""

    rows: Sequence[int] | np.ndarray
    quarter_turns: int = 0
    """Turns of 90° counter-clockwise."""
    group: int = 0
    name: str = ""
    query_rows: Sequence[int] | np.ndarray | None = None
    """Rows for the query set if they are other images than `rows`: of the same drawings, in the same order. In an
    episode no drawing is in both the support and the query set."""


class EpisodeSettings(NamedTuple):
    """The size of an episode. If the sizes of tasks differ, the first three are the largest ones."""

    ways: int
    shots: int
    queries: int
    min_ways: int
    min_shots: int


class ClassTable(NamedTuple):
    """The classes of one split as arrays."""

    settings: EpisodeSettings
    row: np.ndarray
    """Rows of the images. Class k has the `count[k]` entries from `start[k]` on."""
    query_row: np.ndarray
    """Rows for the query set, in the same order."""
    start: np.ndarray
    count: np.ndarray
    turns: np.ndarray
    """Quarter turns of each class."""
    members: np.ndarray
    """Classes by group. Group g has the `group_count[g]` entries from `group_start[g]` on."""
    group_start: np.ndarray
    group_count: np.ndarray


class RowSelection(NamedTuple):
    """The drawn rows of each task. Every field is a pair (support [T, S·W], query [T, Q·W])."""

    rows: tuple[np.ndarray, np.ndarray]
    turns: tuple[np.ndarray, np.ndarray]
    labels: tuple[np.ndarray, np.ndarray]


def draw_rows(table: ClassTable, ids: Any, shuffle: bool, unbalanced: bool) -> RowSelection:
    """Draw the examples of each task.

    A smaller task has some of the examples that a full one with the same id would have. With `shuffle` a task has the
    same examples in another order.
    """
    settings = table.settings
    ways = settings.ways
    shots = settings.shots
    n = shots + settings.queries
    T = len(ids)
    # Uniform numbers of a task: 1 for its group, 2 W for its classes, 2 W n for their drawings.
    group_T1, class_T2W, drawing_T2Wn = np.split(
        draw_uniforms(ids, 1 + 2 * ways + 2 * ways * n), [1, 1 + 2 * ways], axis=1
    )
    group_T = (group_T1[:, 0] * len(table.group_start)).astype(np.int64)
    position_TW = draw_distinct(table.group_count[group_T], class_T2W.reshape(T, 2, ways))
    class_TW = table.members[table.group_start[group_T][:, None] + position_TW]
    drawing_TWn = draw_distinct(table.count[class_TW], drawing_T2Wn.reshape(T, ways, 2, n))
    way_TnW = np.tile(np.arange(ways), (T, n, 1))
    label_TnW = way_TnW
    if settings.min_ways < ways or settings.min_shots < shots:
        sizes_TW1 = draw_uniforms(ids, ways + 1, SIZES)
        way_TnW, drawing_TWn, label_TnW = _shrink_tasks(
            settings, drawing_TWn, sizes_TW1[:, :1], sizes_TW1[:, 1:], unbalanced
        )
    class_TnW = np.take_along_axis(class_TW[:, None, :], way_TnW, 2)
    drawing_TnW = np.take_along_axis(drawing_TWn.swapaxes(1, 2), way_TnW, 2)
    position_TnW = table.start[class_TnW] + drawing_TnW
    turns_TnW = table.turns[class_TnW]
    order = _draw_order(ids, shots * ways, n * ways) if shuffle else None

    def flatten(support_TnW: np.ndarray, query_TnW: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        support_TN = support_TnW[:, :shots].reshape(T, shots * ways)
        query_TN = query_TnW[:, shots:].reshape(T, settings.queries * ways)
        if order is None:
            return support_TN.copy(), query_TN.copy()
        return np.take_along_axis(support_TN, order[0], 1), np.take_along_axis(query_TN, order[1], 1)

    return RowSelection(
        rows=flatten(table.row[position_TnW], table.query_row[position_TnW]),
        turns=flatten(turns_TnW, turns_TnW),
        labels=flatten(label_TnW, label_TnW),
    )


def _draw_order(ids: Any, support: int, total: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw a permutation of the support rows [T, support] and one of the query rows [T, total - support]."""
    support_TN, query_TN = np.split(draw_uniforms(ids, total, ORDER), [support], axis=1)
    return support_TN.argsort(1, kind="stable"), query_TN.argsort(1, kind="stable")


def _shrink_tasks(
    settings: EpisodeSettings,
    drawing_TWn: np.ndarray,
    ways_T1: np.ndarray,
    shots_TW: np.ndarray,
    unbalanced: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Give each task its own number of ways and shots. Places left over repeat other rows, with the label `PADDING`.

    Args:
        ways_T1, shots_TW: uniform on [0, 1).
        unbalanced: each class has its own number of shots.

    Returns:
        The way that each place shows [T, n, W], its drawing [T, W, n], and its label [T, n, W].
    """
    ways, shots, queries, min_ways, min_shots = settings
    T = len(drawing_TWn)
    n = shots + queries
    task_ways_T1 = min_ways + (ways_T1 * (ways - min_ways + 1)).astype(np.int64)
    if not unbalanced:
        shots_TW = np.broadcast_to(shots_TW[:, :1], (T, ways))
    class_shots_TW = min_shots + (shots_TW * (shots - min_shots + 1)).astype(np.int64)
    way_TW = np.arange(ways) % task_ways_T1
    place_n = np.arange(n)
    shown_TWn = np.where(place_n < shots, place_n % class_shots_TW[..., None], place_n)
    extra_shot_TWn = (place_n < shots) & (place_n >= class_shots_TW[..., None])
    extra_way_TW = np.arange(ways) >= task_ways_T1
    padding_TWn = extra_shot_TWn | extra_way_TW[..., None]
    label_TWn = np.where(padding_TWn, PADDING, np.arange(ways)[:, None])
    way_TnW = np.broadcast_to(way_TW[:, None, :], (T, n, ways))
    return way_TnW, np.take_along_axis(drawing_TWn, shown_TWn, 2), label_TWn.swapaxes(1, 2)


def draw_distinct(counts: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """Draw n different integers below each count. Every ordered choice is equally likely.

    Floyd's algorithm gives a uniform subset, at a cost that does not grow with the counts. Sorting n more uniform
    numbers shuffles it. Reference: Bentley & Floyd 1987, "A sample of brilliance".

    Args:
        counts: int [...].
        unit: uniform on [0, 1), [..., 2, n].

    Returns:
        int64 [..., n].
    """
    n = unit.shape[-1]
    picked = np.empty((*unit.shape[:-2], n), np.int64)
    for i in range(n):
        last = counts - n + i
        candidate = (unit[..., 0, i] * (last + 1)).astype(np.int64)
        taken = (picked[..., :i] == candidate[..., None]).any(-1)
        picked[..., i] = np.where(taken, last, candidate)
    return np.take_along_axis(picked, unit[..., 1, :].argsort(-1, kind="stable"), -1)


def build_class_table(
    split: str, entries: Sequence[ClassEntry], settings: EpisodeSettings, ways_field: str, within_group: bool
) -> ClassTable:
    """Return the classes of a split as arrays.

    Args:
        ways_field: the option that gave the ways, for the error.
        within_group: all classes of a task come from one group.

    Raises:
        InputError: the split has too few classes, or a class too few drawings, for an episode of these settings.
    """
    counts = np.array([len(entry.rows) for entry in entries], np.int64)
    groups = np.array([entry.group if within_group else 0 for entry in entries], np.int64)
    _, group_sizes = np.unique(groups, return_counts=True)
    _check_ways(split, int(group_sizes.max(initial=0)), settings, ways_field, within_group)
    _check_drawings(split, entries, counts, settings)
    eligible = group_sizes >= settings.ways
    return ClassTable(
        settings=settings,
        row=np.concatenate([np.asarray(entry.rows, np.int64) for entry in entries]),
        query_row=np.concatenate([_list_query_rows(entry) for entry in entries]),
        start=counts.cumsum() - counts,
        count=counts,
        turns=np.array([entry.quarter_turns % 4 for entry in entries], np.int64),
        members=groups.argsort(kind="stable"),
        group_start=(group_sizes.cumsum() - group_sizes)[eligible],
        group_count=group_sizes[eligible],
    )


def _check_ways(
    split: str, most: int, settings: EpisodeSettings, ways_field: str, within_group: bool
) -> None:
    if most >= settings.ways:
        return
    limit = f"the {split} split has {most} classes"
    if within_group:
        limit = f"with tasks.within_group, the largest group of the {split} split has {most} classes"
    remedy = "lower tasks.ways"
    if split != "train":
        remedy += f" or tasks.eval_ways, or hold out more classes (tasks.{split} of a store or of texts)"
    raise InputError(f"tasks.{ways_field}: got {settings.ways}, expected at most {most} ({limit}): {remedy}")


def _check_drawings(
    split: str, entries: Sequence[ClassEntry], counts: np.ndarray, settings: EpisodeSettings
) -> None:
    needed = settings.shots + settings.queries
    smallest = int(counts.argmin())
    count = counts[smallest]
    if count >= needed:
        return
    name = entries[smallest].name or str(smallest)
    prefix = "" if split == "train" else "eval_"
    remedy = "lower tasks.shots or tasks.queries"
    if split != "train":
        remedy += ", or tasks.eval_shots or tasks.eval_queries"
    raise InputError(
        f"tasks.{prefix}shots + tasks.{prefix}queries: got {needed}, expected at most {count} "
        f"(class {name!r} of the {split} split has {count} drawings): {remedy}"
    )


def _list_query_rows(entry: ClassEntry) -> np.ndarray:
    rows = np.asarray(entry.rows if entry.query_rows is None else entry.query_rows, np.int64)
    assert len(rows) == len(entry.rows), (entry.name, len(rows), len(entry.rows))
    return rows
