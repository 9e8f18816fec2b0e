"""Tasks whose support sets have wrong targets: digits with wrong labels, and sine waves with outliers.

The digits are scikit-learn's: 1,797 drawings of 8×8 pixels that come with the library.

Shapes: T tasks, S support examples, Q query examples.
"""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple, final

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from distmeta.errors import InputError
from distmeta.protocols import Batch, Episode
from distmeta.seeding import draw_uniforms, task_generator
from distmeta.tasks.digits import INK, load_digit_images
from distmeta.tasks.few_shot import ClassificationScore
from distmeta.tasks.options import Positive
from distmeta.tasks.regression import Sinusoid

PARTS = {"train": (0.0, 0.5), "val": (0.5, 0.7), "test": (0.7, 1.0)}
"""The part of the drawings that each split sees."""
OUTLIERS = 1
"""The part of a task's uniform numbers that decides its outliers; part 0 decides its sine wave."""


class NoisyBatch(NamedTuple):
    """Examples whose targets may be wrong."""

    x: Tensor
    y: Tensor
    is_clean: Tensor
    """bool [N]: whether `y` was left as it is. No algorithm needs it; it tells whether weights find the clean ones."""


@final
class NoisyDigits:
    """Each task is a small training set of all ten digits with wrong labels, and a query set with right ones.

    A wrong label is uniform over the other nine digits. Support and query of a task have no drawing in common, and the
    splits have none either. x is [1, 8, 8] from 0 to 1.

    Args:
        support: examples in the support set.
        queries: examples in the query set.
        noise: probability that a support label is wrong.
    """

    in_shape = (1, 8, 8)
    out_features = 10

    def __init__(
        self,
        support: Positive = 200,
        queries: Positive = 100,
        noise: Annotated[float, Field(ge=0, lt=1)] = 0.4,
    ) -> None:
        images, digit = load_digit_images()
        order = np.random.Generator(np.random.Philox(0)).permutation(len(images))
        self._x = torch.from_numpy(images[order].astype(np.float32) / INK)
        self._digit = digit[order].astype(np.int64)
        self._rows = {
            split: np.arange(round(low * len(order)), round(high * len(order)))
            for split, (low, high) in PARTS.items()
        }
        most = min(len(rows) for rows in self._rows.values())
        if support + queries > most:
            raise InputError(
                f"tasks.support: got {support} with {queries} queries, expected at most {most} together"
            )
        self._support = support
        self._queries = queries
        self._noise = noise
        self.score = ClassificationScore(self.out_features)

    def draw(self, split: str, ids: Any) -> Episode:
        """Draw the episodes of the tasks `ids` (uint64 [T]): support [T, S, ...], query [T, Q, ...]."""
        supports = []
        queries = []
        for task_id in ids:
            generator = task_generator(task_id)
            rows = generator.permutation(self._rows[split])[: self._support + self._queries]
            support_rows = rows[: self._support]
            query_rows = rows[self._support :]
            is_wrong = generator.random(self._support) < self._noise
            shift = generator.integers(1, 10, self._support)
            label = np.where(is_wrong, (self._digit[support_rows] + shift) % 10, self._digit[support_rows])
            clean = torch.from_numpy(~is_wrong)
            supports.append(NoisyBatch(self._x[support_rows], torch.from_numpy(label), clean))
            queries.append(Batch(self._x[query_rows], torch.from_numpy(self._digit[query_rows])))
        support = NoisyBatch(*map(torch.stack, zip(*supports, strict=True)))
        query = Batch(*map(torch.stack, zip(*queries, strict=True)))
        return Episode(support, query)


@final
class NoisySinusoid:
    """Each task is a sine wave as in `sinusoid`, with outliers among the support targets and none in the query set.

        y_i = A sin(x_i − b) + e_i,   e_i uniform on [−spread, spread] with probability `outliers`, else 0

    Args:
        shots: examples in the support set.
        queries: examples in the query set.
        outliers: probability that a support target is an outlier.
        spread: largest error of an outlier. Amplitudes are at most 5.
    """

    in_shape = Sinusoid.in_shape
    out_features = Sinusoid.out_features

    def __init__(
        self,
        shots: Positive = 20,
        queries: Positive = 10,
        outliers: Annotated[float, Field(ge=0, lt=1)] = 0.3,
        spread: Annotated[float, Field(gt=0)] = 15.0,
    ) -> None:
        self._sines = Sinusoid(shots, queries)
        self._shots = shots
        self._outliers = outliers
        self._spread = spread

    def draw(self, split: str, ids: Any) -> Episode:
        """Draw the episodes of the tasks `ids` (uint64 [T]): support [T, S, 1], query [T, Q, 1]."""
        support, query = self._sines.draw(split, ids)
        unit_TN = torch.from_numpy(draw_uniforms(ids, 2 * self._shots, OUTLIERS).astype(np.float32))
        is_outlier_TS1 = unit_TN[:, : self._shots, None] < self._outliers
        error_TS1 = self._spread * (2 * unit_TN[:, self._shots :, None] - 1)
        y_TS1 = support.y + torch.where(is_outlier_TS1, error_TS1, 0.0)
        return Episode(NoisyBatch(support.x, y_TS1, ~is_outlier_TS1[..., 0]), query)

    score = staticmethod(Sinusoid.score)
