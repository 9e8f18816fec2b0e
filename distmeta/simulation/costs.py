"""What things cost: measured on a machine (`calibrate`), kept as JSON, read by the model. Seconds, bytes, tasks."""

from __future__ import annotations

import json
import os
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from distmeta.config.parts import describe_validation_error
from distmeta.errors import InputError

VERSION = 1
Cost = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class Curve:
    """Seconds against bytes: straight between the measured points, the last slope beyond them, never below 0."""

    points: tuple[tuple[Cost, Cost], ...]

    def __post_init__(self) -> None:
        sizes = [size for size, _ in self.points]
        if not sizes or any(a >= b for a, b in pairwise(sizes)):
            raise ValueError(f"points: got sizes {sizes}, expected at least one, rising")

    def __call__(self, size: float) -> float:
        points = self.points
        if len(points) == 1:
            return max(points[0][1], 0.0)
        right = min(max(bisect_left([x for x, _ in points], size), 1), len(points) - 1)
        (x0, y0), (x1, y1) = points[right - 1], points[right]
        return max(y0 + (y1 - y0) * (size - x0) / (x1 - x0), 0.0)


@dataclass(frozen=True)
class Machine:
    """What a machine's processor, memory and Ray take, whatever the job."""

    call: Cost
    """A call of a worker that computes and sends nothing, until the next one can begin."""
    call_driver: Cost
    """That part of it in which the driver can do nothing else."""
    message: Cost
    """A call of an actor that does nothing, there and back."""
    message_driver: Cost
    """What one of many such calls takes of the caller's processor."""
    step: Cost
    """The driver's work in a step besides calls and vectors."""
    put: Curve
    """Driver: theta into the object store."""
    receive: Curve
    """Worker: theta out of the object store, each tensor in memory of its own."""
    reply: Curve
    """Worker and object store: a gradient on its way to the driver, beside the call itself."""
    reply_shared: Cost
    """The fraction of `reply` during which no other worker of the machine can reply."""
    add: Curve
    """Driver: one more vector, fresh from a worker, in the tree sum."""
    ring: Curve
    """A vector summed over two processes of this machine by gloo."""
    slowdown: Annotated[tuple[Cost, ...], Field(min_length=1)]
    """Seconds of a shard in Ray workers over seconds of the same in this process alone, with 1, 2, … workers at once
    on one machine; more than were measured are as slow as those."""
    cores: Annotated[int, Field(ge=1)]
    start: Cost
    """From asking for a worker to its being ready."""


@dataclass(frozen=True)
class JobCosts:
    """What a job's own computations take in one process."""

    parameters: Annotated[int, Field(ge=1)]
    """float32 numbers of theta."""
    shards: Annotated[int, Field(ge=1)]
    """That the job's step is cut into."""
    shard: Cost
    """Seconds of a shard, however few its tasks."""
    task: Cost
    """Seconds of one more task: drawing, and its meta-gradient."""
    outer: Cost
    """Mean gradient, norm, clipping, the optimizer's step."""

    @property
    def bytes(self) -> float:
        return 4.0 * self.parameters

    def compute(self, tasks: float) -> float:
        """Seconds of a shard of `tasks` tasks: shard + task · tasks."""
        return self.shard + self.task * tasks


@dataclass(frozen=True)
class Costs:
    """The file: one machine, and the jobs that were measured on it, by what their computations depend on."""

    machine: Machine
    jobs: dict[str, JobCosts] = field(default_factory=dict)
    about: dict[str, str] = field(default_factory=dict)
    """Where and when."""
    version: int = VERSION

    def with_job(self, key: str, job: JobCosts) -> Costs:
        return replace(self, jobs={**self.jobs, key: job})


def save(costs: Costs, path: Path) -> None:
    """Writes the file whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps(asdict(costs), indent=1) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise InputError(f"--costs: {path} cannot be written ({error.strerror})") from None


def load(path: Path) -> Costs:
    """The costs in a file.

    Raises:
        InputError: there is none, or it is not one that `--calibrate` wrote.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(
            f"--costs: {path} is not there, expected a file of measured costs: --calibrate measures and writes it"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--costs: {path} cannot be read ({error})") from None
    try:
        raw: Any = json.loads(text)
        if not isinstance(raw, Mapping) or raw.get("version") != VERSION:
            raise InputError(
                f"--costs: {path} is no costs file of version {VERSION}: --calibrate writes a new one"
            )
        return TypeAdapter(Costs).validate_python(dict(raw))
    except (json.JSONDecodeError, RecursionError):
        raise InputError(f"--costs: {path} is not JSON: --calibrate writes a new one") from None
    except ValidationError as error:
        raise InputError(f"--costs: {path}: {describe_validation_error(error)}: --calibrate writes a new one") from None
