"""N-way K-shot classification over one array of images (Lake et al. 2015; Vinyals et al. 2016).

Shapes: T tasks, W ways, S shots, Q queries a class, n = S + Q drawings a class; images C, H, W.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple, final

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from distmeta.core import SPLITS, Batch, Episode, InputError, Metrics, Score
from distmeta.seeding import task_generator
from distmeta.tasks.images import Preparation, unit

Ways = Annotated[int, Field(ge=2)]
Count = Annotated[int, Field(ge=1)]


class ClassEntry(NamedTuple):
    """A class of a split: which rows of the images, turned how often by 90° counter-clockwise."""

    rows: Sequence[int] | np.ndarray
    quarter_turns: int = 0
    group: int = 0
    name: str = ""


class Setting(NamedTuple):
    """The size of an episode."""

    ways: int
    shots: int
    queries: int


class _Table(NamedTuple):
    """The classes of one split as arrays: one entry a class, but for `row`, `members` and the groups'."""

    setting: Setting
    row: np.ndarray
    """Rows of the images; those of class k are the `count[k]` from `start[k]` on."""
    start: np.ndarray
    count: np.ndarray
    turns: np.ndarray
    members: np.ndarray
    """Classes; those of eligible group g are the `group_count[g]` from `group_start[g]` on."""
    group_start: np.ndarray
    group_count: np.ndarray


@final
class FewShot:
    """The N-way K-shot sampler: W distinct classes, S + Q distinct drawings of each, without replacement.

    Rows are shot-major (row = shot · W + way), in the support and in the query; y is the class's position in
    the draw, so a class has another label in each task. With `within_group` the classes of a task come from
    one group, uniform among those with enough classes. val and test use `eval_ways`, `eval_shots`,
    `eval_queries` (default: the training ones); `scorer(split)` is the score to use with each.

    images: uint8 or float [N, C, H, W], in memory or memory-mapped, gathered once a draw and multiplied by
    `scale`. A family is made from the job on each worker; pickling one copies its images.
    Raises InputError where a split cannot give such an episode, or splits share an (image, rotation).
    """

    def __init__(
        self,
        images: np.ndarray,
        splits: Mapping[str, Sequence[ClassEntry]],
        *,
        ways: int,
        shots: int,
        queries: int,
        eval_ways: int | None = None,
        eval_shots: int | None = None,
        eval_queries: int | None = None,
        within_group: bool = False,
        scale: float = 1 / 255,
        preparation: Preparation | None = None,
    ) -> None:
        given = {"ways": eval_ways, "shots": eval_shots, "queries": eval_queries}
        training = Setting(ways, shots, queries)
        evaluation = Setting(*(b if a is None else a for a, b in zip(given.values(), training, strict=True)))
        for name in Setting._fields:
            for field, setting in ((name, training), (f"eval_{name}", evaluation)):
                if getattr(setting, name) < 1:
                    raise InputError(f"tasks.{field}: got {getattr(setting, name)}, expected at least 1")
        if evaluation.ways > ways:
            raise InputError(
                f"tasks.eval_ways: got {eval_ways}, expected at most {ways} (tasks.ways, the outputs that "
                "the model trains): raise tasks.ways or lower tasks.eval_ways"
            )
        assert set(splits) == set(SPLITS), splits.keys()
        field = "ways" if eval_ways is None else "eval_ways"
        self._images, self._scale = images, scale
        self._tables = {
            "train": _table("train", splits["train"], training, "ways", within_group),
            "val": _table("val", splits["val"], evaluation, field, within_group),
            "test": _table("test", splits["test"], evaluation, field, within_group),
        }
        _check_disjoint(splits)
        _check_turns(images.shape, self._tables)
        self.in_shape: tuple[int, ...] = tuple(images.shape[1:])
        self.out_features = ways
        self.ways, self.shots, self.queries = training
        self.eval_ways, self.eval_shots, self.eval_queries = evaluation
        self.preparation = preparation

    def draw(self, split: str, ids: Any) -> Episode:
        """Episodes of the tasks `ids` (uint64 [T]).

        x float32 [T, S·W, C, H, W] and [T, Q·W, C, H, W]; y int64 [T, S·W] and [T, Q·W].
        """
        table = self._tables[split]
        (ways, shots, _), T = table.setting, len(ids)
        rows_TnW, turns_TnW = _draw_rows(table, ids)

        def part(drawings: slice) -> tuple[np.ndarray, np.ndarray, Tensor]:
            rows, turns = rows_TnW[:, drawings], turns_TnW[:, drawings]
            return rows.ravel(), turns.ravel(), torch.arange(ways).repeat(T, rows.shape[1])

        rows_s, turns_s, y_s = part(slice(0, shots))
        rows_q, turns_q, y_q = part(slice(shots, None))
        # One gather for all: support rows first, so that both parts are contiguous.
        x = _gather(self._images, np.concatenate([rows_s, rows_q]), np.concatenate([turns_s, turns_q]))
        x = torch.from_numpy(unit(x, self._scale))
        x_s, x_q = x[: len(rows_s)], x[len(rows_s) :]
        shape = self.in_shape
        return Episode(
            Batch(x_s.view(*y_s.shape, *shape), y_s),
            Batch(x_q.view(*y_q.shape, *shape), y_q),
        )

    def score(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Metrics]:
        """`classification_score` of a training episode."""
        return classification_score(outputs, batch, self.ways)

    def scorer(self, split: str) -> Score:
        """The score for episodes of a split: val and test have `eval_ways`, and other outputs are masked."""
        return functools.partial(classification_score, ways=self._tables[split].setting.ways)


def classification_score(outputs: Tensor, batch: Batch, ways: int) -> tuple[Tensor, Metrics]:
    """Mean cross entropy and accuracy over the first `ways` outputs; the others are masked.

    outputs [N, >= ways], batch.y int64 [N]. Differentiable to any order, and vmappable.
    """
    if outputs.shape[-1] < ways:
        raise InputError(
            f"ways: got {ways}, expected at most {outputs.shape[-1]} (the outputs of the model's head): "
            "train with tasks.ways of at least the ways asked, or use a metric method such as protonet"
        )
    logits = outputs[..., :ways]
    accuracy = (logits.argmax(-1) == batch.y).float().mean()
    return F.cross_entropy(logits, batch.y), {"accuracy": accuracy}


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


def _draw_rows(table: _Table, ids: Any) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the images and quarter turns of each task's examples, [T, n, W]; one random call a task."""
    ways, shots, queries = table.setting
    T, n = len(ids), shots + queries
    uniforms = np.empty((T, 1 + 2 * ways + 2 * ways * n))
    for row, task_id in zip(uniforms, ids, strict=True):
        row[:] = task_generator(task_id).random(uniforms.shape[1])
    group_T = (uniforms[:, 0] * len(table.group_start)).astype(np.int64)
    position_TW = distinct(table.group_count[group_T], uniforms[:, 1 : 1 + 2 * ways].reshape(T, 2, ways))
    class_TW = table.members[table.group_start[group_T][:, None] + position_TW]
    drawing_TWn = distinct(table.count[class_TW], uniforms[:, 1 + 2 * ways :].reshape(T, ways, 2, n))
    rows_TWn = table.row[table.start[class_TW][..., None] + drawing_TWn]
    turns_TnW = np.broadcast_to(table.turns[class_TW][:, None, :], (T, n, ways))
    return rows_TWn.swapaxes(1, 2), turns_TnW


def _gather(images: np.ndarray, rows: np.ndarray, turns: np.ndarray) -> np.ndarray:
    """A copy of the rows, [R, C, H, W], each turned as told; one rotation for each angle."""
    pixels = images[rows]
    for quarter_turns in (1, 2, 3):
        turned = np.flatnonzero(turns == quarter_turns)
        if len(turned):
            pixels[turned] = np.rot90(pixels[turned], quarter_turns, axes=(2, 3))
    return pixels


def _table(
    split: str, entries: Sequence[ClassEntry], setting: Setting, ways_field: str, within_group: bool
) -> _Table:
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
    return _Table(
        setting=setting,
        row=np.concatenate([np.asarray(entry.rows, np.int64) for entry in entries]),
        start=counts.cumsum() - counts,
        count=counts,
        turns=np.array([entry.quarter_turns % 4 for entry in entries], np.int64),
        members=members,
        group_start=(sizes.cumsum() - sizes)[eligible],
        group_count=sizes[eligible],
    )


def _check_disjoint(splits: Mapping[str, Sequence[ClassEntry]]) -> None:
    """No (image, rotation) in two splits, nor in two classes of one."""
    keys = {
        split: np.concatenate([np.asarray(e.rows, np.int64) * 4 + e.quarter_turns % 4 for e in entries])
        for split, entries in splits.items()
    }
    for split, key in keys.items():
        if len(np.unique(key)) < len(key):
            raise InputError(
                f"tasks: got a drawing twice in the {split} split, expected each in one class and once"
            )
    for a, b in (("train", "val"), ("train", "test"), ("val", "test")):
        shared = len(np.intersect1d(keys[a], keys[b], assume_unique=True))
        if shared:
            raise InputError(f"tasks: got {shared} drawings in both {a} and {b}, expected disjoint splits")


def _check_turns(shape: Sequence[int], tables: Mapping[str, _Table]) -> None:
    """A quarter turn keeps the shape of square images alone."""
    if shape[-1] != shape[-2] and any((table.turns % 2).any() for table in tables.values()):
        raise InputError(f"tasks.rotations: got images of {shape[-2]}x{shape[-1]}, expected square ones")
