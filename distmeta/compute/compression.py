"""Compressed vectors, for slow networks: bfloat16, or 8-bit integers with a scale for every 1,024 numbers.

8-bit integers are rounded up or down at random, in proportion to the distance, so that their expectation is the number
itself (Alistarh et al. 2017, "QSGD"). Without random numbers they are rounded to the nearest, for callers that add the
error to the next vector (Seide et al. 2014, "1-bit SGD").
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import torch

from distmeta.compute.vectors import BLOCK

Compression = Literal["none", "bf16", "int8"]
"""How a vector is sent: unchanged, as bfloat16, or as 8-bit integers with scales."""
GROUP = 1_024
"""Numbers that share a scale. Blocks consist of whole groups, so a vector may be cut at blocks."""
LEVELS = 127
assert BLOCK % GROUP == 0


class Coded(NamedTuple):
    """A compressed vector. int8: x̂ = code · scale of the group. bf16: the upper half of a float32."""

    codes: np.ndarray
    """int8 or int16 [N]."""
    scales: np.ndarray | None
    """float32, one per group; None for bf16."""


Vector = np.ndarray | Coded
"""A float32 vector as it is sent."""


def encode(vector: np.ndarray, how: str, draws: np.random.Generator | None = None) -> Vector:
    """Compress a float32 vector [N].

    bf16: |x̂ − x| ≤ 2⁻⁸ |x|. int8: < m/127 with random rounding and ≤ m/254 without, where m is the largest magnitude in
    x's group. A number that is not finite makes its group NaN.

    Args:
        how: none, bf16 or int8.
        draws: for random rounding of int8; None: round to the nearest.
    """
    if how == "none":
        return vector
    if how == "bf16":
        return Coded(torch.from_numpy(vector).to(torch.bfloat16).view(torch.int16).numpy(), None)
    padded = np.zeros(-(-len(vector) // GROUP) * GROUP, np.float32)
    padded[: len(vector)] = vector
    groups = padded.reshape(-1, GROUP)
    scales = np.abs(groups).max(1) / np.float32(LEVELS)
    with np.errstate(invalid="ignore", divide="ignore"):
        steps = groups / scales[:, None]
    lift = np.float32(0.5) if draws is None else draws.random(steps.shape, np.float32)
    codes = np.nan_to_num(np.floor(steps + lift)).clip(-LEVELS, LEVELS).astype(np.int8)
    return Coded(codes.reshape(-1)[: len(vector)], scales)


def decode(vector: Vector) -> np.ndarray:
    """Return the float32 vector [N]."""
    if isinstance(vector, np.ndarray):
        return vector
    if vector.scales is None:
        return torch.from_numpy(vector.codes.copy()).view(torch.bfloat16).float().numpy()
    scales = np.repeat(vector.scales, GROUP)[: len(vector.codes)]
    with np.errstate(invalid="ignore"):
        return vector.codes * scales


def cut(vector: Vector, edges: Sequence[int]) -> list[Vector]:
    """Return the pieces of a vector between edges, which lie at blocks."""
    if isinstance(vector, np.ndarray):
        return [vector[a:b] for a, b in pairwise(edges)]
    codes, scales = vector
    return [
        Coded(codes[a:b], None if scales is None else scales[a // GROUP : -(-b // GROUP)])
        for a, b in pairwise(edges)
    ]
