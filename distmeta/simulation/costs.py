"""What things cost in seconds: measured on a machine (`calibrate`), stored as JSON, read by the simulation."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from distmeta.config.parts import describe_validation_error
from distmeta.errors import InputError
from distmeta.files import write_atomically

VERSION = 1
Cost = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class CostCurve:
    """Seconds as a function of bytes: linear between the measured points and beyond the last, never below 0."""

    points: tuple[tuple[Cost, Cost], ...]
    """(bytes, seconds), with rising bytes."""

    def __post_init__(self) -> None:
        sizes = [size for size, _ in self.points]
        if not sizes or any(size >= next_size for size, next_size in pairwise(sizes)):
            raise ValueError(f"points: got sizes {sizes}, expected at least one, rising")

    def __call__(self, size: float) -> float:
        points = self.points
        if len(points) == 1:
            return max(points[0][1], 0.0)
        right = min(max(bisect_left([x for x, _ in points], size), 1), len(points) - 1)
        x0, y0 = points[right - 1]
        x1, y1 = points[right]
        return max(y0 + (y1 - y0) * (size - x0) / (x1 - x0), 0.0)


@dataclass(frozen=True)
class MachineCosts:
    """What a machine's processor, memory and Ray cost, whatever the job. All in seconds, unless stated."""

    call: Cost
    """A call of a worker that computes and sends nothing, until the next one can start."""
    call_driver: Cost
    """The part of it during which the driver can do nothing else."""
    message: Cost
    """A call of an actor that does nothing, there and back."""
    message_driver: Cost
    """What one of many such calls takes of the caller's processor."""
    step: Cost
    """The driver's work in a step besides calls and vectors."""
    put: CostCurve
    """Driver: put theta into the object store."""
    receive: CostCurve
    """Worker: read theta from the object store, each tensor into its own memory."""
    reply: CostCurve
    """Worker and object store: send a gradient to the driver, besides the call itself."""
    reply_shared: Cost
    """The fraction of `reply` during which no other worker of the machine can reply."""
    add: CostCurve
    """Driver: add one more vector, fresh from a worker, in the tree sum."""
    ring: CostCurve
    """Sum a vector over two processes of this machine with gloo."""
    slowdown: Annotated[tuple[Cost, ...], Field(min_length=1)]
    """Seconds of a shard in Ray workers, with 1, 2, … of them at the same time on one machine, over seconds of the same
    shard in this process. More workers than were measured are as slow as the last."""
    cores: Annotated[int, Field(ge=1)]
    start: Cost
    """From asking for a worker until it is ready."""


@dataclass(frozen=True)
class JobCosts:
    """What a job's own computations cost in one process."""

    parameters: Annotated[int, Field(ge=1)]
    """Elements of theta, float32."""
    shards: Annotated[int, Field(ge=1)]
    """Shards of the job's step."""
    shard: Cost
    """Seconds of a shard, however few its tasks."""
    task: Cost
    """Seconds of one more task: drawing it, and its meta-gradient."""
    outer: Cost
    """Seconds of mean gradient, norm, clipping and the optimizer's step."""

    @property
    def bytes(self) -> float:
        return 4.0 * self.parameters

    def compute_seconds(self, tasks: float) -> float:
        """Return the seconds of a shard: shard + task · tasks."""
        return self.shard + self.task * tasks


@dataclass(frozen=True)
class MeasuredCosts:
    """The content of a costs file: one machine, and the jobs that were measured on it."""

    machine: MachineCosts
    jobs: dict[str, JobCosts] = field(default_factory=dict)
    """By `comparison.fingerprint_job`."""
    about: dict[str, str] = field(default_factory=dict)
    """Where and when the machine was measured."""
    version: int = VERSION

    def with_job(self, key: str, job: JobCosts) -> MeasuredCosts:
        return replace(self, jobs={**self.jobs, key: job})


def save_costs(costs: MeasuredCosts, path: Path) -> None:
    """Write a costs file as a whole or not at all."""
    try:
        write_atomically(path, json.dumps(asdict(costs), indent=1) + "\n")
    except OSError as error:
        raise InputError(f"--costs: {path} cannot be written ({error.strerror})") from None


def load_costs(path: Path) -> MeasuredCosts:
    """Read a costs file.

    Raises:
        InputError: there is none, or `--calibrate` did not write it.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(
            f"--costs: {path} does not exist, expected a file of measured costs: --calibrate measures and writes it"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--costs: {path} cannot be read ({error})") from None
    try:
        raw: Any = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        raise InputError(f"--costs: {path} is not JSON: --calibrate writes a new one") from None
    if not isinstance(raw, Mapping) or raw.get("version") != VERSION:
        raise InputError(
            f"--costs: {path} is no costs file of version {VERSION}: --calibrate writes a new one"
        )
    try:
        return TypeAdapter(MeasuredCosts).validate_python(dict(raw))
    except ValidationError as error:
        problem = describe_validation_error(error)
        raise InputError(f"--costs: {path}: {problem}: --calibrate writes a new one") from None
