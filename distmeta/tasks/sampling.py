"""Which examples an episode shows: classes, drawings, their order.

Shapes: T tasks, W ways, S shots, Q queries a class, n = S + Q drawings a class.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from distmeta.errors import InputError
from distmeta.protocols import PADDING
from distmeta.seeding import uniforms

SIZES, ORDER = 1, 2
"""Parts of a task's random numbers, beside those that choose its classes and drawings."""


class ClassEntry(NamedTuple):
    """A class of a split: which rows of the images, turned how often by 90° counter-clockwise."""

    rows: Sequence[int] | np.ndarray
    quarter_turns: int = 0
    group: int = 0
    name: str = ""
    query_rows: Sequence[int] | np.ndarray | None = None
    """Rows that queries are drawn from, where they are other images of the same drawings, in the same order: in an
    episode no drawing is in both parts. None: `rows`."""


class Setting(NamedTuple):
    """The size of an episode: the largest, and where tasks differ the smallest."""

    ways: int
    shots: int
    queries: int
    min_ways: int
    min_shots: int


class Table(NamedTuple):
    """The classes of one split as arrays: one entry a class, but for `row`, `members` and the groups'."""

    setting: Setting
    row: np.ndarray
    """Rows of the images; those of class k are the `count[k]` from `start[k]` on."""
    query_row: np.ndarray
    """The rows of the same drawings for the query."""
    start: np.ndarray
    count: np.ndarray
    turns: np.ndarray
    members: np.ndarray
    """Classes; those of eligible group g are the `group_count[g]` from `group_start[g]` on."""
    group_start: np.ndarray
    group_count: np.ndarray


class Drawn(NamedTuple):
    """What a draw chose, (support, query) each [T, N]: rows of the images, quarter turns, labels."""

    rows: tuple[np.ndarray, np.ndarray]
    turns: tuple[np.ndarray, np.ndarray]
    labels: tuple[np.ndarray, np.ndarray]


def draw_rows(table: Table, ids: Any, shuffled: bool, unbalanced: bool) -> Drawn:
    """The examples of each task: the same in any order, and of smaller tasks some of them."""
    ways, shots, queries, min_ways, min_shots = table.setting
    T, n = len(ids), shots + queries
    group_T1, class_T2W, drawing_T2Wn = np.split(
        uniforms(ids, 1 + 2 * ways + 2 * ways * n), [1, 1 + 2 * ways], axis=1
    )
    group_T = (group_T1[:, 0] * len(table.group_start)).astype(np.int64)
    position_TW = distinct(table.group_count[group_T], class_T2W.reshape(T, 2, ways))
    class_TW = table.members[table.group_start[group_T][:, None] + position_TW]
    drawing_TWn = distinct(table.count[class_TW], drawing_T2Wn.reshape(T, ways, 2, n))
    way_TnW = np.tile(np.arange(ways), (T, n, 1))
    label_TnW = way_TnW
    if min_ways < ways or min_shots < shots:
        sizes_TW1 = uniforms(ids, ways + 1, SIZES)
        way_TnW, drawing_TWn, label_TnW = _smaller(
            table.setting, drawing_TWn, sizes_TW1[:, :1], sizes_TW1[:, 1:], unbalanced
        )
    class_TnW = np.take_along_axis(class_TW[:, None, :], way_TnW, 2)
    drawing_TnW = np.take_along_axis(drawing_TWn.swapaxes(1, 2), way_TnW, 2)
    place_TnW = table.start[class_TnW] + drawing_TnW
    turns_TnW = table.turns[class_TnW]
    orders: list[np.ndarray] = []
    if shuffled:
        support_TN, query_TN = np.split(uniforms(ids, n * ways, ORDER), [shots * ways], axis=1)
        orders = [half_TN.argsort(1, kind="stable") for half_TN in (support_TN, query_TN)]

    def halves(support: np.ndarray, query: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        flat = (
            support[:, :shots].reshape(T, shots * ways).copy(),
            query[:, shots:].reshape(T, queries * ways).copy(),
        )
        if not orders:
            return flat
        first, second = (np.take_along_axis(a, order, 1) for a, order in zip(flat, orders, strict=True))
        return first, second

    return Drawn(
        halves(table.row[place_TnW], table.query_row[place_TnW]),
        halves(turns_TnW, turns_TnW),
        halves(label_TnW, label_TnW),
    )


def _smaller(
    setting: Setting, drawing_TWn: np.ndarray, ways_T1: np.ndarray, shots_TW: np.ndarray, unbalanced: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which way each place shows [T, n, W], which drawing [T, W, n], and its label: places beyond a task's own number
    of ways or shots repeat what it has, with the label `PADDING`.

    The last two arguments before `unbalanced` are uniform on [0, 1).
    """
    ways, shots, queries, min_ways, min_shots = setting
    T, n = len(drawing_TWn), shots + queries
    has_ways_T1 = min_ways + (ways_T1 * (ways - min_ways + 1)).astype(np.int64)
    shots_TW = shots_TW if unbalanced else np.broadcast_to(shots_TW[:, :1], (T, ways))
    has_shots_TW = min_shots + (shots_TW * (shots - min_shots + 1)).astype(np.int64)
    way_TW = np.arange(ways) % has_ways_T1
    place_n = np.arange(n)
    shown_TWn = np.where(place_n < shots, place_n % has_shots_TW[..., None], place_n)
    spare_TWn = (place_n < shots) & (place_n >= has_shots_TW[..., None])
    spare_TWn = spare_TWn | (np.arange(ways) >= has_ways_T1)[..., None]
    label_TWn = np.where(spare_TWn, PADDING, np.arange(ways)[:, None])
    way_TnW = np.broadcast_to(way_TW[:, None, :], (T, n, ways))
    return way_TnW, np.take_along_axis(drawing_TWn, shown_TWn, 2), label_TWn.swapaxes(1, 2)


def distinct(counts: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
    """n different integers below each count, every ordered choice equally likely.

    counts int [...], uniforms [..., 2, n] in [0, 1) -> int64 [..., n]. Floyd's algorithm gives a uniform
    subset at a cost that does not grow with the counts; sorting n further uniforms shuffles it. Reference:
    Bentley & Floyd 1987, "A sample of brilliance".
    """
    n = uniforms.shape[-1]
    picked = np.empty((*uniforms.shape[:-2], n), np.int64)
    for i in range(n):
        last = counts - n + i
        candidate = (uniforms[..., 0, i] * (last + 1)).astype(np.int64)
        taken = (picked[..., :i] == candidate[..., None]).any(-1)
        picked[..., i] = np.where(taken, last, candidate)
    return np.take_along_axis(picked, uniforms[..., 1, :].argsort(-1, kind="stable"), -1)


def table_of(
    split: str, entries: Sequence[ClassEntry], setting: Setting, ways_field: str, within_group: bool
) -> Table:
    """The split as arrays, after checking that it can give an episode of this setting."""
    counts = np.array([len(entry.rows) for entry in entries], np.int64)
    groups = np.array([entry.group if within_group else 0 for entry in entries], np.int64)
    _, sizes = np.unique(groups, return_counts=True)
    most = int(sizes.max(initial=0))
    if most < setting.ways:
        whose = f"the {split} split has {most} classes"
        if within_group:
            whose = f"with tasks.within_group, the largest group of the {split} split has {most} classes"
        raise InputError(
            f"tasks.{ways_field}: got {setting.ways}, expected at most {most} ({whose}): "
            + ("lower tasks.ways" if split == "train" else "lower tasks.ways or tasks.eval_ways")
        )
    needed, fewest = setting.shots + setting.queries, int(counts.argmin())
    if counts[fewest] < needed:
        name = entries[fewest].name or str(fewest)
        prefix = "" if split == "train" else "eval_"
        raise InputError(
            f"tasks.{prefix}shots + tasks.{prefix}queries: got {needed}, expected at most {counts[fewest]} "
            f"(class {name!r} of the {split} split has {counts[fewest]} drawings): "
            "lower tasks.shots or tasks.queries"
            + ("" if split == "train" else ", or tasks.eval_shots or tasks.eval_queries")
        )
    members = groups.argsort(kind="stable")
    eligible = sizes >= setting.ways
    return Table(
        setting=setting,
        row=np.concatenate([np.asarray(entry.rows, np.int64) for entry in entries]),
        query_row=np.concatenate([_query_rows(entry) for entry in entries]),
        start=counts.cumsum() - counts,
        count=counts,
        turns=np.array([entry.quarter_turns % 4 for entry in entries], np.int64),
        members=members,
        group_start=(sizes.cumsum() - sizes)[eligible],
        group_count=sizes[eligible],
    )


def _query_rows(entry: ClassEntry) -> np.ndarray:
    rows = np.asarray(entry.rows if entry.query_rows is None else entry.query_rows, np.int64)
    assert len(rows) == len(entry.rows), (entry.name, len(rows), len(entry.rows))
    return rows
