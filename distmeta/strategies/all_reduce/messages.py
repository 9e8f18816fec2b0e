"""What the driver and the ranks of an `all-reduce` group send to each other."""

from __future__ import annotations

import pickle
import traceback
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from distmeta.compute.vectors import Layout
from distmeta.config.sections import OuterSection
from distmeta.errors import summarize_error
from distmeta.runtime.checkpoint import TrainingState
from distmeta.runtime.parameter_server import ParameterServer
from distmeta.runtime.shards import Shard

# --- Commands of the driver ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoadState:
    """Replace theta and the optimizer state."""

    state: list[Any]
    """A reference to a `PackedState`, in a list: Ray does not resolve references inside containers."""
    outer: OuterSection
    """Settings of the optimizer that the state belongs to."""


@dataclass(frozen=True)
class TakeSteps:
    """Take `count` steps after `step` completed ones."""

    step: int
    count: int
    phase: int
    """How many of the job's changes hold."""


@dataclass(frozen=True)
class ScoreShards:
    """Score the shards: shard i on rank i mod world."""

    shards: tuple[Shard, ...]
    flat: list[Any] | None
    """A reference to the theta to score, in a list; None: the replicas' own."""


@dataclass(frozen=True)
class SendState:
    """Rank 0 sends its state.

    With `complete`, every rank also sends the checksum of its theta. Otherwise rank 0 sends only theta.
    """

    complete: bool


@dataclass(frozen=True)
class Retune:
    """Continue with other settings of the optimizer."""

    outer: OuterSection


@dataclass(frozen=True)
class Abandon:
    """Stop the current command early. This command has no answer."""


@dataclass(frozen=True)
class Leave:
    """Leave the group: the run ends. This command has no answer."""


# --- Answers of the ranks --------------------------------------------------------------------------------------------


class Abandoned(Exception):  # noqa: N818 - control flow within a rank, not an error
    """The driver does not want the current command any more."""


@dataclass(frozen=True)
class RankError:
    """What a rank's computation raised."""

    error: Exception
    traceback: str
    """Where it was raised, on the rank."""

    @staticmethod
    def from_exception(error: Exception) -> RankError:
        """Describe an exception. One that cannot be pickled becomes a RuntimeError with its text."""
        text = "".join(traceback.format_exception(error))
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # a user's exception class may raise anything here
            error = RuntimeError(summarize_error(error))
        return RankError(error, text)


@dataclass(frozen=True)
class RankAnswer:
    """A rank's answer to a command: what it has, and what stopped it."""

    value: Any = None
    failure: RankError | None = None


@dataclass(frozen=True)
class LostGroup:
    """The group is gone. Ray Train makes another one, unless `ended`."""

    reason: str
    count: int = 0
    """Groups lost so far."""
    ended: bool = False


@dataclass(frozen=True)
class PackedState:
    """A `TrainingState` as numpy arrays, which Ray sends without a copy."""

    flat: np.ndarray
    """theta, float32."""
    optimizer: dict[str, np.ndarray]
    outer: dict[str, Any]

    @staticmethod
    def from_server(server: ParameterServer, complete: bool = True) -> PackedState:
        """Pack a parameter server's state; only theta unless `complete`."""
        if not complete:
            return PackedState(server.flat(), {}, {})
        tensors, plain = server.state()
        return PackedState(server.flat(), {key: value.numpy() for key, value in tensors.items()}, plain)

    @staticmethod
    def from_state(state: TrainingState, layout: Layout) -> PackedState:
        tensors = {key: value.numpy() for key, value in state.optimizer.items()}
        return PackedState(layout.flatten(state.theta), tensors, state.outer)

    def unpack(self, layout: Layout) -> TrainingState:
        """Return the state. Its tensors are copies, because the arrays may be views of Ray's shared memory."""
        tensors = {key: torch.from_numpy(np.array(value)) for key, value in self.optimizer.items()}
        return TrainingState(layout.unflatten(self.flat), tensors, self.outer)
