"""The failure policy: pure functions, tested without Ray."""

from __future__ import annotations

import pytest
import torch

from distmeta.errors import InputError
from distmeta.runtime.failure_policy import (
    backoff,
    give_up_message,
    is_hung,
    is_straggler,
    is_worth_retrying,
)


def test_first_loss_is_replaced_at_once_and_later_ones_back_off() -> None:
    assert [backoff(n) for n in range(6)] == [0.0, 0.0, 0.5, 1.0, 2.0, 4.0]
    assert backoff(12) == backoff(10_000) == 30.0


def test_shard_that_keeps_losing_workers_stops_the_run() -> None:
    assert give_up_message("shard 3 (tasks 12 to 15)", 2, 3, "ActorDiedError: killed") is None
    message = give_up_message("shard 3 (tasks 12 to 15)", 3, 3, "ActorDiedError: killed")
    for part in ("shard 3", "tasks 12 to 15", "3 workers", "ActorDiedError", "run.max_shard_failures is 3"):
        assert part in str(message)


def test_straggler_takes_far_longer_than_its_peers() -> None:
    assert not is_straggler(1e9, [], 1), "nothing to compare with"
    assert not is_straggler(4.9, [0.001] * 5, 1), "too short to matter"
    assert is_straggler(5.1, [0.001] * 5, 1)
    assert not is_straggler(39.0, [10.0] * 5, 1)
    assert is_straggler(41.0, [10.0] * 5, 1)
    assert not is_straggler(1e9, [10.0] * 5, 2), "two workers have it already"


def test_worker_is_hung_after_the_limit_or_sooner_if_peers_were_timed() -> None:
    assert not is_hung(1799.0, [], 0, 1800.0)
    assert is_hung(1801.0, [], 0, 1800.0)
    assert not is_hung(59.0, [0.1], 0, 1800.0)
    assert is_hung(61.0, [0.1], 0, 1800.0)
    assert not is_hung(199.0, [0.1, 10.0], 0, 1800.0)
    assert is_hung(201.0, [0.1, 10.0], 0, 1800.0)
    assert not is_hung(399.0, [0.1, 10.0], 1, 1800.0), "it has cost a worker already, so it may just be slow"
    assert is_hung(4.0, [100.0], 9, 3.0), "never after the limit"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        FileNotFoundError("store"),
        torch.OutOfMemoryError("CUDA out of memory"),
        torch.AcceleratorError("CUDA error: unspecified launch failure", 719),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"),
    ],
    ids=repr,
)
def test_errors_of_the_machine_are_worth_retrying(error: Exception) -> None:
    assert is_worth_retrying(error)


@pytest.mark.parametrize(
    "error",
    [
        InputError("tasks.path"),
        RuntimeError("shapes"),
        ZeroDivisionError(),
        torch.AcceleratorError("CUDA error: device-side assert triggered", 710),
        RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"),
    ],
    ids=repr,
)
def test_errors_of_the_computation_are_not_retried(error: Exception) -> None:
    assert not is_worth_retrying(error)
