"""Vectors in fewer bits, for the wire: bfloat16, or 8-bit integers with a scale for every 1,024 numbers.

int8 is rounded up or down at random in proportion to the distance, so that its expectation is the number itself
(Alistarh et al. 2017, "QSGD"); without random numbers to the nearest, for whoever feeds the error back
(Seide et al. 2014, "1-bit SGD").
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import torch

from distmeta.compute.vectors import BLOCK

Compression = Literal["none", "bf16", "int8"]
"""How a vector travels: as it is, as bfloat16, or as 8-bit integers with scales."""
GROUP = 1_024
"""Numbers that share a scale: a vector cut at blocks is cut between groups."""
LEVELS = 127
assert BLOCK % GROUP == 0


class Coded(NamedTuple):
    """x̂ = codes · scale of the group (int8); the upper half of a float32 (bf16, no scales)."""

    codes: np.ndarray
    """int8 or int16 [N]."""
    scales: np.ndarray | None
    """float32, one a group."""


Vector = np.ndarray | Coded
"""A float32 vector as it travels."""


def encode(vector: np.ndarray, how: str, draws: np.random.Generator | None = None) -> Vector:
    """float32 [N] -> what travels.

    |x̂ − x| ≤ 2⁻⁸ |x| (bf16), < m/127 with draws and ≤ m/254 without (int8), m the largest magnitude in x's group. What
    is not finite makes its group NaN.

    Args:
        how: none, bf16 or int8.
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
    """What travelled -> float32 [N]."""
    if isinstance(vector, np.ndarray):
        return vector
    if vector.scales is None:
        return torch.from_numpy(vector.codes.copy()).view(torch.bfloat16).float().numpy()
    scales = np.repeat(vector.scales, GROUP)[: len(vector.codes)]
    with np.errstate(invalid="ignore"):
        return vector.codes * scales


def cut(vector: Vector, edges: Sequence[int]) -> list[Vector]:
    """Its pieces between edges, which lie at blocks."""
    if isinstance(vector, np.ndarray):
        return [vector[a:b] for a, b in pairwise(edges)]
    codes, scales = vector
    return [
        Coded(codes[a:b], None if scales is None else scales[a // GROUP : -(-b // GROUP)])
        for a, b in pairwise(edges)
    ]
