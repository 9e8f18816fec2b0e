"""theta as one flat float32 vector: what travels between driver and workers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from distmeta.core import Theta

BLOCK = 65_536
"""Elements of one partial sum of a norm: slices of a vector that are cut at blocks agree on its norm. Sums of vectors
go through them in such blocks too."""


Flat = np.ndarray | tuple[np.ndarray, ...]
"""A flat vector, or its consecutive pieces."""


def whole(flat: Flat) -> np.ndarray:
    if isinstance(flat, np.ndarray):
        return flat
    return flat[0] if len(flat) == 1 else np.concatenate(flat)


@dataclass(frozen=True)
class Layout:
    """Where each tensor of theta lies in the vector: in theta's own order, one after the other."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @staticmethod
    def of(theta: Theta) -> Layout:
        return Layout(tuple(theta), tuple(tuple(value.shape) for value in theta.values()))

    @property
    def size(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    def flatten(self, theta: Theta) -> np.ndarray:
        """theta -> float32 [size]."""
        flat = np.empty(self.size, np.float32)
        for name, view in self.views(torch.from_numpy(flat)).items():
            view.copy_(theta[name])
        return flat

    def views(self, flat: torch.Tensor) -> Theta:
        """Views of the flat tensor, by name."""
        theta, start = {}, 0
        for name, shape in zip(self.names, self.shapes, strict=True):
            count = math.prod(shape)
            theta[name] = flat[start : start + count].view(shape)
            start += count
        return theta

    def unflatten(self, flat: np.ndarray, device: torch.device | str = "cpu") -> Theta:
        """float32 [size] -> theta, each tensor in memory of its own.

        The copy is on purpose: the vector may be a read-only view of shared memory, and the bits of a matrix
        product can depend on how its operands are aligned.
        """
        theta, start = {}, 0
        for name, shape in zip(self.names, self.shapes, strict=True):
            stop = start + math.prod(shape)
            theta[name] = torch.from_numpy(np.array(flat[start:stop], np.float32)).view(shape).to(device)
            start = stop
        return theta

    def refill(self, theta: Theta, flat: np.ndarray) -> None:
        """Overwrites what `unflatten` gave, on the CPU: fresh memory costs a large theta more than the copy does."""
        start = 0
        for name in self.names:
            numbers = theta[name].numpy().reshape(-1)
            np.copyto(numbers, flat[start : start + numbers.size])
            start += numbers.size

    def spans(self, start: int, stop: int) -> list[tuple[str, int, int]]:
        """Which of its elements each tensor has in [start, stop) of the vector: (name, first, past the last)."""
        found, offset = [], 0
        for name, shape in zip(self.names, self.shapes, strict=True):
            count = math.prod(shape)
            first, last = max(start - offset, 0), min(stop - offset, count)
            if first < last:
                found.append((name, first, last))
            offset += count
        return found


def edges_of(size: int, pieces: int) -> list[int]:
    """Cuts a vector at blocks into `pieces` as even as can be, fewer where there are fewer blocks: where they begin,
    and the end."""
    blocks = max(-(-size // BLOCK), 1)
    pieces = min(pieces, blocks)
    return [min(blocks * i // pieces * BLOCK, size) for i in range(pieces + 1)]


def norm(vector: np.ndarray) -> float:
    """‖vector‖₂: the `fsum` of float64 partial sums of squares over fixed blocks of `BLOCK` elements."""
    return math.sqrt(math.fsum(squared_blocks(vector)))


def squared_blocks(vector: np.ndarray) -> list[float]:
    return [
        float(np.square(vector[start : start + BLOCK].astype(np.float64)).sum())
        for start in range(0, len(vector), BLOCK)
    ]


def mean_of(vectors: list[np.ndarray], tasks: int) -> np.ndarray:
    """Their sum by the tree over the number of tasks."""
    total = tree_sum(vectors)
    return np.divide(total, np.float32(tasks), out=None if len(vectors) == 1 else total)


def finite(vector: np.ndarray) -> bool:
    """Whether all its numbers are: the extremes of numbers with a NaN among them are NaN."""
    return bool(np.isfinite(vector.min()) and np.isfinite(vector.max()))


def tree_sum(vectors: list[np.ndarray]) -> np.ndarray:
    """The sum by a fixed binary tree over the list's index: ((0+1)+(2+3))+…; an odd one out moves up.

    Block by block, so that what the tree holds in between stays in the processor's cache: each vector is read once and
    the sum is written once.
    """
    if len(vectors) == 1:
        return vectors[0]
    size = len(vectors[0])
    total = np.empty(size, np.float32)
    scratch = np.empty((len(vectors) // 2, min(size, BLOCK)), np.float32)
    for start in range(0, size, BLOCK):
        parts = [vector[start : start + BLOCK] for vector in vectors]
        while len(parts) > 2:
            pairs = [
                np.add(parts[i], parts[i + 1], out=scratch[i // 2, : len(parts[i])])
                for i in range(0, len(parts) - 1, 2)
            ]
            parts = pairs + parts[len(pairs) * 2 :]
        np.add(parts[0], parts[1], out=total[start : start + BLOCK])
    return total
