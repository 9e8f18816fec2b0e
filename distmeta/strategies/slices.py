"""The servers of `sharded`: each owns a slice of flat theta, with its gradient sums and its optimizer state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from distmeta.compute.compression import Vector, decode
from distmeta.compute.memory import keep_freed_memory
from distmeta.compute.vectors import Layout, Span
from distmeta.config.sections import OuterSection
from distmeta.protocols import Theta
from distmeta.runtime.outer_optimizer import STEP_COUNT, GroupOptions, build_optimizer
from distmeta.runtime.parameter_server import is_finite, mean_vector, squared_block_sums

Moments = list[dict[str, np.ndarray]]
"""For each part of a slice, what the optimizer keeps about it, by name (for example `exp_avg`)."""


@dataclass(frozen=True)
class SliceSpec:
    """What a server needs to start, besides its slice of theta.

    A part is the elements that one entry of theta has in the slice.
    """

    ranges: tuple[tuple[int, int], ...]
    """Where each part begins and ends in the slice."""
    options: tuple[GroupOptions, ...]
    """Optimizer options of each part."""
    outer: OuterSection
    moments: Moments
    """Optimizer state of each part."""


class SliceServer:
    """The Ray actor that owns a slice: θ ← θ − optimizer(factor · g) on some elements of theta.

    torch's optimizers are elementwise, so the bits are those of an optimizer that owns all of theta.
    """

    def __init__(self, flat: np.ndarray, spec: SliceSpec):
        keep_freed_memory()
        self._flat = torch.from_numpy(flat.copy())
        self._ranges = spec.ranges
        self._options = spec.options
        self._received: dict[int, Vector] = {}
        """Gradient sums of the shards, by position."""
        self._attempt = 0
        self.mean: np.ndarray | None = None
        self._snapshot: tuple[np.ndarray, Moments] | None = None
        self._build_optimizer(spec.outer, spec.moments)

    def _build_optimizer(self, outer: OuterSection, moments: Moments) -> None:
        self._outer = outer
        self._parts = [torch.nn.Parameter(self._flat[start:stop]) for start, stop in self._ranges]
        groups = [(options, [part]) for options, part in zip(self._options, self._parts, strict=True)]
        self._optimizer = build_optimizer(groups, outer)
        for part, part_moments in zip(self._parts, moments, strict=True):
            if part_moments:
                state = {key: torch.from_numpy(np.array(value)) for key, value in part_moments.items()}
                self._optimizer.state[part] = state

    def ready(self) -> None:
        """Answer, to show that the actor has started and is alive."""

    def receive(self, attempt: int, position: int, gradient: Vector) -> None:
        """Store a shard's gradient sum. The first one of a new attempt at a step drops those of the last attempt."""
        if attempt != self._attempt:
            self._received = {}
            self._attempt = attempt
        self._received[position] = gradient

    def average(self, tasks: int) -> tuple[bool, list[float]]:
        """Add the gradient sums by the fixed tree and divide by the number of tasks. Keep the mean for `step`.

        Returns:
            Whether the mean is finite, and the partial sums of its squared norm, one per block.
        """
        vectors = [decode(self._received[position]) for position in range(len(self._received))]
        self._received = {}
        self.mean = mean_vector(vectors, tasks)
        return is_finite(self.mean), squared_block_sums(self.mean)

    def step(self, factor: float | None, rates: Sequence[float]) -> tuple[None, np.ndarray]:
        """Take one outer step on the mean gradient.

        Args:
            factor: what clipping multiplies the gradient by; None: it is not clipped.
            rates: outer learning rate of each part in this step.

        Returns:
            Two Ray objects: one that says that the step is done, and the new slice. The driver only fetches the first
            one. The slice travels directly to the workers.
        """
        assert self.mean is not None
        gradient = self.mean if factor is None else self.mean * np.float32(factor)
        self.mean = None
        gradient_tensor = torch.from_numpy(np.ascontiguousarray(gradient))
        groups = self._optimizer.param_groups
        for group, part, (start, stop), rate in zip(groups, self._parts, self._ranges, rates, strict=True):
            group["lr"] = rate
            part.grad = gradient_tensor[start:stop]
        self._optimizer.step()
        for part in self._parts:
            part.grad = None
        return None, self.flat()

    def flat(self) -> np.ndarray:
        """Return a copy of the slice."""
        return self._flat.numpy().copy()

    def moments(self) -> Moments:
        """Return a copy of the optimizer state."""
        states = [self._optimizer.state.get(part, {}) for part in self._parts]
        return [{key: value.detach().clone().numpy() for key, value in state.items()} for state in states]

    def retune(self, outer: OuterSection, options: tuple[GroupOptions, ...]) -> None:
        """Continue with other settings of the optimizer. Its state stays."""
        self._options = options
        self._build_optimizer(outer, self.moments())

    def take_snapshot(self) -> None:
        """Keep a copy of the slice and the optimizer state until `end_snapshot`."""
        self._snapshot = self.flat(), self.moments()

    def end_snapshot(self, undo: bool) -> None:
        """Discard the snapshot; with `undo`, restore it first."""
        if undo and self._snapshot is not None:
            flat, moments = self._snapshot
            self._flat.copy_(torch.from_numpy(flat))
            self._build_optimizer(self._outer, moments)
        self._snapshot = None


def local_ranges(spans: Sequence[Span]) -> tuple[tuple[int, int], ...]:
    """Return where each span begins and ends in its slice."""
    return tuple((span.at, span.at + span.last - span.first) for span in spans)


def cut_moments(spans: Sequence[Span], tensors: dict[str, torch.Tensor]) -> Moments:
    """Return the part of the optimizer state (`<parameter>/<quantity>`) that belongs to each span of flat theta."""
    moments = []
    for name, first, last, _ in spans:
        part_moments = {}
        for key, value in tensors.items():
            parameter, _, quantity = key.rpartition("/")
            if parameter == name:
                cut = value if quantity == STEP_COUNT else value.reshape(-1)[first:last]
                part_moments[quantity] = cut.numpy()
        moments.append(part_moments)
    return moments


def join_moments(layout: Layout, edges: Sequence[int], slices: Sequence[Moments]) -> dict[str, torch.Tensor]:
    """Return the optimizer state as `<parameter>/<quantity>`, joined from the slices that `edges` cut it into."""
    parts: dict[str, list[np.ndarray]] = {}
    for (start, stop), moments in zip(pairwise(edges), slices, strict=True):
        for span, part_moments in zip(layout.spans(start, stop), moments, strict=True):
            for quantity, value in part_moments.items():
                parts.setdefault(f"{span.name}/{quantity}", []).append(value)
    shapes: dict[str, tuple[int, ...]] = dict(zip(layout.names, layout.shapes, strict=True))
    tensors: Theta = {}
    for key, values in parts.items():
        name, _, quantity = key.rpartition("/")
        joined = values[0] if quantity == STEP_COUNT else np.concatenate(values).reshape(shapes[name])
        tensors[key] = torch.from_numpy(np.array(joined))
    return tensors
