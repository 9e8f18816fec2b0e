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
"""Elements per partial sum of a norm. Slices that are cut at blocks agree on the norm. Sums use the same blocks."""
ALIGN = 16
"""Elements in 64 bytes: torch aligns the memory of its tensors to this. Tensors in a vector are aligned alike."""

Flat = np.ndarray | tuple[np.ndarray, ...]
"""A flat vector, or its consecutive pieces."""


def join(flat: Flat) -> np.ndarray:
    """Return a flat vector that may be in pieces as one array."""
    if isinstance(flat, np.ndarray):
        return flat
    return flat[0] if len(flat) == 1 else np.concatenate(flat)


class Span(NamedTuple):
    """Elements [first, last) of one of theta's tensors."""

    name: str
    first: int
    last: int
    at: int
    """Position of the first one in the slice of the vector."""


@dataclass(frozen=True)
class Layout:
    """The place of each tensor of theta in the vector: in theta's order, each beginning at a multiple of `ALIGN`.

    The gaps hold zeros in theta and in gradients. An elementwise optimizer keeps them at zero.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @staticmethod
    def from_theta(theta: Theta) -> Layout:
        return Layout(tuple(theta), tuple(tuple(value.shape) for value in theta.values()))

    @cached_property
    def places(self) -> tuple[tuple[int, int], ...]:
        """Where each tensor begins and ends in the vector."""
        places = []
        start = 0
        for shape in self.shapes:
            stop = start + math.prod(shape)
            places.append((start, stop))
            start = _round_up(stop)
        return tuple(places)

    @cached_property
    def _strides(self) -> list[tuple[int, ...]]:
        return [torch.empty(shape, device="meta").stride() for shape in self.shapes]

    @cached_property
    def size(self) -> int:
        """Elements of the vector."""
        return _round_up(self.places[-1][1])

    @cached_property
    def parameters(self) -> int:
        """Numbers in theta."""
        return sum(stop - start for start, stop in self.places)

    def allocate(self) -> np.ndarray:
        """Return a vector whose gaps are zero and whose other elements are not set."""
        flat = torch.empty(self.size).numpy()  # torch aligns it
        starts = [start for start, _ in self.places[1:]] + [self.size]
        for (_, stop), next_start in zip(self.places, starts, strict=True):
            flat[stop:next_start] = 0
        return flat

    def flatten(self, theta: Theta) -> np.ndarray:
        """Return theta as a vector, float32 [size]."""
        flat = self.allocate()
        for name, view in self.views(torch.from_numpy(flat)).items():
            view.copy_(theta[name])
        return flat

    def views(self, flat: torch.Tensor) -> Theta:
        """Return views of the flat tensor by name."""
        offset = flat.storage_offset()
        parts = zip(self.names, self.shapes, self._strides, self.places, strict=True)
        return {
            name: flat.as_strided(shape, strides, offset + start)
            for name, shape, strides, (start, _) in parts
        }

    def unflatten(self, flat: np.ndarray, device: torch.device | str = "cpu") -> Theta:
        """Return a copy of the vector's tensors by name."""
        return {name: view.clone() for name, view in self.views(as_tensor(flat).to(device)).items()}

    def spans(self, start: int, stop: int) -> list[Span]:
        """Return what each tensor has in the slice [start, stop) of the vector."""
        spans = []
        for name, (begin, end) in zip(self.names, self.places, strict=True):
            first = max(start, begin)
            last = min(stop, end)
            if first < last:
                spans.append(Span(name, first - begin, last - begin, first - start))
        return spans


def _round_up(count: int) -> int:
    """Return the next multiple of `ALIGN`."""
    return -(-count // ALIGN) * ALIGN


class Buffer:
    """Memory for one gradient after the other: a flat vector, and views of it by name on the device that computes.

    Args:
        on_device: a flat vector in the memory of a GPU; None: on the CPU. Several buffers may share one. Then `fetch`
            one before another's views are written.
    """

    def __init__(self, layout: Layout, on_device: torch.Tensor | None = None):
        self.vector = layout.allocate()
        """The gradient, float32 [size]. On a GPU it is only valid after `fetch`."""
        self._on_device = on_device
        self.views = layout.views(torch.from_numpy(self.vector) if on_device is None else on_device)

    def fetch(self) -> None:
        """Copy the gradient from the GPU to `vector`."""
        if self._on_device is not None:
            torch.from_numpy(self.vector).copy_(self._on_device)


def as_tensor(flat: np.ndarray) -> torch.Tensor:
    """Return a tensor that shares the vector's memory, or a copy if that is not aligned. Do not write to it.

    The bits of a matrix product can depend on the alignment of its operands. Small vectors lie anywhere in what Ray
    received; large ones are aligned.
    """
    if flat.ctypes.data % (4 * ALIGN):
        copy = torch.empty(len(flat))
        copy.numpy()[:] = flat
        return copy
    return torch.from_numpy(flat)


# torch warns once per process about a tensor on read-only memory. Trigger the warning here, where it is ignored.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.from_numpy(np.frombuffer(bytes(4), np.float32))


def choose_edges(size: int, pieces: int) -> list[int]:
    """Cut a vector at blocks into pieces that are as even as possible; return where they begin, and the end.

    There are fewer pieces if there are fewer blocks.
    """
    blocks = max(-(-size // BLOCK), 1)
    pieces = min(pieces, blocks)
    return [min(blocks * i // pieces * BLOCK, size) for i in range(pieces + 1)]
