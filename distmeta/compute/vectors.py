"""theta as one flat float32 vector: what travels between driver and workers."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from distmeta.protocols import Theta

BLOCK = 65_536
"""Elements of one partial sum of a norm: slices of a vector that are cut at blocks agree on its norm. Sums of vectors
go through them in such blocks too."""
ALIGN = 16
"""Elements of 64 bytes: how torch aligns tensors of its own. Views of a vector that is are aligned as they would be."""

Flat = np.ndarray | tuple[np.ndarray, ...]
"""A flat vector, or its consecutive pieces."""


def whole(flat: Flat) -> np.ndarray:
    if isinstance(flat, np.ndarray):
        return flat
    return flat[0] if len(flat) == 1 else np.concatenate(flat)


class Buffer:
    """A gradient's memory, one after the other: a flat vector, and views of it by name where it is computed.

    Args:
        there: a flat vector on the device that computes, where that has memory of its own. Buffers share one: what
            their views were set to is to be fetched before another's are. None: computed in the vector itself.
    """

    def __init__(self, layout: Layout, there: torch.Tensor | None = None):
        self.vector = layout.blank()
        self._here = torch.from_numpy(self.vector)
        self._there = self._here if there is None else there
        self.views = layout.views(self._there)

    def fetched(self) -> np.ndarray:
        """The vector, with what the views were set to."""
        if self._there is not self._here:
            self._here.copy_(self._there)
        return self.vector


class Span(NamedTuple):
    """Elements [first, last) of a tensor of theta, and where they begin in a piece of the flat vector."""

    name: str
    first: int
    last: int
    at: int


@dataclass(frozen=True)
class Layout:
    """Where each tensor of theta lies in the vector: in theta's own order, each from a multiple of `ALIGN` on.

    The gaps hold zeros: in theta, in its gradients, and so in whatever an optimizer makes of them.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @staticmethod
    def of(theta: Theta) -> Layout:
        return Layout(tuple(theta), tuple(tuple(value.shape) for value in theta.values()))

    @cached_property
    def places(self) -> tuple[tuple[int, int], ...]:
        """Where each tensor begins and ends in the vector."""
        found, start = [], 0
        for shape in self.shapes:
            stop = start + math.prod(shape)
            found.append((start, stop))
            start = _aligned(stop)
        return tuple(found)

    @cached_property
    def _strides(self) -> list[tuple[int, ...]]:
        return [torch.empty(shape, device="meta").stride() for shape in self.shapes]

    @cached_property
    def size(self) -> int:
        """Numbers in the vector."""
        return _aligned(self.places[-1][1])

    @cached_property
    def parameters(self) -> int:
        """Numbers in theta."""
        return sum(stop - start for start, stop in self.places)

    def blank(self) -> np.ndarray:
        """A vector that is set in its gaps alone."""
        flat = torch.empty(self.size).numpy()  # which aligns it, see `shared`
        starts = [start for start, _ in self.places[1:]] + [self.size]
        for (_, stop), following in zip(self.places, starts, strict=True):
            flat[stop:following] = 0
        return flat

    def flatten(self, theta: Theta) -> np.ndarray:
        """theta -> float32 [size]."""
        flat = self.blank()
        for name, view in self.views(torch.from_numpy(flat)).items():
            view.copy_(theta[name])
        return flat

    def views(self, flat: torch.Tensor) -> Theta:
        """Views of the flat tensor, by name."""
        offset = flat.storage_offset()
        return {
            name: flat.as_strided(shape, strides, offset + start)
            for name, shape, strides, (start, _) in zip(
                self.names, self.shapes, self._strides, self.places, strict=True
            )
        }

    def unflatten(self, flat: np.ndarray, device: torch.device | str = "cpu") -> Theta:
        """float32 [size] -> theta, each tensor in memory of its own."""
        return {name: view.clone() for name, view in self.views(shared(flat).to(device)).items()}

    def spans(self, start: int, stop: int) -> list[Span]:
        """What each tensor has in [start, stop) of the vector."""
        found = []
        for name, (begin, end) in zip(self.names, self.places, strict=True):
            first, last = max(start, begin), min(stop, end)
            if first < last:
                found.append(Span(name, first - begin, last - begin, first - start))
        return found


def _aligned(count: int) -> int:
    return -(-count // ALIGN) * ALIGN


def shared(flat: np.ndarray) -> torch.Tensor:
    """A tensor on the vector's own memory, not to be written to; a copy only where that is not aligned.

    The bits of a matrix product can depend on how its operands are aligned: small vectors lie anywhere in what Ray
    received, large ones as they do here.
    """
    if flat.ctypes.data % (4 * ALIGN):
        copy = torch.empty(len(flat))
        copy.numpy()[:] = flat
        return copy
    return torch.from_numpy(flat)


with warnings.catch_warnings():  # torch says once in a process that a tensor could write to read-only memory
    warnings.simplefilter("ignore")
    torch.from_numpy(np.frombuffer(bytes(4), np.float32))


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
