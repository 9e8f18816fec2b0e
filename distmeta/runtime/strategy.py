"""What a strategy is: who holds theta and the outer optimizer's state, and how meta-gradients get there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from distmeta.config.sections import OuterSection
from distmeta.runtime.checkpoint import TrainingState
from distmeta.runtime.parameter_server import ParameterServer
from distmeta.runtime.pool import Pool
from distmeta.runtime.problem import Problem

Record = dict[str, Any]
"""A line of metrics.jsonl."""


class LostStateError(RuntimeError):
    """theta or the optimizer's state went with the process that held it: the run goes back to its last checkpoint."""

    def __init__(self, message: str):
        super().__init__(message)  # one argument: survives pickling


class Strategy(Protocol):
    """Owns theta, the outer optimizer's state and the pool that computes. A class of the table gets

    Args:
        problem: at the phase of the step that was completed last.
        outer: the optimizer's settings in that step.
        state: a checkpoint's; None: step 0 of the problem.
        say: told what a person should know.

    and raises InputError where state is not the job's, or the cluster has no room, before anything is written.
    """

    pool: Pool
    """Computes evaluations."""

    def advance(self, problem: Problem, step: int, check: Callable[[], None]) -> list[Record]:
        """Takes the step after `step` completed ones, or several, where only the last of them leaves a theta: a record
        for each. Whatever it raises (`check` does, to abandon it) leaves the state of the last completed one.

        Raises:
            LostStateError: there is none any more; `load` is called before anything else.
        """
        ...

    def retune(self, outer: OuterSection) -> None:
        """Goes on with other settings of the optimizer; its state and the schedule's clock stay."""
        ...

    def flat(self) -> np.ndarray:
        """theta as a float32 vector, to evaluate.

        Raises:
            LostStateError: as `advance`.
        """
        ...

    def state(self) -> TrainingState:
        """For a checkpoint.

        Raises:
            LostStateError: as `advance`.
        """
        ...

    def load(self, state: TrainingState, outer: OuterSection) -> None:
        """Goes back to a state and the settings it was made with; starts anew what was lost."""
        ...

    def close(self) -> None: ...


def server_of(problem: Problem, outer: OuterSection, state: TrainingState | None) -> ParameterServer:
    """theta and the optimizer in this process, at a checkpoint's state or at step 0.

    Raises:
        InputError: the state is another job's.
    """
    server = ParameterServer(problem.init(), outer)
    if state is not None:
        server.load(*state)
    return server
