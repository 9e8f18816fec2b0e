"""What to do when a worker is lost: a pure function from what happened to what comes next. Touches no actor."""

from __future__ import annotations

from dataclasses import dataclass

BACKOFF_FIRST, BACKOFF_LAST = 0.5, 30.0
"""Seconds before a worker is replaced: doubled with each loss in a row."""


class LostShardError(RuntimeError):
    """A shard whose every worker died: something in its tasks kills the process."""

    def __init__(self, message: str):
        super().__init__(message)  # one argument: survives pickling


@dataclass(frozen=True)
class Loss:
    """A worker died while it held a shard."""

    shard: int
    tasks: range
    failures: int
    """Workers this shard has lost, this one included."""
    in_a_row: int
    """Workers lost since a shard was last computed, this one included."""
    reason: str


@dataclass(frozen=True)
class Replace:
    """Start another worker after `delay` seconds and give the shard to whichever is free."""

    delay: float


@dataclass(frozen=True)
class Stop:
    """End the run with its last state saved."""

    message: str


def after_loss(loss: Loss, max_failures: int) -> Replace | Stop:
    """The first loss is replaced at once, further ones in a row with back-off, up to `run.max_shard_failures`."""
    if loss.failures >= max_failures:
        return Stop(
            f"shard {loss.shard} (tasks {loss.tasks.start} to {loss.tasks.stop - 1}) lost {loss.failures} workers, "
            f"the last by: {loss.reason}; run.max_shard_failures is {max_failures}"
        )
    return Replace(backoff(loss.in_a_row))


def backoff(in_a_row: int) -> float:
    """Seconds before the next start, after so many losses in a row."""
    return 0.0 if in_a_row <= 1 else min(BACKOFF_FIRST * 2 ** (in_a_row - 2), BACKOFF_LAST)
