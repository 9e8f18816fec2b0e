"""The interface of a strategy: who holds theta and the outer optimizer's state, and how meta-gradients reach them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import numpy as np

from distmeta.config.sections import OuterSection
from distmeta.runtime.checkpoint import TrainingState
from distmeta.runtime.parameter_server import ParameterServer
from distmeta.runtime.problem import Problem
from distmeta.runtime.shards import Pool

Record = dict[str, Any]
"""A line of metrics.jsonl."""


class LostStateError(RuntimeError):
    """theta or the optimizer's state was lost with the process that held it. The run returns to its last checkpoint."""

    def __init__(self, message: str):
        super().__init__(message)  # a single argument: survives pickling


class Strategy(Protocol):
    """Owns theta, the outer optimizer's state and the pool of workers.

    The constructor receives the keyword arguments

    - `problem`: at the phase of the last completed step,
    - `outer`: the optimizer's settings in that step,
    - `state`: a checkpoint's state, or None to begin at step 0,
    - `report`: a function that shows the user a line of text,

    and the options in the job's `strategy:` section. It raises `InputError` if the state is another job's or if the
    cluster has no room; nothing has been written then. A strategy with conditions on the rest of the job also provides
    `protocols.ChecksJob`.
    """

    requires_workers: ClassVar[bool]
    """Whether `run.workers: 0` is impossible."""
    equals_driver: ClassVar[bool]
    """Whether theta and the state are those of `driver` to the bit. A resume may change between such strategies."""
    pool: Pool
    """Computes evaluations."""

    def advance(self, problem: Problem, step: int, check: Callable[[], None]) -> list[Record]:
        """Take the step after `step` completed ones. Return its record.

        A strategy may take several steps at once if there is no theta between them; it returns a record for each. If
        anything is raised (`check` raises to abandon the step), the state is that of the last completed step.

        Raises:
            LostStateError: there is no such state. `load` is called before anything else.
        """
        ...

    def retune(self, outer: OuterSection) -> None:
        """Continue with other settings of the optimizer. Its state and the schedule's clock stay."""
        ...

    def flat(self) -> np.ndarray:
        """Return theta as a float32 vector, for evaluation.

        Raises:
            LostStateError: as in `advance`.
        """
        ...

    def state(self) -> TrainingState:
        """Return the state for a checkpoint.

        Raises:
            LostStateError: as in `advance`.
        """
        ...

    def load(self, state: TrainingState, outer: OuterSection) -> None:
        """Return to a state and the settings that belong to it. Start again what was lost."""
        ...

    def close(self) -> None:
        """Let the workers go."""
        ...


def build_server(problem: Problem, outer: OuterSection, state: TrainingState | None) -> ParameterServer:
    """Build theta and the optimizer in this process, from a checkpoint's state or (None) as they are at step 0.

    Raises:
        InputError: the state is another job's.
    """
    server = ParameterServer(problem.init(), outer)
    if state is not None:
        server.load(*state)
    return server
