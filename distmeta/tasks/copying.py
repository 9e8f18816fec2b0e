"""The copy task: read a sequence of random bits, then give it back (Graves et al. 2014, arXiv 1410.5401, §4.1).

All splits have the same distribution and different task ids, unless evaluation has other lengths.

Shapes: T tasks, L vectors of the longest sequence, B bits per vector.
"""

from __future__ import annotations

from typing import Any, final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distmeta.errors import InputError
from distmeta.protocols import PADDING, Batch, Episode, Metrics
from distmeta.seeding import draw_uniforms
from distmeta.tasks.options import Positive


@final
class Copy:
    """Support: start marker, the vectors of a sequence, end marker. Query: blank rows, whose targets are the vectors.

    - Inputs x are [L + 2, B + 2] in the support set and [L, B + 2] in the query set: B bits, the channel of the start
      marker, the channel of the end marker. Targets y are zeros in the support set and the bits in the query set.
    - It is for learners that read row after row (`mann` with `sequential: true`).
    - The length of a sequence is uniform from `min_length` to `length`. Blank rows come before a shorter sequence, so
      that the end marker is the last row of every support set; targets of `PADDING` fill up its query set.
    - val and test use `eval_min_length` and `eval_length` (default: the training ones). Longer ones show whether a
      learner has learned the algorithm or only the lengths.

    Deviation: the paper's sequences have only an end marker.

    Args:
        bits: B.
        length, min_length: number of vectors of a sequence.
    """

    def __init__(
        self,
        bits: Positive = 8,
        length: Positive = 20,
        min_length: Positive = 1,
        eval_length: Positive | None = None,
        eval_min_length: Positive | None = None,
    ) -> None:
        eval_longest = length if eval_length is None else eval_length
        eval_shortest = min(min_length, eval_longest) if eval_min_length is None else eval_min_length
        _check_lengths("", min_length, length)
        _check_lengths("eval_", eval_shortest, eval_longest)
        self.in_shape: tuple[int, ...] = (bits + 2,)
        self.out_features = bits
        evaluation = (eval_shortest, eval_longest)
        self._lengths = {"train": (min_length, length), "val": evaluation, "test": evaluation}

    def draw(self, split: str, ids: Any) -> Episode:
        """Draw the episodes of the tasks `ids` (uint64 [T]), float32.

        x [T, L+2, B+2] and [T, L, B+2]; y [T, L+2, B] and [T, L, B].
        """
        shortest, longest = self._lengths[split]
        bits = self.out_features
        count = len(ids)
        unit = draw_uniforms(ids, 1 + longest * bits)
        length_T = shortest + (unit[:, 0] * (longest - shortest + 1)).astype(np.int64)
        bits_TLB = (unit[:, 1:].reshape(count, longest, bits) < 0.5).astype(np.float32)
        used_TL = np.arange(longest) < length_T[:, None]
        y_TLB = np.where(used_TL[..., None], bits_TLB, np.float32(PADDING))

        x = np.zeros((count, longest + 2, bits + 2), np.float32)
        start_T = longest - length_T
        for t in range(count):
            x[t, start_T[t] + 1 : longest + 1, :bits] = bits_TLB[t, : length_T[t]]
        x[np.arange(count), start_T, bits] = 1
        x[:, -1, bits + 1] = 1
        support = Batch(torch.from_numpy(x), torch.zeros(count, longest + 2, bits))
        query = Batch(torch.zeros(count, longest, bits + 2), torch.from_numpy(y_TLB))
        return Episode(support, query)

    def score(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Metrics]:
        """Return the mean cross entropy of a bit, for outputs [L, B] that are logits.

        `accuracy` is the fraction of bits that are right; `accuracy_sequence` is 1 if all of them are.
        """
        real_LB = (batch.y != PADDING).to(outputs.dtype)
        losses_LB = F.binary_cross_entropy_with_logits(outputs, batch.y.clamp(min=0), reduction="none")
        wrong_LB = ((outputs > 0) != (batch.y > 0.5)) * real_LB
        accuracy = 1 - wrong_LB.sum() / real_LB.sum()
        all_right = (wrong_LB.sum() == 0).to(outputs.dtype)
        loss = (losses_LB * real_LB).sum() / real_LB.sum()
        return loss, {"accuracy": accuracy, "accuracy_sequence": all_right}


def _check_lengths(prefix: str, shortest: int, longest: int) -> None:
    if shortest > longest:
        raise InputError(
            f"tasks.{prefix}min_length: got {shortest}, expected at most tasks.{prefix}length = {longest}"
        )
