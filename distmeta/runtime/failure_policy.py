"""What to do about workers that are lost, slow or silent: pure functions from what happened to what comes next."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch

BACKOFF_FIRST, BACKOFF_LAST = 0.5, 30.0
"""Seconds before a worker is replaced: doubled with each loss in a row."""
STRAGGLER_FACTOR, STRAGGLER_SECONDS = 4.0, 5.0
"""A shard is slow past so many times its peers' median, and never before so many seconds."""
EXHAUSTED = [
    f"{kind}_STATUS_{what}" for kind in ("CUBLAS", "CUDNN") for what in ("ALLOC_FAILED", "NOT_INITIALIZED")
]
"""How a GPU's libraries say that it has no memory left for them: the usual face of it where workers share one."""
HUNG_FACTOR, HUNG_SECONDS = 20.0, 60.0
"""A worker counts as hung past so many times the slowest shard that was timed, and never before so many seconds."""


class LostShardError(RuntimeError):
    """A shard whose every worker died, or no worker left to compute one."""

    def __init__(self, message: str):
        super().__init__(message)  # one argument: survives pickling


def gives_up(what: str, failures: int, limit: int, reason: str) -> str | None:
    """What the run ends with, where a shard has cost as many workers as it may; None: it is computed again.

    Args:
        what: names the shard and its tasks.
        failures: workers that the shard has cost; those that went with their node are not held against it.
        limit: `run.max_shard_failures`.
    """
    if failures < limit:
        return None
    return (
        f"{what} lost {failures} worker{'s' * (failures > 1)}, "
        f"the last by: {reason}; run.max_shard_failures is {limit}"
    )


def backoff(in_a_row: int) -> float:
    """Seconds before a worker is replaced, after so many losses in its place in a row: the first one at once."""
    return 0.0 if in_a_row <= 1 else min(BACKOFF_FIRST * 2 ** min(in_a_row - 2, 20), BACKOFF_LAST)


def straggles(elapsed: float, timed: Sequence[float], copies: int) -> bool:
    """Whether an idle worker should start a shard again that another one is still computing: the first answer wins.

    Args:
        elapsed: seconds since it was given out.
        timed: seconds that shards of its kind took lately.
        copies: workers that compute it already.
    """
    if copies > 1 or not timed:
        return False
    return elapsed > max(STRAGGLER_SECONDS, STRAGGLER_FACTOR * statistics.median(timed))


def hung(elapsed: float, timed: Sequence[float], failures: int, limit: float) -> bool:
    """Whether a worker is silent for so long that it is replaced: past `run.shard_timeout`, or sooner where its peers
    were timed; each replacement that the shard has cost doubles the time, should the shard just be a slow one."""
    if timed:
        limit = min(limit, max(HUNG_SECONDS, HUNG_FACTOR * max(timed)) * 2.0 ** min(failures, 20))
    return elapsed > limit


def another_may_fare_better(error: BaseException) -> bool:
    """Whether what a worker raised lies in its circumstances (memory, files, devices) rather than in the computation.

    Code and numbers are the same everywhere: what they raise once, they raise on every worker.
    """
    text = str(error)
    if isinstance(error, torch.AcceleratorError) and "device-side assert" in text:
        return False  # a label that no output has, say
    if isinstance(error, RuntimeError) and any(status in text for status in EXHAUSTED):
        return True
    circumstances = (MemoryError, OSError, torch.OutOfMemoryError, torch.AcceleratorError)
    from_ray = any(kind.__name__ == "RayError" for kind in type(error).__mro__)  # nobody else may have Ray
    return isinstance(error, circumstances) or from_ray
