"""N-way K-shot classification over one array of images (Lake et al. 2015; Vinyals et al. 2016).

Shapes: T tasks, W ways, S shots, Q queries a class, n = S + Q drawings a class; images C, H, W.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Annotated, Any, Literal, final

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from distmeta.errors import InputError
from distmeta.protocols import PADDING, SPLITS, Batch, Episode, Metrics, Score, one_hot
from distmeta.tasks import jitter as warps
from distmeta.tasks.image_preparation import Preparation, unit
from distmeta.tasks.sampling import ClassEntry, Setting, Table, draw_rows, table_of

Ways = Annotated[int, Field(ge=2)]
Count = Annotated[int, Field(ge=1)]


Order = Literal["shots", "random"]


@final
class FewShot:
    """The N-way K-shot sampler: W distinct classes, S + Q distinct drawings of each, without replacement.

    Rows are shot-major (row = shot · W + way), in the support and in the query, or with `order: random` in an order
    drawn with the task (what a learner that reads one row after the other needs). y is the class's position in the
    draw, so a class has another label in each task. With `within_group` the classes of a task come from one group,
    uniform among those with enough classes. val and test use `eval_ways`, `eval_shots`, `eval_queries` (default: the
    training ones); `scorer(split)` is the score to use with each.

    With `min_ways` a training task has between `min_ways` and `ways` classes, with `min_shots` between `min_shots` and
    `shots` support drawings (`unbalanced`: each of its classes by itself), all equally likely. Such tasks are filled up
    to full size with rows that repeat their own and have the class index `PADDING`: they count
    nowhere but in the statistics of a batch norm.

    splits: the classes of train, and of val and test where there are such; tasks of a split that is not there are
    refused when they are drawn.

    With `jitter` each training image, of support and query, is warped by itself (`tasks.jitter`).

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
        min_ways: int | None = None,
        min_shots: int | None = None,
        unbalanced: bool = False,
        order: Order = "shots",
        within_group: bool = False,
        jitter: warps.Jitter | None = None,
        scale: float = 1 / 255,
        preparation: Preparation | None = None,
        check: Callable[[], None] = lambda: None,
        fingerprint: str | None = None,
    ) -> None:
        given = {"ways": eval_ways, "shots": eval_shots, "queries": eval_queries}
        largest = {"ways": ways, "shots": shots, "queries": queries}
        evaluation = {name: largest[name] if value is None else value for name, value in given.items()}
        for name in largest:
            for field, sizes in ((name, largest), (f"eval_{name}", evaluation)):
                if sizes[name] < 1:
                    raise InputError(f"tasks.{field}: got {sizes[name]}, expected at least 1")
        smallest = {
            "min_ways": _smallest("min_ways", min_ways, 2, "ways", ways),
            "min_shots": _smallest("min_shots", min_shots, 1, "shots", shots),
        }
        if unbalanced and min_shots is None:
            raise InputError(
                "tasks.unbalanced: got true without tasks.min_shots, expected the smallest number too"
            )
        training = Setting(**largest, **smallest)
        fixed = Setting(**evaluation, min_ways=evaluation["ways"], min_shots=evaluation["shots"])
        assert {"train"} <= set(splits) <= set(SPLITS), splits.keys()
        field = "ways" if eval_ways is None else "eval_ways"
        self._images, self._scale, self._order, self._unbalanced = images, scale, order, unbalanced
        self._jitter, self._check = jitter, check
        self._settings = {"train": training, "val": fixed, "test": fixed}
        self._tables = {
            split: table_of(
                split, entries, self._settings[split], "ways" if split == "train" else field, within_group
            )
            for split, entries in splits.items()
        }
        _check_disjoint(splits)
        _check_turns(images.shape, self._tables)
        self.in_shape: tuple[int, ...] = tuple(images.shape[1:])
        self.out_features = ways
        self.ways, self.shots, self.queries = ways, shots, queries
        self.eval_ways, self.eval_shots, self.eval_queries = evaluation.values()
        self.preparation, self.fingerprint = preparation, fingerprint
        self.score: Score = self.scorer("train")
        """`ClassificationScore` of a training episode."""

    def draw(self, split: str, ids: Any) -> Episode:
        """Episodes of the tasks `ids` (uint64 [T]).

        x float32 [T, S·W, C, H, W] and [T, Q·W, C, H, W]; y int64 [T, S·W] and [T, Q·W].
        """
        if split not in self._tables:
            raise InputError(f"tasks.{split}: got null, expected classes held out to draw {split} tasks from")
        table = self._tables[split]
        drawn = draw_rows(table, ids, self._order == "random", self._unbalanced)
        # One gather for all: support rows first, so that both parts are contiguous.
        rows, turns = (np.concatenate([s.ravel(), q.ravel()]) for s, q in (drawn.rows, drawn.turns))
        self._check()  # before, for a file cut short would end the process; and after, for what was just read
        x = torch.from_numpy(unit(_gather(self._images, rows, turns), self._scale))
        self._check()
        y_s, y_q = (torch.from_numpy(y) for y in drawn.labels)
        if self._jitter is not None and split == "train":
            x = warps.jittered(x, self._jitter, ids, y_s.shape[1])
        x_s, x_q = x[: y_s.numel()], x[y_s.numel() :]
        return Episode(
            Batch(x_s.view(*y_s.shape, *self.in_shape), y_s),
            Batch(x_q.view(*y_q.shape, *self.in_shape), y_q),
        )

    def scorer(self, split: str) -> Score:
        """The score for episodes of a split: val and test have `eval_ways`, and other outputs are masked."""
        setting = self._settings[split]
        return ClassificationScore(setting.ways, absent=setting.min_ways < setting.ways)


@final
@dataclass(frozen=True)
class ClassificationScore:
    """Mean cross entropy and accuracy over the first `ways` outputs; the others are masked, and so is padding.

    outputs [N, >= ways], batch.y int64 [N]. With `absent`, classes without a row in the batch are masked as well
    (tasks that fill fewer ways). Differentiable to any order, and vmappable.
    """

    ways: int
    absent: bool = False

    def __call__(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Metrics]:
        if outputs.shape[-1] < self.ways:
            raise InputError(
                f"ways: got {self.ways}, expected at most {outputs.shape[-1]} (the outputs of the model's head): "
                "train with model.head=shared or a metric method such as protonet, whose ways are free, or with "
                "tasks.ways of at least the ways asked"
            )
        logits = outputs[..., : self.ways]
        if self.absent:
            present_W = one_hot(batch.y, self.ways).sum(0) > 0
            logits = logits.masked_fill(~present_W, torch.finfo(logits.dtype).min / 2)
        real_N = batch.y != PADDING
        correct = (logits.argmax(-1) == batch.y) & real_N
        accuracy = correct.float().sum() / real_N.float().sum()
        return F.cross_entropy(logits, batch.y, ignore_index=PADDING), {"accuracy": accuracy}


def _gather(images: np.ndarray, rows: np.ndarray, turns: np.ndarray) -> np.ndarray:
    """A copy of the rows, [R, C, H, W], each turned as told; one rotation for each angle."""
    pixels = images[rows]
    for quarter_turns in (1, 2, 3):
        turned = np.flatnonzero(turns == quarter_turns)
        if len(turned):
            pixels[turned] = np.rot90(pixels[turned], quarter_turns, axes=(2, 3))
    return pixels


def _smallest(name: str, given: int | None, least: int, whole: str, most: int) -> int:
    if given is not None and not least <= given <= most:
        raise InputError(f"tasks.{name}: got {given}, expected from {least} to {most} (tasks.{whole})")
    return most if given is None else given


def _check_disjoint(splits: Mapping[str, Sequence[ClassEntry]]) -> None:
    """No (image, rotation) in two splits, nor in two classes of one, nor in both parts where these differ."""

    def shown(entry: ClassEntry) -> np.ndarray:
        parts = [entry.rows] if entry.query_rows is None else [entry.rows, entry.query_rows]
        return np.concatenate([np.asarray(rows, np.int64) for rows in parts]) * 4 + entry.quarter_turns % 4

    keys = {split: np.concatenate([shown(entry) for entry in entries]) for split, entries in splits.items()}
    for split, key in keys.items():
        if len(np.unique(key)) < len(key):
            raise InputError(
                f"tasks: got a drawing twice in the {split} split, expected each in one class and once"
            )
    for a, b in combinations(splits, 2):
        shared = len(np.intersect1d(keys[a], keys[b], assume_unique=True))
        if shared:
            raise InputError(f"tasks: got {shared} drawings in both {a} and {b}, expected disjoint splits")


def _check_turns(shape: Sequence[int], tables: Mapping[str, Table]) -> None:
    """A quarter turn keeps the shape of square images alone."""
    if shape[-1] != shape[-2] and any((table.turns % 2).any() for table in tables.values()):
        raise InputError(f"tasks.rotations: got images of {shape[-2]}x{shape[-1]}, expected square ones")
