"""A slice of flat theta with its gradient sums and its part of the outer optimizer's state: what a server owns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from distmeta.compute.compression import Vector, decode
from distmeta.compute.memory import keep_freed
from distmeta.compute.vectors import Layout, Span, finite, mean_of, squared_blocks
from distmeta.config.sections import OuterSection
from distmeta.protocols import Theta
from distmeta.runtime.parameter_server import COUNT, optimizer_of, take_step

Moments = list[dict[str, np.ndarray]]
"""The optimizer's quantities of each part of a slice."""


@dataclass(frozen=True)
class SliceSpec:
    """All that a server needs to start, besides its part of theta."""

    places: tuple[tuple[int, int], ...]
    """Where each part begins and ends: the tensors of theta that have elements in the slice."""
    rates: tuple[float, ...]
    outer: OuterSection
    moments: Moments


class Slice:
    """θ ← θ − optimizer(g · factor) on some of theta's elements. torch's optimizers are elementwise: the bits are those
    of the whole."""

    def __init__(self, flat: np.ndarray, spec: SliceSpec):
        keep_freed()
        self._flat = torch.from_numpy(flat.copy())
        self._places, self._rates = spec.places, spec.rates
        self._sent: dict[int, Vector] = {}
        self._attempt = 0
        self._mean: np.ndarray | None = None
        self._marked: tuple[np.ndarray, Moments] | None = None
        self._start(spec.outer, spec.moments)

    def _start(self, outer: OuterSection, moments: Moments) -> None:
        self._outer = outer
        self._parts = [torch.nn.Parameter(self._flat[start:stop]) for start, stop in self._places]
        groups = [(rate, [part]) for rate, part in zip(self._rates, self._parts, strict=True)]
        self._optimizer = optimizer_of(groups, outer)
        for part, of_part in zip(self._parts, moments, strict=True):
            if of_part:
                state = {key: torch.from_numpy(np.array(value)) for key, value in of_part.items()}
                self._optimizer.state[part] = state

    def receive(self, attempt: int, position: int, gradient: Vector) -> None:
        """A shard's gradient sum. What is left of another attempt at a step is dropped."""
        if attempt != self._attempt:
            self._sent, self._attempt = {}, attempt
        self._sent[position] = gradient

    def average(self, tasks: int) -> tuple[bool, list[float]]:
        """Adds what came by the tree over positions, divides by the number of tasks; whether the mean is finite, and
        its norm's partial sums."""
        vectors = [decode(self._sent[position]) for position in range(len(self._sent))]
        self._sent = {}
        self._mean = mean_of(vectors, tasks)
        return finite(self._mean), squared_blocks(self._mean)

    def step(self, factor: float | None, rates: Sequence[float]) -> np.ndarray:
        """One outer step on the mean, scaled by `factor`; the new slice."""
        assert self._mean is not None
        gradient = self._mean if factor is None else self._mean * np.float32(factor)
        self._mean = None
        whole = torch.from_numpy(np.ascontiguousarray(gradient))
        for group, part, (start, stop), rate in zip(
            self._optimizer.param_groups, self._parts, self._places, rates, strict=True
        ):
            group["lr"], part.grad = rate, whole[start:stop]
        take_step(self._optimizer)
        for part in self._parts:
            part.grad = None
        return self.flat()

    def flat(self) -> np.ndarray:
        return self._flat.numpy().copy()

    def moments(self) -> Moments:
        """Copies of the optimizer's quantities, part by part."""
        states = [self._optimizer.state.get(part, {}) for part in self._parts]
        return [{key: value.detach().clone().numpy() for key, value in state.items()} for state in states]

    def retune(self, outer: OuterSection) -> None:
        """Other settings; the optimizer's state stays."""
        self._start(outer, self.moments())

    def mark(self) -> None:
        """Keeps the state until `unmark`."""
        self._marked = self.flat(), self.moments()

    def unmark(self, undo: bool) -> None:
        """Goes back to what was marked, or lets go of it."""
        if undo and self._marked is not None:
            self._flat.copy_(torch.from_numpy(self._marked[0]))
            self._start(self._outer, self._marked[1])
        self._marked = None


def places_of(spans: Sequence[Span]) -> tuple[tuple[int, int], ...]:
    """Where they begin and end in their piece of the vector."""
    return tuple((span.at, span.at + span.last - span.first) for span in spans)


def moments_in(spans: Sequence[Span], tensors: dict[str, torch.Tensor]) -> Moments:
    """What of the optimizer's state, `<parameter>/<quantity>`, belongs to some spans of the flat vector."""
    moments = []
    for name, first, last, _ in spans:
        own = {k.rpartition("/")[2]: v for k, v in tensors.items() if k.rpartition("/")[0] == name}
        moments.append(
            {
                key: (value if key == COUNT else value.reshape(-1)[first:last]).numpy()
                for key, value in own.items()
            }
        )
    return moments


def joined(layout: Layout, edges: Sequence[int], slices: Sequence[Moments]) -> dict[str, torch.Tensor]:
    """The optimizer's state as `<parameter>/<quantity>`, of the slices that `edges` cut it into."""
    parts: dict[str, list[np.ndarray]] = {}
    for (start, stop), moments in zip(pairwise(edges), slices, strict=True):
        for span, own in zip(layout.spans(start, stop), moments, strict=True):
            for key, value in own.items():
                parts.setdefault(f"{span.name}/{key}", []).append(value)
    shapes: dict[str, tuple[int, ...]] = dict(zip(layout.names, layout.shapes, strict=True))
    whole: Theta = {}
    for key, values in parts.items():
        name, _, quantity = key.rpartition("/")
        joined_up = values[0] if quantity == COUNT else np.concatenate(values).reshape(shapes[name])
        whole[key] = torch.from_numpy(np.array(joined_up))
    return whole
