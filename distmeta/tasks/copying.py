"""The copy task: a sequence of random bits is read, then given back (Graves et al. 2014, arXiv 1410.5401, §4.1).

The three splits are the same distribution, disjoint by their task ids, unless evaluation has its own lengths.

Shapes: T tasks, L the longest sequence, B bits a vector.
"""

from __future__ import annotations

from typing import Annotated, Any, final

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from distmeta.errors import InputError
from distmeta.protocols import PADDING, Batch, Episode, Metrics
from distmeta.seeding import uniforms

Count = Annotated[int, Field(ge=1)]


@final
class Copy:
    """Support: a start marker, the vectors of a sequence, an end marker. Query: blank rows, whose targets they are.

    x [L + 2, B + 2] and [L, B + 2]: B bits, the start marker's channel, the end marker's. y: zeros in the support,
    the bits in the query. It is a sequence, for learners that read row after row (`mann` with `sequential: true`). A
    sequence is uniformly `min_length` to `length` vectors long; blank rows stand before a shorter one, so that the end
    marker is the last row of every support, and targets of `PADDING` fill its query up.

    val and test use `eval_min_length` and `eval_length` (default: the training ones): a learner of the algorithm,
    not of the lengths, goes on past those that it was trained on.

    The paper's sequences have an end marker alone.

    Args:
        bits: B.
        length, min_length: vectors of a sequence.
    """

    def __init__(
        self,
        bits: Count = 8,
        length: Count = 20,
        min_length: Count = 1,
        eval_length: Count | None = None,
        eval_min_length: Count | None = None,
    ) -> None:
        longest = length if eval_length is None else eval_length
        shortest = min(min_length, longest) if eval_min_length is None else eval_min_length
        for prefix, low, high in (("", min_length, length), ("eval_", shortest, longest)):
            if low > high:
                raise InputError(
                    f"tasks.{prefix}min_length: got {low}, expected at most tasks.{prefix}length = {high}"
                )
        self.in_shape: tuple[int, ...] = (bits + 2,)
        self.out_features = bits
        self._lengths = {
            "train": (min_length, length),
            "val": (shortest, longest),
            "test": (shortest, longest),
        }

    def draw(self, split: str, ids: Any) -> Episode:
        """Episodes of the tasks `ids` (uint64 [T]): float32, x [T, L+2, B+2] and [T, L, B+2], y alike with B."""
        shortest, longest = self._lengths[split]
        bits, count = self.out_features, len(ids)
        drawn = uniforms(ids, 1 + longest * bits)
        length_T = shortest + (drawn[:, 0] * (longest - shortest + 1)).astype(np.int64)
        bits_TLB = (drawn[:, 1:].reshape(count, longest, bits) < 0.5).astype(np.float32)
        place_L = np.arange(longest)
        y_TLB = np.where((place_L < length_T[:, None])[..., None], bits_TLB, np.float32(PADDING))

        x_T = np.zeros((count, longest + 2, bits + 2), np.float32)
        start_T = longest - length_T
        row_TL = np.minimum(
            start_T[:, None] + 1 + place_L, longest
        )  # its place in the support; the rest is cut off
        for t in range(count):
            used = slice(0, length_T[t])
            x_T[t, row_TL[t, used], :bits] = bits_TLB[t, used]
        x_T[np.arange(count), start_T, bits] = 1
        x_T[:, -1, bits + 1] = 1
        support = Batch(torch.from_numpy(x_T), torch.zeros(count, longest + 2, bits))
        return Episode(support, Batch(torch.zeros(count, longest, bits + 2), torch.from_numpy(y_TLB)))

    def score(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Metrics]:
        """Mean cross entropy of a bit, outputs [L, B] being logits.

        `accuracy` is the fraction of bits that are right, `accuracy_sequence` 1 where all of them are.
        """
        real_LB = (batch.y != PADDING).to(outputs.dtype)
        losses_LB = F.binary_cross_entropy_with_logits(outputs, batch.y.clamp(min=0), reduction="none")
        wrong_LB = ((outputs > 0) != (batch.y > 0.5)) * real_LB
        accuracy = 1 - wrong_LB.sum() / real_LB.sum()
        whole = (wrong_LB.sum() == 0).to(outputs.dtype)
        return (losses_LB * real_LB).sum() / real_LB.sum(), {"accuracy": accuracy, "accuracy_sequence": whole}
