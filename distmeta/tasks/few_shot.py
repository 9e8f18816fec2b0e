"""N-way K-shot classification over one array of images (Lake et al. 2015; Vinyals et al. 2016).

Shapes: T tasks, W ways, S shots, Q queries per class, R drawn rows; images C, H, W.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal, final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distmeta.errors import InputError
from distmeta.protocols import PADDING, SPLITS, Batch, Episode, Metrics, Score, one_hot
from distmeta.tasks.image_preparation import Preparation, scale_pixels
from distmeta.tasks.jitter import JitterLimits, jitter_images
from distmeta.tasks.sampling import ClassEntry, ClassTable, EpisodeSettings, build_class_table, draw_rows

Order = Literal["shots", "random"]


@final
class FewShot:
    """The N-way K-shot sampler: W distinct classes, S + Q distinct drawings of each, without replacement.

    - The label y is the position of a class in the draw, so a class has another label in each task.
    - Rows are shot-major (row = shot · W + way) in the support and in the query set. With `order: random` they are in
      an order that is drawn with the task, as a learner needs that reads one row after the other.
    - With `within_group` the classes of a task come from one group, uniform among those with enough classes.
    - val and test use `eval_ways`, `eval_shots` and `eval_queries` (default: the training ones). `scorer(split)` is
      the score for each.
    - With `min_ways` a training task has between `min_ways` and `ways` classes, with `min_shots` between `min_shots`
      and `shots` support drawings (`unbalanced`: independently for each class), all equally likely. Smaller tasks are
      filled up with repeated rows that have the class index `PADDING`. These have no effect except on the statistics
      of a batch norm.
    - With `jitter` each training image, of support and query, is warped independently (`tasks.jitter`).

    Args:
        images: uint8 or float [N, C, H, W], in memory or memory-mapped. Each draw gathers its rows once and multiplies
            them by `scale`. Workers build the family from the job; pickling one copies its images.
        splits: the classes of train, and of val and test if there are any. Drawing from a missing split raises
            InputError.
        check: called before and after images are read; raises if they changed.
        fingerprint: identifies the images (`protocols.HasFingerprint`).

    Raises:
        InputError: a split cannot give such an episode, or two splits share an (image, rotation).
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
        jitter: JitterLimits | None = None,
        scale: float = 1 / 255,
        preparation: Preparation | None = None,
        check: Callable[[], None] = lambda: None,
        fingerprint: str | None = None,
    ) -> None:
        assert {"train"} <= set(splits) <= set(SPLITS), splits.keys()
        self.ways = ways
        self.shots = shots
        self.queries = queries
        self.eval_ways = ways if eval_ways is None else eval_ways
        self.eval_shots = shots if eval_shots is None else eval_shots
        self.eval_queries = queries if eval_queries is None else eval_queries
        for name in ("ways", "eval_ways", "shots", "eval_shots", "queries", "eval_queries"):
            size = vars(self)[name]
            if size < 1:
                raise InputError(f"tasks.{name}: got {size}, expected at least 1")
        training = EpisodeSettings(
            ways,
            shots,
            queries,
            min_ways=_check_minimum("min_ways", min_ways, 2, "ways", ways),
            min_shots=_check_minimum("min_shots", min_shots, 1, "shots", shots),
        )
        if unbalanced and min_shots is None:
            raise InputError(
                "tasks.unbalanced: got true without tasks.min_shots, expected the smallest number too"
            )
        evaluation = EpisodeSettings(
            self.eval_ways,
            self.eval_shots,
            self.eval_queries,
            min_ways=self.eval_ways,
            min_shots=self.eval_shots,
        )
        self._settings = {"train": training, "val": evaluation, "test": evaluation}
        eval_field = "ways" if eval_ways is None else "eval_ways"
        fields = {"train": "ways", "val": eval_field, "test": eval_field}
        self._tables = {
            split: build_class_table(split, entries, self._settings[split], fields[split], within_group)
            for split, entries in splits.items()
        }
        _check_disjoint(splits)
        _check_turns(images.shape, self._tables)
        self._images = images
        self._scale = scale
        self._shuffle = order == "random"
        self._unbalanced = unbalanced
        self._jitter = jitter
        self._check = check
        self.in_shape: tuple[int, ...] = tuple(images.shape[1:])
        self.out_features = ways
        self.preparation = preparation
        self.fingerprint = fingerprint
        self.class_names = {split: [entry.name for entry in entries] for split, entries in splits.items()}
        self.score: Score = self.scorer("train")
        """`ClassificationScore` of a training episode."""

    def draw(self, split: str, ids: Any) -> Episode:
        """Draw the episodes of the tasks `ids` (uint64 [T]).

        x float32 [T, S·W, C, H, W] and [T, Q·W, C, H, W]; y int64 [T, S·W] and [T, Q·W].
        """
        if split not in self._tables:
            raise InputError(f"tasks.{split}: got null, expected classes held out to draw {split} tasks from")
        selection = draw_rows(self._tables[split], ids, self._shuffle, self._unbalanced)
        # One gather for both parts: support rows first, so that each part is contiguous.
        rows_R = np.concatenate([part.ravel() for part in selection.rows])
        turns_R = np.concatenate([part.ravel() for part in selection.turns])
        # Reading a mapped file that was cut short would end the process, so check before. Check again after, because
        # the file may have changed meanwhile.
        self._check()
        x_RCHW = torch.from_numpy(scale_pixels(_gather_images(self._images, rows_R, turns_R), self._scale))
        self._check()
        support_y, query_y = (torch.from_numpy(labels) for labels in selection.labels)
        if self._jitter is not None and split == "train":
            x_RCHW = jitter_images(x_RCHW, self._jitter, ids, support_y.shape[1])
        support_x = x_RCHW[: support_y.numel()].view(*support_y.shape, *self.in_shape)
        query_x = x_RCHW[support_y.numel() :].view(*query_y.shape, *self.in_shape)
        return Episode(Batch(support_x, support_y), Batch(query_x, query_y))

    def scorer(self, split: str) -> Score:
        """Return the score for episodes of a split: val and test have `eval_ways`, and mask the other outputs."""
        settings = self._settings[split]
        return ClassificationScore(settings.ways, absent=settings.min_ways < settings.ways)


@final
@dataclass(frozen=True)
class ClassificationScore:
    """Mean cross entropy and accuracy over the first `ways` outputs, without rows of padding.

    The other outputs are masked. With `absent`, classes without a row in the batch are masked too (tasks with fewer
    classes than `ways`). Differentiable to any order; works under vmap.
    """

    ways: int
    absent: bool = False

    def __call__(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Metrics]:
        """Score outputs [N, >= ways] against `batch.y`, int64 [N]."""
        if outputs.shape[-1] < self.ways:
            raise InputError(
                f"ways: got {self.ways}, expected at most {outputs.shape[-1]} (the outputs of the model's head): "
                "train with model.head=shared or a metric method such as protonet, whose ways are free, or with "
                f"tasks.ways of at least {self.ways}"
            )
        logits = outputs[..., : self.ways]
        if self.absent:
            present_W = one_hot(batch.y, self.ways).sum(0) > 0
            logits = logits.masked_fill(~present_W, torch.finfo(logits.dtype).min / 2)
        real_N = batch.y != PADDING
        correct_N = (logits.argmax(-1) == batch.y) & real_N
        accuracy = correct_N.float().sum() / real_N.float().sum()
        return F.cross_entropy(logits, batch.y, ignore_index=PADDING), {"accuracy": accuracy}


def _gather_images(images: np.ndarray, rows: np.ndarray, turns: np.ndarray) -> np.ndarray:
    """Return a copy of the rows, [R, C, H, W], each turned by its quarter turns."""
    pixels = images[rows]
    for quarter_turns in (1, 2, 3):
        turned = np.flatnonzero(turns == quarter_turns)
        if len(turned):
            pixels[turned] = np.rot90(pixels[turned], quarter_turns, axes=(2, 3))
    return pixels


def _check_minimum(name: str, value: int | None, lowest: int, limit_name: str, limit: int) -> int:
    """Return the smallest number of ways or shots; the largest one if none is given."""
    if value is None:
        return limit
    if not lowest <= value <= limit:
        raise InputError(f"tasks.{name}: got {value}, expected from {lowest} to {limit} (tasks.{limit_name})")
    return value


def _check_disjoint(splits: Mapping[str, Sequence[ClassEntry]]) -> None:
    """Check that no (image, rotation) is in two splits, in two classes, or in both parts of a class if they differ."""
    keys = {
        split: np.concatenate([_list_keys(entry) for entry in entries]) for split, entries in splits.items()
    }
    for split, key in keys.items():
        if len(np.unique(key)) < len(key):
            raise InputError(
                f"tasks: got a drawing twice in the {split} split, expected each in one class and once"
            )
    for a, b in combinations(splits, 2):
        shared = len(np.intersect1d(keys[a], keys[b], assume_unique=True))
        if shared:
            raise InputError(f"tasks: got {shared} drawings in both {a} and {b}, expected disjoint splits")


def _list_keys(entry: ClassEntry) -> np.ndarray:
    """Return one integer per (image, rotation) of a class."""
    rows = np.asarray(entry.rows, np.int64)
    if entry.query_rows is not None:
        rows = np.concatenate([rows, np.asarray(entry.query_rows, np.int64)])
    return rows * 4 + entry.quarter_turns % 4


def _check_turns(shape: Sequence[int], tables: Mapping[str, ClassTable]) -> None:
    """Check that images are square if any is turned by 90° or 270°."""
    if shape[-1] != shape[-2] and any((table.turns % 2).any() for table in tables.values()):
        raise InputError(f"tasks.rotations: got images of {shape[-2]}x{shape[-1]}, expected square ones")
