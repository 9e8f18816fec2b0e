"""What to do about workers that are lost, slow or silent. Pure functions from what happened to what comes next."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch

BACKOFF_FIRST_SECONDS = 0.5
"""Wait before the second replacement in a row. It doubles with each further one."""
BACKOFF_LAST_SECONDS = 30.0
"""Longest wait before a replacement."""
STRAGGLER_FACTOR = 4.0
"""A shard is slow if it takes this many times the median of similar shards, …"""
STRAGGLER_SECONDS = 5.0
"""… and at least this long."""
HUNG_FACTOR = 20.0
"""A worker is hung if its shard takes this many times the slowest similar shard, …"""
HUNG_SECONDS = 60.0
"""… and at least this long."""
MOST_DOUBLINGS = 20
"""Limit of exponents, so that the waiting times stay finite."""
GPU_LIBRARY_ERRORS = [
    f"{library}_STATUS_{status}"
    for library in ("CUBLAS", "CUDNN")
    for status in ("ALLOC_FAILED", "NOT_INITIALIZED")
]
"""How cuBLAS and cuDNN report that the GPU has no memory left for them. It usually means that workers share a GPU."""


class LostShardError(RuntimeError):
    """A shard cannot be computed: every worker that tried it died, or no worker is left."""

    def __init__(self, message: str):
        super().__init__(message)  # a constructor with one argument survives pickling


def give_up_message(what: str, failures: int, limit: int, reason: str) -> str | None:
    """Return the error message to stop the run with, or None if the shard is to be computed again.

    Args:
        what: names the shard and its tasks.
        failures: workers that the shard has cost. Those that went away with their node do not count.
        limit: `run.max_shard_failures`.
        reason: how the last worker was lost.
    """
    if failures < limit:
        return None
    workers = "worker" if failures == 1 else "workers"
    return f"{what} lost {failures} {workers}, the last by: {reason}; run.max_shard_failures is {limit}"


def backoff(losses_in_a_row: int) -> float:
    """Return the seconds to wait before a worker is replaced. The first loss in a row is replaced at once."""
    if losses_in_a_row <= 1:
        return 0.0
    doublings = min(losses_in_a_row - 2, MOST_DOUBLINGS)
    return min(BACKOFF_FIRST_SECONDS * 2**doublings, BACKOFF_LAST_SECONDS)


def is_straggler(elapsed: float, peer_seconds: Sequence[float], copies: int) -> bool:
    """Return whether an idle worker should also compute a shard that another worker has. The first answer counts.

    Args:
        elapsed: seconds since the shard was handed out.
        peer_seconds: how long similar shards took lately.
        copies: workers that compute the shard now.
    """
    if copies > 1 or not peer_seconds:
        return False
    return elapsed > max(STRAGGLER_SECONDS, STRAGGLER_FACTOR * statistics.median(peer_seconds))


def is_hung(elapsed: float, peer_seconds: Sequence[float], failures: int, limit: float) -> bool:
    """Return whether a worker has been silent for so long that it should be replaced.

    If similar shards were timed, the limit is shorter than `run.shard_timeout`. It doubles with each worker that the
    shard has cost, because the shard may simply be slow.

    Args:
        elapsed: seconds since the worker began the shard.
        peer_seconds: how long similar shards took lately.
        failures: workers that the shard has cost.
        limit: `run.shard_timeout`.
    """
    if peer_seconds:
        expected = max(HUNG_SECONDS, HUNG_FACTOR * max(peer_seconds))
        limit = min(limit, expected * 2.0 ** min(failures, MOST_DOUBLINGS))
    return elapsed > limit


def is_worth_retrying(error: BaseException) -> bool:
    """Return whether an error may not occur on another worker: it is about memory, files or devices.

    Code and numbers are the same on every worker, so any other error would come again.
    """
    text = str(error)
    if isinstance(error, torch.AcceleratorError) and "device-side assert" in text:
        return False  # a fault of the computation, for example a label that no output has
    if isinstance(error, RuntimeError) and any(status in text for status in GPU_LIBRARY_ERRORS):
        return True
    circumstances = (MemoryError, OSError, torch.OutOfMemoryError, torch.AcceleratorError)
    # by name, because a run without Ray workers does not need to have Ray installed
    from_ray = any(cls.__name__ == "RayError" for cls in type(error).__mro__)
    return isinstance(error, circumstances) or from_ray
